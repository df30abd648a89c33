"""Starting and stopping a job from plain Python: arguments, repetition, sessions one after the other."""

import importlib
import os

import pytest

beyond_ray = pytest.mark.beyond_ray
ON_RAY = os.environ.get("HPCRAY_TEST_IMPL") == "ray"


def test_before_init_nothing_runs_and_shutdown_is_harmless(own_init):
    hpcray = own_init
    assert not hpcray.is_initialized()
    hpcray.shutdown()
    assert not hpcray.is_initialized()


def test_a_second_init_raises_unless_told_to_ignore_it(own_init):
    hpcray = own_init
    hpcray.init(num_cpus=1)
    assert hpcray.is_initialized()

    with pytest.raises(RuntimeError, match="ignore_reinit_error"):
        hpcray.init(num_cpus=1)

    hpcray.init(num_cpus=3, ignore_reinit_error=True)
    assert hpcray.cluster_resources()["CPU"] == 1, "the job that runs is kept as it is"


def test_the_with_form_shuts_down_at_the_end_even_after_an_error(own_init):
    hpcray = own_init

    def use():
        with hpcray.init(num_cpus=1):
            assert hpcray.is_initialized()
            assert hpcray.get(hpcray.put(5)) == 5
            raise KeyError("in the body")

    with pytest.raises(KeyError, match="in the body"):
        use()
    assert not hpcray.is_initialized()


def test_a_second_session_has_its_own_resources_and_knows_the_functions_and_classes_of_the_first(own_init):
    hpcray = own_init

    @hpcray.remote
    def double(x):
        return 2 * x

    @hpcray.remote
    class Keeper:
        def __init__(self, value):
            self.value = value

        def read(self):
            return self.value

    hpcray.init(num_cpus=1, resources={"licence": 2}, num_gpus=1)
    first = hpcray.cluster_resources()
    assert (first["CPU"], first["licence"], first["GPU"]) == (1, 2, 1)
    assert hpcray.get(double.remote(4)) == 8
    assert hpcray.get(Keeper.remote(1).read.remote()) == 1
    hpcray.shutdown()
    assert not hpcray.is_initialized()

    hpcray.init(num_cpus=3)
    second = hpcray.cluster_resources()
    assert second["CPU"] == 3
    assert "licence" not in second
    assert "GPU" not in second
    assert hpcray.get(double.remote(5)) == 10
    assert hpcray.get(Keeper.remote(2).read.remote()) == 2


def test_a_ref_of_an_earlier_session_is_an_error_at_once(own_init):
    hpcray = own_init
    hpcray.init(num_cpus=1)
    old = hpcray.put("of the first session")
    hpcray.shutdown()
    hpcray.init(num_cpus=1)
    with pytest.raises((ValueError, hpcray.exceptions.RayError)) as caught:
        hpcray.get(old, timeout=20)
    assert not isinstance(caught.value, TimeoutError)


@pytest.mark.parametrize("first_use", ["task", "actor", "put", "context"])
def test_the_first_use_starts_a_local_job(own_init, first_use):
    hpcray = own_init

    @hpcray.remote
    def one():
        return 1

    @hpcray.remote
    class One:
        def one(self):
            return 1

    assert not hpcray.is_initialized(), "decorating is not yet a use"
    if first_use == "task":
        assert hpcray.get(one.remote()) == 1
    elif first_use == "actor":
        assert hpcray.get(One.remote().one.remote()) == 1
    elif first_use == "put":
        assert hpcray.get(hpcray.put(1)) == 1
    else:
        assert hpcray.get_runtime_context().get_job_id()
    assert hpcray.is_initialized()


@pytest.mark.parametrize("question", ["nodes", "cluster_resources", "available_resources"])
def test_asking_what_the_job_has_is_an_error_without_a_job(own_init, question):
    hpcray = own_init
    with pytest.raises(hpcray.exceptions.RaySystemError):
        getattr(hpcray, question)()
    assert not hpcray.is_initialized()


def test_the_node_has_the_labels_that_init_gives_it_and_those_of_its_own(own_init):
    hpcray = own_init
    hpcray.init(num_cpus=1, labels={"rack": "7", "ray.io/market-type": "spot"})
    [node] = hpcray.nodes()
    assert (
        node["Labels"].items() >= {"rack": "7", "ray.io/market-type": "spot", "ray.io/node-id": node["NodeID"]}.items()
    )
    if not ON_RAY:
        assert node["Labels"].items() >= {"hpcray/rank": "0", "hpcray/hostname": os.uname().nodename}.items()


@pytest.mark.beyond_ray("variables of its own")
def test_the_environment_says_what_init_leaves_open(own_init, monkeypatch):
    hpcray = own_init
    monkeypatch.setenv("HPCRAY_NUM_CPUS", "3")
    monkeypatch.setenv("HPCRAY_NUM_GPUS", "1")
    monkeypatch.setenv("HPCRAY_RESOURCES", '{"licence": 2}')
    monkeypatch.setenv("HPCRAY_LABELS", "rack=7")
    hpcray.init(num_gpus=2, resources={"disk": 1})
    total = hpcray.cluster_resources()
    assert (total["CPU"], total["GPU"], total["licence"], total["disk"]) == (3, 2, 2, 1)
    assert hpcray.nodes()[0]["Labels"]["rack"] == "7"
    hpcray.shutdown()
    monkeypatch.setenv("HPCRAY_NUM_CPUS", "many")
    with pytest.raises(ValueError, match="HPCRAY_NUM_CPUS"):
        hpcray.init()


def test_the_store_has_the_size_that_init_asks_for(own_init):
    hpcray = own_init
    hpcray.init(num_cpus=1, object_store_memory=100 * 1024 * 1024, namespace="study")
    assert hpcray.cluster_resources()["object_store_memory"] == 100 * 1024 * 1024
    assert hpcray.get_runtime_context().namespace == "study"


def test_address_local_starts_a_job_of_its_own(own_init):
    hpcray = own_init
    hpcray.init(address="local", num_cpus=2)
    assert hpcray.cluster_resources()["CPU"] == 2


def test_address_auto_without_a_running_job_is_a_connection_error(own_init):
    hpcray = own_init
    if not ON_RAY and importlib.import_module("hpcray.launcher.attach").running_jobs():
        pytest.skip("this user has a job on this host")
    with pytest.raises(ConnectionError):
        hpcray.init(address="auto")
    assert not hpcray.is_initialized()


@pytest.mark.parametrize(
    ("arguments", "errors", "named"),
    [
        ({"num_cpus": -1}, ValueError, "CPU"),
        ({"num_gpus": -1}, ValueError, "GPU"),
        ({"num_cpus": "two"}, (TypeError, AssertionError), "CPU|num_cpus"),
        pytest.param({"num_cpus": float("nan")}, ValueError, "num_cpus", marks=beyond_ray("names the argument")),
        pytest.param({"num_gpus": 0.5}, ValueError, "num_gpus", marks=beyond_ray("names the argument")),
        ({"resources": {"licence": -1}}, ValueError, "licence"),
        ({"resources": {"licence": float("nan")}}, ValueError, "licence|NaN"),
        pytest.param({"resources": {"": 1}}, ValueError, "name", marks=beyond_ray("refused")),
        pytest.param({"labels": {"a b": "c"}}, ValueError, "a b", marks=beyond_ray("refused")),
        pytest.param({"labels": {"a": 1}}, ValueError, "'a'", marks=beyond_ray("names the label")),
        ({"labels": 3}, (TypeError, AttributeError, ValueError), "."),
        ({"resources": {"CPU": 1}}, (ValueError, AssertionError), "num_cpus"),
        ({"resources": 3}, TypeError, "."),
        ({"object_store_memory": 1}, ValueError, "1 "),
        ({"object_store_memory": -1}, ValueError, "-1"),
        ({"object_store_memory": 10**15}, ValueError, "memory"),
        ({"namespace": ""}, ValueError, "namespace"),
        ({"namespace": 3}, TypeError, "namespace"),
        ({"address": "no such address"}, ValueError, "no such address"),
        ({"numcpus": 1}, (RuntimeError, TypeError), "numcpus"),
    ],
    ids=str,
)
def test_a_wrong_argument_names_itself_and_starts_nothing(own_init, arguments, errors, named):
    hpcray = own_init
    with pytest.raises(errors, match=named):
        hpcray.init(**arguments)
    assert not hpcray.is_initialized()


def test_init_inside_a_task_raises_unless_told_to_ignore_it(own_init):
    hpcray = own_init
    hpcray.init(num_cpus=1)

    @hpcray.remote
    def inside():
        try:
            hpcray.init()
        except RuntimeError:
            hpcray.init(ignore_reinit_error=True)
            return hpcray.is_initialized()
        return None

    assert hpcray.get(inside.remote()) is True


def test_what_libraries_tell_rays_own_daemons_is_taken(own_init):
    own_init.init(num_cpus=1, include_dashboard=False, _redis_password="secret", _memory=10**9, _temp_dir=None)
    assert own_init.is_initialized()
