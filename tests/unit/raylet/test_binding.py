import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcray.raylet.binding import Binding
from hpcray.resources import UNIT


def test_each_worker_has_as_many_cpus_as_it_asks_for_and_shares_none_while_there_are_others():
    binding = Binding(range(8), [range(8)])
    assert binding.bind(1, UNIT) == [0]
    assert binding.bind(2, 3 * UNIT) == [1, 2, 3]
    assert binding.bind(3, 2 * UNIT + 1) == [4, 5, 6]
    assert binding.bind(4, UNIT // 2) == [7]


def test_one_that_asks_for_none_runs_anywhere_and_uses_nothing():
    binding = Binding([3, 4], [])
    assert binding.bind(1, 0) == [3, 4]
    assert binding.use == {3: 0, 4: 0}
    binding.pause(1)
    binding.resume(1)
    binding.release(1)
    assert binding.use == {3: 0, 4: 0}


def test_one_that_asks_for_more_than_there_is_runs_anywhere():
    binding = Binding(range(4), [range(4)])
    assert binding.bind(1, 100 * UNIT) == [0, 1, 2, 3]


def test_fractions_go_where_the_least_is_asked_for():
    binding = Binding(range(2), [range(2)])
    assert [binding.bind(worker, UNIT // 4) for worker in range(5)] == [[0], [1], [0], [1], [0]]
    binding.release(1)
    assert binding.bind(6, UNIT // 4) == [1]


def test_cpus_of_one_memory_node_are_preferred():
    binding = Binding(range(8), [{0, 2, 4, 6}, {1, 3, 5, 7}])
    assert binding.bind(1, 2 * UNIT) == [0, 2]
    assert binding.bind(2, 3 * UNIT) == [1, 3, 5]
    assert binding.bind(3, UNIT) == [7]  # so that two stay together
    assert binding.bind(4, 2 * UNIT) == [4, 6]


def test_with_too_few_in_any_memory_node_most_are_of_one():
    binding = Binding(range(8), [range(3), range(3, 8)])
    assert binding.bind(1, 6 * UNIT) == [0, 3, 4, 5, 6, 7]
    assert binding.bind(2, 2 * UNIT) == [1, 2]


def test_an_unused_cpu_elsewhere_is_better_than_a_used_one_near():
    binding = Binding(range(4), [{0, 1}, {2, 3}])
    for worker in range(3):
        binding.bind(worker, UNIT)
    binding.release(1)
    assert binding.use == {0: UNIT, 1: 0, 2: UNIT, 3: 0}
    assert binding.bind(5, 2 * UNIT) == [1, 3]


def test_cpus_of_no_known_memory_node_are_used_too():
    assert Binding(range(4), [{0, 1}, {8, 9}]).bind(1, 4 * UNIT) == [0, 1, 2, 3]


def test_the_cpus_of_a_blocked_worker_are_there_for_others():
    binding = Binding(range(2), [range(2)])
    binding.bind(1, UNIT)
    binding.bind(2, UNIT)
    binding.pause(1)
    assert binding.bind(3, UNIT) == [0]
    binding.resume(1)
    assert binding.use == {0: 2 * UNIT, 1: UNIT}


@given(st.data())
def test_nobody_is_put_onto_a_cpu_while_another_is_used_less(data):
    cpus = data.draw(st.lists(st.integers(0, 15), unique=True, min_size=1, max_size=8).map(sorted))
    cuts = data.draw(st.lists(st.integers(0, 15), max_size=3).map(sorted))
    nodes = [set(range(first, last)) for first, last in itertools.pairwise([0, *cuts, 16])]
    binding = Binding(cpus, nodes)
    bound, paused = {}, set()
    for worker in range(data.draw(st.integers(1, 12))):
        if bound and data.draw(st.booleans()):
            one = data.draw(st.sampled_from(sorted(bound)))
            step = data.draw(st.sampled_from([binding.resume if one in paused else binding.pause, binding.release]))
            step(one)
            if step == binding.release:
                del bound[one]
                paused.discard(one)
            else:
                paused ^= {one}
            continue
        amount = data.draw(st.integers(0, 6 * UNIT))
        before = dict(binding.use)
        chosen = binding.bind(worker, amount)
        count = -(-amount // UNIT)
        if not count:
            assert chosen == cpus
            continue
        bound[worker] = chosen
        assert len(chosen) == min(count, len(cpus))
        assert chosen == sorted(set(chosen))
        assert sorted(before[cpu] for cpu in chosen) == sorted(before.values())[: len(chosen)]
        most = max(before[cpu] for cpu in chosen)
        needed = {cpu for cpu in cpus if before[cpu] < most}
        fitting = [
            node
            for node in nodes
            if needed <= node and len([cpu for cpu in cpus if cpu in node and before[cpu] <= most]) >= len(chosen)
        ]
        if fitting:
            assert any(set(chosen) <= node for node in nodes)
    for worker in bound:
        binding.release(worker)
    assert set(binding.use.values()) == {0}


@pytest.mark.parametrize("cpus", [[], [5]])
def test_few_cpus(cpus):
    assert Binding(cpus, [range(8)]).bind(1, UNIT) == cpus
