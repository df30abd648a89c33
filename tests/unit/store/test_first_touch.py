"""Which way untouched pages are filled, and in which steps."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hpcray.store.first_touch import BY_CALL, BY_FAULT, IOV_MAX, RETRY_STEPS, FirstTouch, split_parts


def take(touch: FirstTouch, costs: dict[int, float], steps: int) -> list[int]:
    ways = []
    for _ in range(steps):
        ways.append(touch.choose())
        touch.note(ways[-1], costs[ways[-1]])
    return ways


def test_both_ways_are_tried_and_the_faster_one_is_taken():
    for faster in (BY_CALL, BY_FAULT):
        ways = take(FirstTouch(only_faults=False), {faster: 1.0, 1 - faster: 2.0}, RETRY_STEPS)
        assert set(ways[:2]) == {BY_CALL, BY_FAULT}
        assert ways[2:] == [faster] * (RETRY_STEPS - 2)


def test_the_way_changes_at_once_when_it_becomes_slower_and_in_time_when_the_other_becomes_faster():
    touch = FirstTouch(only_faults=False)
    take(touch, {BY_CALL: 1.0, BY_FAULT: 2.0}, 10)
    crowded = take(touch, {BY_CALL: 9.0, BY_FAULT: 2.0}, 10)
    assert crowded[0] == BY_CALL
    assert set(crowded[1:]) == {BY_FAULT}
    alone_again = take(touch, {BY_CALL: 0.5, BY_FAULT: 2.0}, 10 * RETRY_STEPS)
    assert alone_again.count(BY_CALL) > 5 * RETRY_STEPS


def test_the_slower_way_costs_little():
    ways = take(FirstTouch(only_faults=False), {BY_CALL: 1.0, BY_FAULT: 2.0}, 100 * RETRY_STEPS)
    assert ways.count(BY_FAULT) <= 101


def test_where_only_faults_will_do_nothing_else_is_tried():
    assert set(take(FirstTouch(only_faults=True), {BY_FAULT: 5.0}, 200)) == {BY_FAULT}


@given(st.lists(st.binary(max_size=40), max_size=8), st.integers(1, 50))
def test_steps_are_the_same_bytes_and_all_full_but_the_last(parts, size):
    steps = [b"".join(step) for step in split_parts(parts, size)]
    assert b"".join(steps) == b"".join(parts)
    assert all(len(step) == size for step in steps[:-1])
    assert all(1 <= len(step) <= size for step in steps[-1:])


def test_no_step_has_more_pieces_than_a_call_can_take():
    steps = list(split_parts([b"x"] * (2 * IOV_MAX + 1), 1 << 20))
    assert [len(step) for step in steps] == [IOV_MAX, IOV_MAX, 1]
