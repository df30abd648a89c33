"""What is wrong with the options of tasks, actors and placement groups, and with strategies: who says so, when, and how."""

import importlib
import math

import pytest

INIT = {"num_cpus": 2, "num_gpus": 0, "resources": {"licence": 2}}
pytestmark = pytest.mark.usefixtures("ray_start")
NOWHERE = "0" * 55 + "1"
nan, inf = math.nan, math.inf


@pytest.fixture
def f(hpcray):
    @hpcray.remote
    def f(*_):
        return hpcray.get_runtime_context().get_node_id()

    return f


@pytest.fixture
def cls(hpcray):
    @hpcray.remote
    class A:
        def node(self):
            return hpcray.get_runtime_context().get_node_id()

    return A


@pytest.fixture
def strategies(hpcray):
    return importlib.import_module(f"{hpcray.__name__}.util.scheduling_strategies")


@pytest.fixture
def groups(hpcray):
    return importlib.import_module(f"{hpcray.__name__}.util.placement_group")


def refused(error, match, *attempts):
    for attempt in attempts:
        with pytest.raises(error, match=match or None):
            attempt()


BOTH = [
    ({"num_cpu": 1}, ValueError, "num_cpu"),
    ({"ressources": {}}, ValueError, "ressources"),
    ({"num_cpus": -1}, ValueError, "num_cpus"),
    ({"num_cpus": nan}, ValueError, "NaN|nan"),
    ({"num_cpus": "2"}, TypeError, "num_cpus"),
    ({"num_cpus": 1e-5}, ValueError, "0.0001|1/10000"),
    ({"num_gpus": -1}, ValueError, "num_gpus"),
    ({"num_gpus": nan}, ValueError, "NaN|nan"),
    ({"num_gpus": "1"}, TypeError, "num_gpus"),
    ({"memory": -1}, ValueError, "memory"),
    ({"memory": nan}, ValueError, "NaN|nan"),
    ({"memory": "1GB"}, TypeError, "memory"),
    ({"resources": []}, TypeError, "resources"),
    ({"resources": {"CPU": 1}}, ValueError, "CPU"),
    ({"resources": {"GPU": 1}}, ValueError, "GPU"),
    ({"resources": {"x": -1}}, ValueError, "x"),
    ({"resources": {"x": nan}}, ValueError, "NaN|nan"),
    ({"resources": {"x": "1"}}, TypeError, ""),
    ({"resources": {"x": 1e-5}}, ValueError, "0.0001|1/10000"),
    ({"scheduling_strategy": 5}, TypeError, "scheduling_strategy"),
    ({"label_selector": {"a": "!!b"}}, ValueError, "!!b"),
    ({"label_selector": {"a": "in()"}}, ValueError, r"in\(\)"),
    ({"label_selector": {"a": "b c"}}, ValueError, "b c"),
    ({"label_selector": {"a b": "c"}}, ValueError, "a b"),
    ({"label_selector": {"-a": "c"}}, ValueError, "-a"),
    ({"label_selector": {"": "c"}}, ValueError, ""),
    ({"label_selector": []}, TypeError, ""),
    ({"name": 5}, TypeError, "name"),
]


@pytest.mark.parametrize(("options", "error", "match"), BOTH, ids=[str(options) for options, _, _ in BOTH])
def test_wrong_options_of_tasks_and_actors_are_refused_by_options_and_remote(hpcray, f, cls, options, error, match):
    refused(
        error,
        match,
        lambda: f.options(**options),
        lambda: cls.options(**options),
        lambda: hpcray.remote(**options)(lambda: 1),
        lambda: hpcray.remote(**options)(type("A", (), {})),
    )


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"num_returns": -1}, ValueError),
        ({"num_returns": 1.5}, TypeError),
        ({"max_retries": -2}, ValueError),
        ({"max_restarts": 1}, ValueError),
        ({"lifetime": "detached"}, ValueError),
    ],
)
def test_wrong_options_of_tasks_are_refused(f, options, error):
    refused(error, next(iter(options)), lambda: f.options(**options))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_restarts": -2}, ValueError),
        ({"lifetime": "forever"}, ValueError),
        ({"max_retries": 1}, ValueError),
        ({"num_returns": 1}, ValueError),
    ],
)
def test_wrong_options_of_actors_are_refused(cls, options, error):
    refused(error, next(iter(options)), lambda: cls.options(**options))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_gpus": 1.5}, "(?s)GPU.*whole"),
        ({"num_gpus": 1.0000001}, "(?s)GPU.*whole"),
        ({"scheduling_strategy": "PACK"}, "PACK"),
        ({"scheduling_strategy": "spread"}, "spread"),
        ({"resources": {"memory": 1}}, "memory"),
        ({"resources": {"object_store_memory": 1}}, "object_store_memory"),
    ],
    ids=str,
)
def test_what_remote_refuses_at_the_latest(f, cls, options, match):
    refused(
        ValueError,
        match,
        lambda: f.options(**options).remote(),
        lambda: cls.options(**options).remote(),
    )


@pytest.mark.beyond_ray("an OverflowError there")
def test_an_endless_amount_is_refused_like_others(f):
    refused(ValueError, "inf", lambda: f.options(num_cpus=inf), lambda: f.options(resources={"x": inf}))


@pytest.mark.beyond_ray("it names none there")
@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("num_cpu", "num_cpus"),
        ("num_gpu", "num_gpus"),
        ("ressources", "resources"),
        ("schedulingstrategy", "scheduling_strategy"),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest_that_is_known(f, cls, wrong, near):
    refused(ValueError, f"Did you mean '{near}'", lambda: f.options(**{wrong: 1}), lambda: cls.options(**{wrong: 1}))


def test_an_option_of_an_actors_method_that_is_none_is_a_type_error(cls):
    refused(TypeError, "num_cpus", lambda: cls.remote().node.options(num_cpus=1).remote())


# --------------------------------------------------------------------------------------------------------- placement groups
@pytest.mark.parametrize(
    "bundles", [[], None, {"CPU": 1}, [1], [{}], [{"CPU": 0}], [{"CPU": 1}, {}], [{"CPU": "1"}], [{1: 1}]], ids=str
)
def test_bundles_that_are_none_or_empty_are_refused(groups, bundles):
    refused(ValueError, "(?i)bundle", lambda: groups.placement_group(bundles))


@pytest.mark.beyond_ray("its control store dies of some, and the others are placed somehow")
@pytest.mark.parametrize(
    "bundle", [{"CPU": -1}, {"CPU": nan}, {"CPU": inf}, {"CPU": 1e-5}, {"GPU": 1.5}, {"CPU": True}], ids=str
)
def test_bundles_of_impossible_amounts_are_refused(groups, bundle):
    refused(ValueError, "CPU|GPU", lambda: groups.placement_group([bundle]))


@pytest.mark.parametrize("strategy", ["pack", "BAD", ""])
def test_a_strategy_that_is_none_is_refused_with_those_that_are(groups, strategy):
    refused(ValueError, "STRICT_SPREAD", lambda: groups.placement_group([{"CPU": 1}], strategy=strategy))


def test_other_arguments_of_placement_groups_are_checked_too(groups):
    bundles = [{"CPU": 1}]
    refused(ValueError, "lifetime", lambda: groups.placement_group(bundles, lifetime="forever"))
    refused(
        ValueError, "bundle_label_selector", lambda: groups.placement_group(bundles, bundle_label_selector=[{}, {}])
    )
    refused(ValueError, "!!", lambda: groups.placement_group(bundles, bundle_label_selector=[{"a": "!!"}]))
    refused(TypeError, "", lambda: groups.placement_group(bundles, name=5))


def test_a_bundle_that_there_is_not_is_refused(f, cls, groups, strategies):
    group = groups.placement_group([{"CPU": 1}])

    def inside(index, **options):
        return {"scheduling_strategy": strategies.PlacementGroupSchedulingStrategy(group, index), **options}

    for index in (-2, 1, 5):
        refused(
            ValueError,
            f"index {index} is invalid",
            lambda index=index: f.options(**inside(index)).remote(),
            lambda index=index: cls.options(**inside(index)).remote(),
        )
    refused(TypeError, "", lambda: f.options(**inside("0")).remote(), lambda: f.options(**inside(None)).remote())
    refused(ValueError, "(?i)cannot schedule", lambda: f.options(**inside(-1, num_cpus=2)).remote())
    none = strategies.PlacementGroupSchedulingStrategy(None, 0)
    refused(ValueError, "must be -1", lambda: f.options(scheduling_strategy=none).remote())
    groups.remove_placement_group(group)


# --------------------------------------------------------------------------------------------------------- nodes and labels
@pytest.mark.parametrize("node", ["xx", "", "0" * 10, "0" * 55, "f" * 56, "F" * 56, "g" * 56])
def test_what_is_no_node_id_is_refused(strategies, node):
    refused(ValueError, "Invalid node_id", lambda: strategies.NodeAffinitySchedulingStrategy(node, soft=False))


def test_a_task_bound_to_a_node_that_does_not_exist_fails(hpcray, f, strategies):
    bound = f.options(scheduling_strategy=strategies.NodeAffinitySchedulingStrategy(NOWHERE, soft=False))
    refs = [bound.remote() for _ in range(3)]
    for ref in refs:
        refused(
            hpcray.exceptions.TaskUnschedulableError, "not schedulable", lambda ref=ref: hpcray.get(ref, timeout=60)
        )
    ready, _ = hpcray.wait(refs, num_returns=3, timeout=60)
    assert ready == refs
    refused(
        hpcray.exceptions.RayError,
        "TaskUnschedulableError|not schedulable",
        lambda: hpcray.get(f.remote(refs[0]), timeout=60),
    )


def test_an_actor_bound_to_a_node_that_does_not_exist_fails(hpcray, cls, strategies):
    bound = strategies.NodeAffinitySchedulingStrategy(NOWHERE, soft=False)
    actor = cls.options(scheduling_strategy=bound).remote()
    for _ in range(2):
        refused(
            hpcray.exceptions.ActorUnschedulableError,
            "not schedulable",
            lambda: hpcray.get(actor.node.remote(), timeout=60),
        )


def test_what_is_softly_bound_to_a_node_that_does_not_exist_runs_elsewhere(hpcray, f, cls, strategies):
    liked = strategies.NodeAffinitySchedulingStrategy(NOWHERE, soft=True)
    [node] = hpcray.nodes()
    assert hpcray.get(f.options(scheduling_strategy=liked).remote(), timeout=60) == node["NodeID"]
    actor = cls.options(scheduling_strategy=liked).remote()
    assert hpcray.get(actor.node.remote(), timeout=60) == node["NodeID"]


def test_what_is_bound_to_a_node_that_is_too_small_fails(hpcray, f, cls, strategies):
    bound = strategies.NodeAffinitySchedulingStrategy(hpcray.nodes()[0]["NodeID"], soft=False)
    ref = f.options(num_cpus=64, scheduling_strategy=bound).remote()
    refused(hpcray.exceptions.TaskUnschedulableError, "not schedulable", lambda: hpcray.get(ref, timeout=60))
    actor = cls.options(num_cpus=64, scheduling_strategy=bound).remote()
    refused(
        hpcray.exceptions.ActorUnschedulableError,
        "not schedulable",
        lambda: hpcray.get(actor.node.remote(), timeout=60),
    )


def test_what_wants_labels_that_no_node_has_waits(hpcray, f, strategies):
    hard = strategies.NodeLabelSchedulingStrategy({"disk": strategies.In("fast")})
    for options in ({"label_selector": {"disk": "fast"}}, {"scheduling_strategy": hard}):
        with pytest.raises(hpcray.exceptions.GetTimeoutError):
            hpcray.get(f.options(**options).remote(), timeout=0.3)
    assert hpcray.get(f.options(label_selector={"disk": "!fast"}).remote(), timeout=60)


def test_labels_of_wrong_form_in_strategies_are_refused(strategies):
    label, within = strategies.NodeLabelSchedulingStrategy, strategies.In
    refused(
        ValueError,
        "",
        lambda: label({}),
        lambda: label(None),
        lambda: label([1]),
        lambda: label({"a": "b"}),
        lambda: label({5: within("b")}),
        lambda: label({"a": within("b")}, soft=5),
        within,
        lambda: within(5),
    )


@pytest.mark.beyond_ray("Ray waits, as its cluster might grow")
def test_what_no_node_could_run_fails_where_that_is_asked_for(own_init, monkeypatch):
    monkeypatch.setenv("HPCRAY_FAIL_INFEASIBLE", "1")
    hpcray = own_init
    hpcray.init(num_cpus=1)

    @hpcray.remote(num_cpus=64)
    def large():
        return None

    @hpcray.remote(resources={"licence": 1})
    class Licensed:
        def call(self):
            return None

    with pytest.raises(hpcray.exceptions.TaskUnschedulableError, match=r"needs .*64.* no node of this job"):
        hpcray.get(large.remote(), timeout=30)
    with pytest.raises(hpcray.exceptions.ActorUnschedulableError, match="licence"):
        hpcray.get(Licensed.remote().call.remote(), timeout=30)
