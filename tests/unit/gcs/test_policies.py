"""Which nodes could run a class, in which order they are taken, and what people are told."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcray.gcs.policies import feasible, matches, order, why_not
from hpcray.protocol.messages import ActorOptions, LabelRule, Template
from hpcray.resources import UNIT, shape_of
from tests.unit.gcs.nodes import FakeNode, node


def template(labels: Any = (), liked: Any = (), actor: ActorOptions | None = None, **amounts: float) -> Template:
    return Template(
        job=b"job", function=b"f", name="f", num_returns=1, resources=shape_of(amounts), max_retries=0,
        labels=labels, liked_labels=liked, actor=actor,
    )  # fmt: skip


def ranks(nodes: Any) -> list[int]:
    return [node.rank for node in nodes]


IN_A = LabelRule("zone", "in", ("a",))


# ------------------------------------------------------------------------------------------------------------------- labels
@pytest.mark.parametrize(
    ("rule", "on_a", "on_b", "on_none"),
    [
        (LabelRule("zone", "in", ("a", "c")), True, False, False),
        (LabelRule("zone", "not in", ("a", "c")), False, True, True),
        (LabelRule("zone", "exists"), True, True, False),
        (LabelRule("zone", "does not exist"), False, False, True),
    ],
)
def test_rules_hold_as_in_ray(rule, on_a, on_b, on_none):
    assert [matches([rule], labels) for labels in ({"zone": "a"}, {"zone": "b"}, {"other": "a"})] == [
        on_a,
        on_b,
        on_none,
    ]


def test_all_rules_must_hold():
    rules = [IN_A, LabelRule("gpu", "exists")]
    assert matches(rules, {"zone": "a", "gpu": "x"})
    assert not matches(rules, {"zone": "a"})
    assert matches([], {})


# ----------------------------------------------------------------------------------------------------------------- feasible
def test_what_counts_is_what_a_node_has_in_all():
    nodes = [node(0, CPU=1), node(1, CPU=4).take({"CPU": 4}), node(2, CPU=4, GPU=1)]
    assert ranks(feasible(template(CPU=2), nodes)) == [1, 2]
    assert ranks(feasible(template(GPU=0.5), nodes)) == [2]
    assert ranks(feasible(template(), nodes)) == [0, 1, 2]


def test_an_actor_that_needs_more_to_be_placed_than_to_run_goes_where_that_is():
    nodes = [node(0, GPU=1), node(1, GPU=1, CPU=1)]
    spec = template(GPU=1, actor=ActorOptions(placement=shape_of({"CPU": 1})))
    assert ranks(feasible(spec, nodes)) == [1]


def test_labels_must_match():
    assert ranks(feasible(template(labels=(IN_A,)), [node(0), node(1, {"zone": "a"}), node(2, {"zone": "b"})])) == [1]


@pytest.mark.parametrize(
    ("asked", "is_soft", "expected"),
    [(1, False, [1]), (1, True, [1]), (0, False, []), (0, True, [1, 2]), (9, False, []), (9, True, [1, 2])],
)
def test_an_affinity_leaves_the_node_and_a_soft_one_yields_only_where_it_never_could_be_met(asked, is_soft, expected):
    spec = template(CPU=2)
    spec.node, spec.node_is_soft = asked, is_soft
    assert ranks(feasible(spec, [node(0, CPU=1), node(1, CPU=2).take({"CPU": 2}), node(2, CPU=2)])) == expected


# -------------------------------------------------------------------------------------------------------------------- order
def test_nodes_are_packed_up_to_half_then_the_least_used_comes_first():
    nodes = [node(rank, CPU=4) for rank in range(3)]
    taken = []
    for _ in range(12):
        first = order(template(CPU=1), nodes)[0]
        first.take({"CPU": 1})
        taken.append(first.rank)
    assert taken == [0, 0, 1, 1, 2, 2, 0, 1, 2, 0, 1, 2]


def test_the_most_used_of_the_demanded_resources_counts_and_no_other():
    nodes = [node(0, CPU=8, memory=100).take({"memory": 60}), node(1, CPU=8, memory=100)]
    assert ranks(order(template(CPU=1), nodes)) == [0, 1]
    assert ranks(order(template(CPU=1, memory=1), nodes)) == [1, 0]
    assert ranks(order(template(), nodes)) == [1, 0]


def test_what_needs_no_gpu_leaves_nodes_with_gpus_for_last():
    nodes = [node(0, CPU=8, GPU=1), node(1, CPU=8).take({"CPU": 8}), node(2, CPU=8)]
    assert ranks(order(template(CPU=1), nodes)) == [2, 1, 0]
    assert ranks(order(template(GPU=1, CPU=1), nodes[:1])) == [0]


def test_liked_labels_come_before_all_else():
    nodes = [node(0, CPU=8), node(1, {"zone": "a"}, CPU=8, GPU=1).take({"CPU": 7}), node(2, {"zone": "b"}, CPU=8)]
    assert ranks(order(template(liked=(IN_A,), CPU=1), nodes)) == [1, 0, 2]


amounts = st.integers(0, 8)
some_nodes = st.lists(st.tuples(amounts, amounts, st.booleans(), st.sampled_from(["", "a", "b"])), max_size=6)


@given(some_nodes, st.integers(0, 3), st.booleans())
def test_each_node_comes_once_and_the_preferences_are_kept(rows, cpus, likes):
    nodes = [
        node(rank, {"zone": zone} if zone else {}, CPU=total, GPU=float(has_gpu)).take({"CPU": min(total, used)})
        if total
        else node(rank, {"zone": zone} if zone else {}, GPU=float(has_gpu))
        for rank, (total, used, has_gpu, zone) in enumerate(rows)
    ]
    spec = template(liked=(IN_A,) if likes else (), CPU=cpus)
    ordered = order(spec, nodes)
    assert sorted(ranks(ordered)) == ranks(nodes)
    keys = []
    for each in ordered:
        has = each.total.get("CPU", 0)
        use = (has - each.available.get("CPU", 0) + cpus * UNIT) / has if has else 0.0
        if cpus:
            keys.append(
                (likes and each.labels.get("zone") != "a", "GPU" in each.total, use if use > 0.5 else 0, each.rank)
            )
    assert keys == sorted(keys)
    assert ranks(order(spec, nodes)) == ranks(ordered)


# ------------------------------------------------------------------------------------------------------------------ why not
def test_the_text_names_node_resource_and_label():
    nodes = [node(3, {"zone": "a"}, host="n2", CPU=2).take({"CPU": 1})]
    assert why_not(template(CPU=4, labels=(LabelRule("zone", "in", ("b", "c")),)), nodes) == (
        "node 3 (host n2): needs 4 CPU, 1 free of 2; label zone is 'a', not one of 'b', 'c'"
    )


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (LabelRule("zone", "not in", ("a",)), "label zone is 'a', one of those ruled out: 'a'"),
        (LabelRule("zone", "does not exist"), "label zone is 'a', and it must have none"),
        (LabelRule("disk", "exists"), "it has no label disk"),
        (LabelRule("disk", "in", ("ssd",)), "it has no label disk, not one of 'ssd'"),
    ],
)
def test_each_rule_has_its_words(rule, text):
    assert why_not(template(labels=(rule,)), [node(0, {"zone": "a"})]) == f"node 0 (host h0): {text}"


def test_a_thousand_nodes_make_a_few_lines():
    nodes = [
        node(rank, host=f"h{rank // 4}", CPU=2 + 2 * (rank >= 600)).take({"CPU": rank % 3}) for rank in range(1000)
    ]
    text = why_not(template(CPU=8), nodes)
    assert text.splitlines() == [
        "600 nodes (0-599; hosts h0 to h149): needs 8 CPU, 0 to 2 free of 2",
        "400 nodes (600-999; hosts h150 to h249): needs 8 CPU, 2 to 4 free of 4",
    ]


def test_a_thousand_different_nodes_are_cut_short():
    text = why_not(template(CPU=8000), [node(rank, CPU=rank + 1) for rank in range(1000)])
    assert len(text.splitlines()) == 10
    assert text.endswith("991 more nodes, each for reasons of these kinds")


def test_fractions_of_gpus_that_do_not_help_are_told_apart():
    halves = node(0, GPU=2)
    halves.available["GPU"], halves.units["GPU"] = UNIT, {0: UNIT // 2, 1: UNIT // 2}
    assert why_not(template(GPU=1), [halves]) == "node 0 (host h0): needs 1 GPU, 1 free of 2 but no whole one"
    assert why_not(template(GPU=0.6), [halves]).endswith("needs 0.6 GPU, 1 free of 2 but too little of each single one")
    assert why_not(template(GPU=0.5), [halves]) == ""


def test_memory_is_told_in_gib():
    assert why_not(template(memory=3 * 2**30), [node(0, memory=2**31)]).endswith(
        "needs 3 GiB memory, 2 GiB free of 2 GiB"
    )


def test_an_overdrawn_node_has_nothing_free():
    assert why_not(template(CPU=1), [node(0, CPU=1).take({"CPU": 3})]).endswith("needs 1 CPU, 0 free of 1")


def test_with_an_affinity_only_that_node_is_told_of():
    spec = template(CPU=2)
    spec.node = 1
    nodes: list[FakeNode] = [node(0, CPU=4), node(1, CPU=1)]
    assert why_not(spec, nodes) == "node 1 (host h1): needs 2 CPU, 1 free of 1"
    spec.node = 7
    assert why_not(spec, nodes) == "node 7, to which it is bound, does not exist"
    assert why_not(template(), []) == "there are no nodes"


def test_nothing_is_said_when_there_is_room():
    assert why_not(template(CPU=1), [node(0, CPU=1)]) == ""
