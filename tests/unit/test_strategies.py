"""From scheduling strategies, label selectors and Ray's older options to what a template says."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from hpcray import ids
from hpcray.environments.wanted import Environment
from hpcray.labels import label_rules
from hpcray.options import actor_template, check_actor_options, check_task_options, task_template
from hpcray.protocol.messages import LabelRule, Template
from hpcray.runtime_context import NOWHERE, Surroundings
from hpcray.util.scheduling_strategies import (
    DoesNotExist,
    Exists,
    In,
    NodeAffinitySchedulingStrategy,
    NodeLabelSchedulingStrategy,
    NotIn,
    PlacementGroupSchedulingStrategy,
)

NODE = ids.node_id(bytes(8), 3)


class Group:
    """What is looked at of a placement group."""

    class Id:
        def binary(self) -> bytes:
            return b"group"

    id = Id()

    def __init__(self, *bundles: dict[str, float]) -> None:
        self.bundle_specs = list(bundles) or [{"CPU": 1.0}, {"CPU": 2.0, "GPU": 1.0}]
        self.bundle_count = len(self.bundle_specs)


def task(caller: Surroundings = NOWHERE, **options: Any) -> Template:
    check_task_options(options)
    return task_template(b"job", b"f", "f", options, Environment(), caller)


def actor(**options: Any) -> Template:
    check_actor_options(options)
    return actor_template(b"job", b"A", "A", options, Environment())


def in_group(*arguments: Any) -> dict[str, Any]:
    return {"scheduling_strategy": PlacementGroupSchedulingStrategy(*arguments)}


# ------------------------------------------------------------------------------------------------------------------ classes
@pytest.mark.parametrize("node", ["", "zz", "ab", "0" * 55, "0" * 54 + " 1", "f" * 56, "F" * 56, b"12"])
def test_what_is_no_node_id_is_refused(node):
    with pytest.raises(ValueError, match="Invalid node_id"):
        NodeAffinitySchedulingStrategy(node, soft=False)


def test_a_node_id_may_be_bytes():
    assert NodeAffinitySchedulingStrategy(bytes.fromhex(NODE), soft=True).node_id == NODE


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: In(), "In needs at least one value"),
        (lambda: NotIn(), "NotIn needs at least one value"),
        (lambda: In("a", 1), "the value in position 1 of In must be a string"),
        (lambda: NotIn(["a"]), "the value in position 0 of NotIn must be a string"),
        (lambda: NodeLabelSchedulingStrategy(None), "cannot both be empty"),
        (lambda: NodeLabelSchedulingStrategy({}, soft={}), "cannot both be empty"),
        (lambda: NodeLabelSchedulingStrategy(["a"]), "hard must be a dictionary"),
        (lambda: NodeLabelSchedulingStrategy({}, soft={1: In("a")}), "a key of soft must be a string"),
        (lambda: NodeLabelSchedulingStrategy({"a": "b"}), "must be one of the operators"),
    ],
)
def test_wrong_labels_are_refused_where_they_are_written(make, text):
    with pytest.raises(ValueError, match=text):
        make()


# ------------------------------------------------------------------------------------------------------------------- fields
def test_an_affinity_names_the_rank():
    spec = task(scheduling_strategy=NodeAffinitySchedulingStrategy(NODE, soft=True))
    assert (spec.node, spec.node_is_soft) == (3, True)
    assert not actor(scheduling_strategy=NodeAffinitySchedulingStrategy(NODE, soft=False)).node_is_soft


def test_label_expressions_become_rules():
    strategy = NodeLabelSchedulingStrategy(
        {"zone": In("a", "b"), "gpu": Exists()}, soft={"disk": NotIn("hdd"), "old": DoesNotExist()}
    )
    for spec in (task(scheduling_strategy=strategy), actor(scheduling_strategy=strategy)):
        assert spec.labels == (LabelRule("zone", "in", ("a", "b")), LabelRule("gpu", "exists"))
        assert spec.liked_labels == (LabelRule("disk", "not in", ("hdd",)), LabelRule("old", "does not exist"))


def test_a_selector_holds_besides_a_strategy():
    rule = LabelRule("zone", "in", ("a",))
    assert task(label_selector={"zone": "a"}, scheduling_strategy="SPREAD").labels == (rule,)
    assert task(label_selector={"zone": "a"}, **in_group(Group())).labels == (rule,)
    both = task(label_selector={"zone": "a"}, scheduling_strategy=NodeLabelSchedulingStrategy({"gpu": Exists()}))
    assert both.labels == (rule, LabelRule("gpu", "exists"))
    assert task(label_selector={}).labels == task(label_selector=None).labels == ()


@pytest.mark.parametrize(
    ("value", "operator", "values"),
    [
        ("a", "in", ("a",)),
        ("!a", "not in", ("a",)),
        ("in(a,b.c, d-e)", "in", ("a", "b.c", "d-e")),
        ("!in(a)", "not in", ("a",)),
        ("", "in", ("",)),
        ("in", "in", ("in",)),
    ],
)
def test_selectors_are_read_as_in_ray(value, operator, values):
    assert label_rules({"x.y/zone": value}) == [LabelRule("x.y/zone", operator, values)]


@pytest.mark.parametrize(
    "value", ["!", "!!a", "in()", "in(a,)", "in(a,  b)", "(a,b)", "-a", "a-", "a b", "in(a!b)", "a" * 64, "a\n"]
)
def test_wrong_selectors_are_refused(value):
    for make in (task, actor):
        with pytest.raises(ValueError, match="Invalid label selector value"):
            make(label_selector={"zone": value})


@pytest.mark.parametrize("key", ["", "-a", "a" * 64, "/a", "a/", "x..y/a", "x" * 254 + "/a", "a b"])
def test_wrong_keys_of_selectors_are_refused(key):
    with pytest.raises(ValueError, match="Invalid label key"):
        task(label_selector={key: "a"})


@pytest.mark.parametrize("selector", [["a"], {"a": 5}, {"a": None}, {5: "a"}, "a"])
def test_a_selector_maps_strings_to_strings(selector):
    with pytest.raises(TypeError, match="label"):
        task(label_selector=selector)


@pytest.mark.parametrize(
    ("strategy", "error"), [("PACK", ValueError), (5, TypeError), (object(), TypeError), (In("a"), TypeError)]
)
def test_what_is_no_strategy_is_refused(strategy, error):
    for make in (task, actor):
        with pytest.raises(error, match="scheduling_strategy must be"):
            make(scheduling_strategy=strategy)


# -------------------------------------------------------------------------------------------------------- placement groups
def test_a_group_and_its_bundle_are_named():
    spec = task(**in_group(Group(), 1))
    assert (spec.group, spec.bundle, spec.captures) == (b"group", 1, False)
    assert task(**in_group(Group())).bundle == -1
    assert actor(**in_group(Group(), -1, True)).captures
    assert task(**in_group(None)).group == b""


@pytest.mark.parametrize("index", [-2, 2, 100])
def test_there_must_be_such_a_bundle(index):
    for make in (task, actor):
        with pytest.raises(ValueError, match=f"placement group bundle index {index} is invalid"):
            make(**in_group(Group(), index))


def test_a_bundle_without_a_group_is_refused():
    with pytest.raises(ValueError, match="must be -1"):
        task(**in_group(None, 1))


@pytest.mark.parametrize("arguments", [("x",), (5,), (Group(), "a"), (Group(), None)])
def test_what_is_no_group_or_no_index_is_refused(arguments):
    with pytest.raises(TypeError):
        task(**in_group(*arguments))


def test_what_never_fits_into_its_bundle_is_refused():
    with pytest.raises(ValueError, match=r"Cannot schedule f .* does not fit into any bundle"):
        task(num_cpus=3, **in_group(Group()))
    with pytest.raises(ValueError, match="does not fit into bundle 0"):
        task(num_cpus=2, **in_group(Group(), 0))
    assert task(num_cpus=2, **in_group(Group())).group
    with pytest.raises(ValueError, match=r"Cannot schedule A .* does not fit"):
        actor(num_gpus=1, num_cpus=0, **in_group(Group({"CPU": 1})))


def test_an_actor_needs_a_cpu_to_be_created_unless_it_says_otherwise():
    with pytest.raises(ValueError, match="an actor needs 1 CPU to be created"):
        actor(memory=1, **in_group(Group({"GPU": 1, "memory": 1})))
    with pytest.raises(ValueError, match=r"what it needs, \{'CPU': 1.0, 'GPU': 1.0\}, does not fit"):
        actor(num_gpus=1, **in_group(Group({"GPU": 1})))
    assert actor(num_gpus=1, num_cpus=0, **in_group(Group({"GPU": 1}))).group


@pytest.fixture
def nothing_known(monkeypatch):
    """No job is asked for the bundles of a captured group."""
    monkeypatch.setattr("hpcray.strategies.PlacementGroup.bundle_specs", [])


@pytest.mark.usefixtures("nothing_known")
def test_what_a_capturing_task_submits_runs_in_its_group_unless_told_otherwise():
    inside = Surroundings(b"mine", captures=True)
    inherited = task(inside)
    assert (inherited.group, inherited.bundle, inherited.captures) == (b"mine", -1, True)
    assert task(inside, scheduling_strategy="DEFAULT").group == b""
    assert task(inside, scheduling_strategy="SPREAD").group == b""
    assert task(inside, **in_group(None)).group == b""
    other = task(inside, **in_group(Group()))
    assert (other.group, other.captures) == (b"group", True)
    assert not task(inside, **in_group(Group(), -1, False)).captures
    assert task(Surroundings(b"mine", captures=False)).group == b""


# ---------------------------------------------------------------------------------------------------------- older options
@pytest.mark.usefixtures("nothing_known")
def test_the_older_options_work_with_a_warning():
    with pytest.warns(DeprecationWarning, match="placement_group and placement_group_bundle_index: deprecated"):
        spec = task(placement_group=Group(), placement_group_bundle_index=1)
    assert (spec.group, spec.bundle) == (b"group", 1)
    with pytest.warns(DeprecationWarning, match="placement_group: deprecated"):
        assert task(Surroundings(b"mine", captures=True), placement_group=None).group == b""
    with pytest.warns(DeprecationWarning, match="capture_child_tasks: deprecated"):
        assert task(Surroundings(b"mine"), placement_group_capture_child_tasks=True).group == b"mine"


def test_the_older_options_are_checked():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with pytest.raises(ValueError, match="excludes any other strategy"):
            task(placement_group=Group(), scheduling_strategy="SPREAD")
        assert task(placement_group=None, scheduling_strategy="SPREAD").spread
        with pytest.raises(TypeError, match="placement_group"):
            task(placement_group="x")
        with pytest.raises(TypeError, match="placement_group_bundle_index"):
            task(placement_group=Group(), placement_group_bundle_index="1")
        with pytest.raises(ValueError, match="must be -1"):
            actor(placement_group_bundle_index=1)
