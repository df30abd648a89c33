"""What the tests of this tier share. Each is the driver of a job on all ranks (fixture `hpcray_job`)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest


@pytest.fixture
def wait_until() -> Callable[..., Any]:
    """``wait_until(predicate, timeout=30, on_timeout=None)``: the predicate's first true value, or a failed test."""
    return _wait_until


def _wait_until(
    predicate: Callable[[], Any], timeout: float = 30.0, on_timeout: Callable[[], object] | None = None
) -> Any:
    deadline = time.monotonic() + timeout
    pause = 0.002
    while not (value := predicate()):
        if time.monotonic() > deadline:
            pytest.fail(f"did not come true within {timeout} s: {on_timeout() if on_timeout else 'no details'}")
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
    return value


@pytest.fixture
def nothing_left_behind() -> Iterator[None]:
    """Before `hpcray_job` among the fixtures: fail a test whose job leaves a process or a thread of its own on rank 0."""
    before = set(psutil.Process().children(recursive=True))
    yield

    def leftovers() -> list[str]:
        children = set(psutil.Process().children(recursive=True)) - before
        threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("hpcray")]
        return [*map(str, children), *threads]

    _wait_until(lambda: not leftovers(), 10, leftovers)
