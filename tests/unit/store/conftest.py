"""The table that most tests of the store are about."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hpcray.store.allocator import Allocator
from hpcray.store.table import ObjectTable
from tests.unit.store.lone_table import ME, PATIENCE, SIZE, Out


@pytest.fixture
def out() -> Out:
    return Out()


@pytest.fixture
def table(out: Out) -> Iterator[ObjectTable]:
    """The table of rank ME; at the end of the test, it agrees with itself."""
    table = ObjectTable(ME, Allocator(0, SIZE), out, patience=PATIENCE)
    yield table
    table.check()
