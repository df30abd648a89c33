"""Placement of bundles: never more than there is, all or none, each strategy's promise, and found where there is one."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcray.gcs.policies import (
    STRATEGIES,
    bundles_could_fit,
    bundles_why_not,
    largest_first,
    matches,
    place_bundles,
)
from hpcray.protocol.messages import LabelRule
from hpcray.resources import UNIT, Shape, choose_units, shape_of, slots
from tests.unit.gcs.nodes import FakeNode, node

IN_A = LabelRule("zone", "in", ("a",))
Labels = Sequence[Sequence[LabelRule]]


def bundles_of(*amounts: Mapping[str, float]) -> list[Shape]:
    return [shape_of(each) for each in amounts]


def fits(taken: Sequence[Shape], on: FakeNode) -> bool:
    """Whether a raylet that takes these in the prescribed order has room for all."""
    available, units = dict(on.available), {name: dict(free) for name, free in on.units.items()}
    for index in largest_first(taken):
        if not slots(available, taken[index], units):
            return False
        for name, amount in taken[index].items():
            available[name] -= amount
            if name in units:
                for number, part in choose_units(units[name], amount).items():
                    units[name][number] -= part
    return True


def keeps(
    ranks: Sequence[int], bundles: Sequence[Shape], strategy: str, nodes: Any, labels: Labels, placed: Any
) -> bool:
    """Whether a placement is right."""
    by_rank = {each.rank: each for each in nodes}
    if strategy == "STRICT_PACK" and len(set(ranks)) > 1:
        return False
    if strategy == "STRICT_SPREAD" and len(set(ranks)) < len(ranks):
        return False
    if any(ranks[index] != rank for index, rank in placed.items()):
        return False
    fresh = [index for index in range(len(bundles)) if index not in placed]
    if labels and any(not matches(labels[index], by_rank[ranks[index]].labels) for index in fresh):
        return False
    return all(
        fits([bundles[index] for index in fresh if ranks[index] == rank], by_rank[rank])
        for rank in {ranks[index] for index in fresh}
    )


def all_placements(
    bundles: Sequence[Shape],
    strategy: str,
    nodes: Sequence[FakeNode],
    labels: Labels = (),
    placed: Mapping[int, int] = {},
) -> Iterator[tuple[int, ...]]:
    for ranks in itertools.product([each.rank for each in nodes], repeat=len(bundles)):
        if keeps(ranks, bundles, strategy, nodes, labels, placed):
            yield ranks


# ------------------------------------------------------------------------------------------------------------ random groups
@st.composite
def fake_nodes(draw: Any) -> list[FakeNode]:
    nodes = []
    for rank in range(draw(st.integers(1, 4))):
        labels = {"zone": zone} if (zone := draw(st.sampled_from(["", "a", "b"]))) else {}
        switch = (draw(st.sampled_from(["s", "t"])),)
        gpus = draw(st.integers(0, 2))
        each = node(rank, labels, f"h{draw(st.integers(0, 2))}", switch, CPU=draw(st.integers(1, 6)), GPU=gpus)
        each.available["CPU"] -= draw(st.integers(0, 2)) * UNIT
        if gpus:
            each.units["GPU"] = {n: draw(st.sampled_from([0, 3, 5, 8, 10, 10])) * UNIT // 10 for n in range(gpus)}
            each.available["GPU"] = sum(each.units["GPU"].values())
        nodes.append(each)
    return nodes


bundle = st.fixed_dictionaries(
    {"CPU": st.sampled_from([0, 1, 1, 2, 3])}, optional={"GPU": st.sampled_from([0.3, 0.5, 0.7, 1, 2])}
).map(shape_of)
groups = st.lists(bundle.filter(bool), min_size=1, max_size=4)
rules = st.sampled_from([(), (), (), (IN_A,)])
strategies = st.sampled_from(STRATEGIES)


@settings(max_examples=400)
@given(fake_nodes(), groups, strategies, st.data())
def test_a_placement_is_right_and_found_where_there_is_one(nodes, bundles, strategy, data):
    labels = data.draw(st.one_of(st.just(()), st.lists(rules, min_size=len(bundles), max_size=len(bundles))))
    ranks = place_bundles(bundles, strategy, nodes, labels=labels)
    if ranks is None:
        assert next(all_placements(bundles, strategy, nodes, labels), None) is None
    else:
        assert keeps(ranks, bundles, strategy, nodes, labels, {})
        assert bundles_could_fit(bundles, strategy, nodes, labels=labels)
    assert (bundles_why_not(bundles, strategy, nodes, labels=labels) == "") == (ranks is not None)
    assert place_bundles(bundles, strategy, nodes, labels=labels) == ranks


@settings(max_examples=200)
@given(fake_nodes(), groups, strategies, st.data())
def test_bundles_that_have_their_place_keep_it_and_bind_the_strict_strategies(nodes, bundles, strategy, data):
    some = data.draw(st.sets(st.integers(0, len(bundles) - 1)))
    where = st.sampled_from([each.rank for each in nodes])
    if strategy == "STRICT_PACK":
        rank = data.draw(where)
        placed = dict.fromkeys(some, rank)
    elif strategy == "STRICT_SPREAD":
        others = data.draw(st.permutations([each.rank for each in nodes]))
        placed = dict(zip(sorted(some), others, strict=False))
    else:
        placed = {index: data.draw(where) for index in some}
    ranks = place_bundles(bundles, strategy, nodes, placed=placed)
    if ranks is None:
        assert next(all_placements(bundles, strategy, nodes, (), placed), None) is None
    else:
        assert keeps(ranks, bundles, strategy, nodes, (), placed)


@settings(max_examples=200)
@given(fake_nodes(), groups)
def test_pack_takes_one_node_where_one_has_room_for_all(nodes, bundles):
    if place_bundles(bundles, "STRICT_PACK", nodes) is not None:
        assert len(set(place_bundles(bundles, "PACK", nodes) or [])) == 1


@settings(max_examples=200)
@given(fake_nodes(), groups)
def test_spread_takes_as_many_nodes_as_bundles_where_that_is_possible(nodes, bundles):
    if place_bundles(bundles, "STRICT_SPREAD", nodes) is not None:
        assert len(set(place_bundles(bundles, "SPREAD", nodes) or [])) == len(bundles)


@settings(max_examples=200)
@given(fake_nodes(), groups, strategies)
def test_what_fits_now_would_fit_if_nothing_else_ran_and_what_never_could_does_not_fit_now(nodes, bundles, strategy):
    if not bundles_could_fit(bundles, strategy, nodes):
        assert place_bundles(bundles, strategy, nodes) is None
        idle = [
            FakeNode(n.rank, n.total, n.total, {k: dict.fromkeys(f, UNIT) for k, f in n.units.items()}) for n in nodes
        ]
        assert next(all_placements(bundles, strategy, idle), None) is None


def test_of_random_groups_pack_hardly_ever_takes_a_node_too_many_nor_spread_one_too_few():
    choose = random.Random(1)
    solved = too_many = too_few = 0
    for _ in range(400):
        nodes = [node(rank, CPU=choose.randint(1, 8), memory=choose.randint(1, 8)) for rank in range(4)]
        bundles = bundles_of(*({"CPU": choose.randint(1, 4), "memory": choose.randint(1, 4)} for _ in range(4)))
        found = list(all_placements(bundles, "PACK", nodes))
        if found:
            solved += 1
            numbers = [len(set(ranks)) for ranks in found]
            too_many += len(set(place_bundles(bundles, "PACK", nodes) or [])) > min(numbers)
            too_few += len(set(place_bundles(bundles, "SPREAD", nodes) or [])) < max(numbers)
    assert solved > 200
    assert too_many <= 0.05 * solved
    assert too_few <= 0.05 * solved


# -------------------------------------------------------------------------------------------------------------- near others
def test_a_group_goes_to_one_host_then_to_one_switch_then_to_ranks_near_each_other():
    def cluster(*places: tuple[str, str]) -> list[FakeNode]:
        return [node(rank, {}, host, (switch,), CPU=2) for rank, (host, switch) in enumerate(places)]

    two = bundles_of({"CPU": 2}, {"CPU": 2})
    one_host = cluster(("a", "s"), ("b", "s"), ("c", "t"), ("d", "t"), ("d", "t"))
    one_switch = cluster(("a", "s"), ("c", "t"), ("b", "s"), ("d", "u"))
    apart = cluster(("a", "s"), ("c", "t"), ("b", "u"), ("d", "v"))
    apart[1].take({"CPU": 1})
    for strategy in ("PACK", "SPREAD", "STRICT_SPREAD"):
        assert place_bundles(two, strategy, one_host) == [3, 4]
        assert place_bundles(two, strategy, one_switch) == [0, 2]
        assert place_bundles(two, strategy, apart) == [2, 3]


def test_fewer_nodes_are_worth_more_than_a_common_switch():
    nodes = [node(0, {}, "a", ("s",), CPU=1), node(1, {}, "b", ("s",), CPU=1), node(2, {}, "c", ("t",), CPU=2)]
    assert place_bundles(bundles_of({"CPU": 1}, {"CPU": 1}), "PACK", nodes) == [2, 2]


def test_the_inner_of_two_switches_counts_first():
    switches = [("s", "1"), ("s", "2"), ("s", "2"), ("t", "1")]
    nodes = [node(rank, {}, f"h{rank}", switch, CPU=1) for rank, switch in enumerate(switches)]
    assert place_bundles(bundles_of({"CPU": 1}, {"CPU": 1}), "STRICT_SPREAD", nodes) == [1, 2]


def test_what_is_placed_anew_goes_near_what_stayed():
    nodes = [node(rank, {}, f"h{rank}", (f"s{rank // 4}",), CPU=1) for rank in range(8)]
    nodes[5].take({"CPU": 1})
    for strategy in ("PACK", "SPREAD", "STRICT_SPREAD"):
        assert place_bundles(bundles_of({"CPU": 1}, {"CPU": 1}), strategy, nodes, placed={0: 5}) == [5, 4]


def test_of_several_nodes_the_one_with_least_left_is_taken():
    nodes = [node(0, CPU=8), node(1, CPU=3), node(2, CPU=4)]
    assert place_bundles(bundles_of({"CPU": 1}, {"CPU": 2}), "STRICT_PACK", nodes) == [1, 1]


def test_spread_is_even_where_there_are_more_bundles_than_nodes():
    nodes = [node(rank, CPU=8) for rank in range(3)]
    ranks = place_bundles(bundles_of(*[{"CPU": 1}] * 8), "SPREAD", nodes)
    assert ranks is not None
    assert sorted(ranks.count(rank) for rank in range(3)) == [2, 3, 3]


def test_bundles_with_rules_go_where_these_hold():
    nodes = [node(0, CPU=4), node(1, {"zone": "a"}, CPU=4)]
    two = bundles_of({"CPU": 1}, {"CPU": 1})
    assert place_bundles(two, "PACK", nodes, labels=[(), (IN_A,)]) == [1, 1]
    assert place_bundles(two, "STRICT_SPREAD", nodes, labels=[(IN_A,), ()]) == [1, 0]
    assert place_bundles(two, "STRICT_SPREAD", nodes, labels=[(IN_A,), (IN_A,)]) is None


def test_a_large_group_that_greed_cannot_place_is_given_up_in_bounded_time():
    nodes = [node(rank, CPU=10) for rank in range(30)]
    tight = bundles_of(*[{"CPU": 6}] * 30, *[{"CPU": 5}] * 20)
    assert place_bundles(tight, "PACK", nodes) is None


# -------------------------------------------------------------------------------------------------------------------- texts
def test_the_text_says_how_many_bundles_have_room():
    nodes = [node(0, CPU=4).take({"CPU": 3}), node(1, CPU=4).take({"CPU": 1})]
    assert bundles_why_not(bundles_of({"CPU": 3}, {"CPU": 3}, {"CPU": 3}), "PACK", nodes) == (
        "3 bundles (0-2) of 3 CPU: room for 1 now and 2 if nothing else ran"
    )
    assert bundles_why_not(bundles_of({"CPU": 1}, {"GPU": 1}), "PACK", nodes) == (
        "bundle 1 of 1 GPU: room for 0 now and 0 if nothing else ran\n2 nodes (0-1; hosts h0 and h1): needs 1 GPU, 0 free of 0"
    )


def test_the_text_of_strict_pack_speaks_of_all_together():
    assert bundles_why_not(bundles_of({"CPU": 3}, {"CPU": 2}), "STRICT_PACK", [node(0, CPU=4), node(1, CPU=4)]) == (
        "STRICT_PACK puts all 2 bundles on one node:\n2 nodes (0-1; hosts h0 and h1): needs 5 CPU, 4 free of 4"
    )


def test_the_text_of_strict_spread_says_that_nodes_are_too_few():
    text = bundles_why_not(bundles_of({"CPU": 1}, {"CPU": 1}), "STRICT_SPREAD", [node(0, CPU=4)])
    assert text.startswith("STRICT_SPREAD puts 2 bundles on as many nodes, and there are 1")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_without_nodes_nothing_fits(strategy):
    assert place_bundles(bundles_of({"CPU": 1}), strategy, []) is None
    assert not bundles_could_fit(bundles_of({"CPU": 1}), strategy, [])


def test_strict_pack_goes_nowhere_else_when_the_node_of_its_other_bundles_is_unknown():
    assert place_bundles(bundles_of({"CPU": 1}, {"CPU": 1}), "STRICT_PACK", [node(0, CPU=4)], placed={0: 7}) is None
