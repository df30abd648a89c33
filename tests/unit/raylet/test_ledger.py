"""The accounts of a raylet: total = free + what was acquired."""

from __future__ import annotations

import pytest

from hpcray.exceptions import InternalError
from hpcray.raylet.ledger import Ledger
from hpcray.resources import UNIT

CPU = {"CPU": UNIT}


@pytest.fixture
def ledger() -> Ledger:
    return Ledger({"CPU": 2 * UNIT, "GPU": UNIT})


def test_what_is_acquired_is_not_free(ledger):
    ledger.acquire(CPU)
    assert ledger.free == {"CPU": UNIT, "GPU": UNIT}
    assert ledger.total == {"CPU": 2 * UNIT, "GPU": UNIT}
    ledger.release(CPU)
    assert ledger.free == ledger.total


def test_a_demand_fits_if_all_of_it_does(ledger):
    assert ledger.fits({"CPU": 2 * UNIT, "GPU": UNIT})
    assert not ledger.fits({"CPU": UNIT, "GPU": 2 * UNIT})
    assert not ledger.fits({"TPU": 1})
    assert ledger.fits({})


def test_slots_are_counted_by_the_scarcest(ledger):
    assert ledger.slots(CPU) == 2
    assert ledger.slots({"CPU": UNIT // 2, "GPU": UNIT}) == 1
    assert ledger.slots({"TPU": 1}) == 0


def test_ten_tenths_are_one(ledger):
    for _ in range(10):
        assert ledger.fits({"GPU": UNIT // 10})
        ledger.acquire({"GPU": UNIT // 10})
    assert not ledger.fits({"GPU": 1})


def test_a_worker_that_goes_on_may_overdraw_and_then_nothing_fits(ledger):
    for _ in range(3):
        ledger.acquire(CPU)
    assert ledger.free["CPU"] == -UNIT
    assert ledger.slots(CPU) == 0
    ledger.release(CPU)
    assert not ledger.fits(CPU)
    ledger.release(CPU)
    assert ledger.fits(CPU)


def test_whether_a_demand_could_ever_fit_does_not_depend_on_what_is_free(ledger):
    ledger.acquire({"CPU": 2 * UNIT})
    assert ledger.could_fit({"CPU": 2 * UNIT})
    assert not ledger.could_fit({"CPU": 3 * UNIT})


def test_more_than_the_total_is_never_free(ledger):
    with pytest.raises(InternalError, match="more CPU is free"):
        ledger.release(CPU)
