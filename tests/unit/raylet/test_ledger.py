"""The accounts of a raylet: total = free + what was acquired; bundles are holdings and accounts at once."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule

from hpcray.exceptions import InternalError
from hpcray.protocol import messages as m
from hpcray.raylet.ledger import Holding, Ledger
from hpcray.resources import UNIT, Shape


def of(shape: Shape, **fields: Any) -> m.Template:
    return m.Template(job=b"job", function=b"f", name="f", num_returns=1, resources=shape, max_retries=0, **fields)


CPU = of({"CPU": UNIT})
HALF_GPU = of({"GPU": UNIT // 2})
GPU = of({"GPU": UNIT})


@pytest.fixture
def ledger() -> Ledger:
    return Ledger({"CPU": 2 * UNIT, "GPU": 2 * UNIT})


def test_what_is_acquired_is_not_free(ledger):
    holding = ledger.acquire(CPU)
    assert ledger.free == {"CPU": UNIT, "GPU": 2 * UNIT}
    assert ledger.total == {"CPU": 2 * UNIT, "GPU": 2 * UNIT}
    ledger.release(holding)
    assert ledger.free == ledger.total


def test_slots_are_counted_by_the_scarcest(ledger):
    assert ledger.slots(CPU) == 2
    assert ledger.slots(of({"CPU": UNIT // 2, "GPU": UNIT})) == 2
    assert ledger.slots(of({"TPU": 1})) == 0
    assert ledger.slots(of({})) > 1_000_000


def test_ten_tenths_are_one_cpu_and_one_gpu(ledger):
    holdings = [ledger.acquire(of({"CPU": UNIT // 10, "GPU": UNIT // 10})) for _ in range(10)]
    assert {number for holding in holdings for number in holding.units["GPU"]} == {0}
    assert ledger.acquire(GPU).units == {"GPU": {1: UNIT}}
    assert not ledger.slots(of({"GPU": 1}))


def test_fractions_share_a_gpu_so_that_whole_ones_stay_free(ledger):
    assert ledger.acquire(HALF_GPU).units == {"GPU": {0: UNIT // 2}}
    assert ledger.slots(GPU) == 1
    assert ledger.acquire(HALF_GPU).units == {"GPU": {0: UNIT // 2}}
    assert ledger.slots(GPU) == 1


def test_two_halves_of_two_gpus_are_no_whole_one(ledger):
    held = [ledger.acquire(of({"GPU": 6_000})) for _ in range(2)]
    assert ledger.free["GPU"] == 8_000
    assert not ledger.slots(of({"GPU": 5_000}))
    assert ledger.slots(of({"GPU": 4_000})) == 2
    ledger.release(held[0])
    assert ledger.slots(GPU) == 1


def test_a_worker_that_goes_on_may_overdraw_and_then_nothing_fits(ledger):
    blocked = ledger.acquire(CPU)
    ledger.pause(blocked)
    running = [ledger.acquire(CPU), ledger.acquire(CPU)]
    ledger.resume(blocked)
    assert ledger.free["CPU"] == -UNIT
    assert ledger.slots(CPU) == 0
    assert ledger.is_overdrawn(CPU)
    assert not ledger.is_overdrawn(GPU)
    ledger.release(running.pop())
    assert ledger.slots(CPU) == 0
    ledger.release(blocked)
    assert ledger.slots(CPU) == 1


def test_a_blocked_worker_keeps_its_gpu(ledger):
    blocked = ledger.acquire(of({"CPU": UNIT, "GPU": 2 * UNIT}))
    ledger.pause(blocked)
    assert ledger.slots(CPU) == 2
    assert ledger.slots(GPU) == 0
    ledger.release(blocked)
    assert ledger.free == ledger.total


def test_whether_a_demand_could_ever_fit_does_not_depend_on_what_is_free(ledger):
    ledger.acquire(of({"CPU": 2 * UNIT}))
    assert ledger.could_fit(of({"CPU": 2 * UNIT}))
    assert not ledger.could_fit(of({"CPU": 3 * UNIT}))


def test_more_than_the_total_is_never_free(ledger):
    holding = ledger.acquire(CPU)
    ledger.release(holding)
    with pytest.raises(InternalError, match="more CPU is free"):
        ledger.release(holding)


def test_bundles_are_set_aside_all_or_none(ledger):
    assert ledger.reserve(b"g", {0: {"CPU": UNIT}, 1: {"GPU": UNIT}})
    assert ledger.free == {"CPU": UNIT, "GPU": UNIT}
    assert not ledger.reserve(b"h", {0: {"CPU": UNIT}, 1: {"CPU": UNIT}})
    assert ledger.free == {"CPU": UNIT, "GPU": UNIT}


def test_what_runs_in_a_bundle_has_its_resources_and_no_others(ledger):
    ledger.acquire(GPU)
    ledger.reserve(b"g", {3: {"CPU": UNIT, "GPU": UNIT}})
    assert ledger.slots(of({"CPU": UNIT}, group=b"g")) == 1
    assert ledger.slots(of({"CPU": UNIT}, group=b"g", bundle=3)) == 1
    assert ledger.slots(of({"CPU": UNIT}, group=b"g", bundle=0)) == 0
    assert ledger.slots(of({"CPU": UNIT}, group=b"other")) == 0
    assert ledger.acquire(of({"CPU": UNIT, "GPU": UNIT}, group=b"g")).units == {"GPU": {1: UNIT}}
    assert ledger.slots(of({"CPU": UNIT}, group=b"g")) == 0
    assert ledger.slots(CPU) == 1


def test_half_a_gpu_may_be_a_bundle(ledger):
    ledger.reserve(b"g", {0: {"GPU": UNIT // 2}})
    assert ledger.slots(of({"GPU": UNIT // 2}, group=b"g")) == 1
    assert ledger.slots(of({"GPU": UNIT // 4}, group=b"g")) == 2
    assert ledger.slots(of({"GPU": UNIT}, group=b"g")) == 0
    assert not ledger.could_fit(of({"GPU": UNIT}, group=b"g"))


def test_a_bundle_goes_back_when_the_last_in_it_has_gone(ledger):
    ledger.reserve(b"g", {0: {"CPU": UNIT}, 1: {"CPU": UNIT}})
    inside = ledger.acquire(of({"CPU": UNIT}, group=b"g", bundle=0))
    assert ledger.give_up(b"g", []) != []
    assert ledger.free["CPU"] == UNIT, "bundle 1 was not used"
    assert ledger.slots(of({"CPU": UNIT}, group=b"g")) == 0
    ledger.release(inside)
    assert ledger.free == ledger.total


def test_some_bundles_of_a_group_may_be_given_up(ledger):
    ledger.reserve(b"g", {0: {"CPU": UNIT}, 1: {"CPU": UNIT}})
    ledger.give_up(b"g", [1])
    assert ledger.slots(of({"CPU": UNIT}, group=b"g", bundle=0)) == 1
    assert ledger.slots(of({"CPU": UNIT}, group=b"g", bundle=1)) == 0
    assert ledger.give_up(b"unknown", []) == []


AMOUNTS = st.sampled_from([1, 2_500, 3_333, 5_000, UNIT])
SHAPES = st.fixed_dictionaries(
    {}, optional={"CPU": AMOUNTS, "GPU": st.one_of(AMOUNTS, st.just(2 * UNIT)), "memory": st.integers(1, 50_000)}
)
GROUPS = st.sampled_from([b"g", b"h"])


class Accounts(RuleBasedStateMachine):
    """Random demands, blocks and bundles: nothing is given twice, and all comes back."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger({"CPU": 3 * UNIT, "GPU": 3 * UNIT, "memory": 100_000})
        self.held: list[Holding] = []

    holdings = Bundle("holdings")

    @rule(target=holdings, shape=SHAPES, group=st.one_of(st.just(b""), GROUPS), bundle=st.integers(-1, 1))
    def acquire(self, shape, group, bundle):
        template = of(shape, group=group, bundle=bundle if group else -1)
        if not self.ledger.slots(template):
            return multiple()
        assert self.ledger.could_fit(template)
        holding = self.ledger.acquire(template)
        for name, parts in holding.units.items():
            assert sum(parts.values()) == shape[name]
            assert len(parts) == max(1, shape[name] // UNIT)
        self.held.append(holding)
        return holding

    @rule(holding=consumes(holdings))
    def release(self, holding):
        self.held.remove(holding)
        self.ledger.release(holding)

    @rule(holding=holdings)
    def block_or_go_on(self, holding):
        (self.ledger.resume if holding.is_paused else self.ledger.pause)(holding)

    @rule(group=GROUPS, bundles=st.dictionaries(st.integers(0, 1), SHAPES, min_size=1))
    def reserve(self, group, bundles):
        if group not in self.ledger.groups:
            free = dict(self.ledger.free)
            if not self.ledger.reserve(group, bundles):
                assert self.ledger.free == free

    @precondition(lambda self: self.ledger.groups)
    @rule(group=GROUPS, indices=st.sets(st.integers(0, 1)))
    def give_up(self, group, indices):
        self.ledger.give_up(group, indices)

    @invariant()
    def accounts_are_right(self):
        self.ledger.check(self.held)
        for each in self.ledger.free_units.values():
            assert all(0 <= free <= UNIT for free in each.values())

    def teardown(self):
        for group in list(self.ledger.groups):
            self.ledger.give_up(group, [])
        for holding in self.held:
            self.ledger.release(holding)
        assert self.ledger.free == self.ledger.total


TestAccounts = Accounts.TestCase
TestAccounts.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
