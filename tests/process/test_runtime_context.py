"""The runtime context: who am I, in the driver, in a task and in an actor."""

import pytest

INIT = {"num_cpus": 2, "namespace": "study"}
pytestmark = pytest.mark.usefixtures("ray_start")


@pytest.fixture
def identity():
    """``identity(context)`` is all by which a context names its place; it travels into tasks by value."""

    def identity(context):
        return {
            "job": context.get_job_id(),
            "node": context.get_node_id(),
            "worker": context.get_worker_id(),
            "task": context.get_task_id(),
            "actor": context.get_actor_id(),
            "namespace": context.namespace,
            "task_name": context.get_task_name(),
            "actor_name": context.get_actor_name(),
        }

    return identity


def is_id(text, digits):
    return len(text) == digits and int(text, 16) >= 0


def test_the_driver_has_a_job_a_node_and_a_worker_id_but_no_task_and_no_actor(hpcray, identity):
    me = identity(hpcray.get_runtime_context())
    assert is_id(me["job"], 8)
    assert is_id(me["worker"], 56)
    assert me["node"] == hpcray.nodes()[0]["NodeID"]
    assert me["namespace"] == "study"
    assert (me["task"], me["actor"], me["actor_name"]) == (None, None, None)


def test_a_task_knows_its_ids_and_its_name(hpcray, identity):
    @hpcray.remote
    def describe():
        return identity(hpcray.get_runtime_context())

    driver = identity(hpcray.get_runtime_context())
    first, second = hpcray.get([describe.remote(), describe.options(name="renamed").remote()])
    for shared in ("job", "node", "namespace"):
        assert first[shared] == second[shared] == driver[shared]
    assert is_id(first["worker"], 56)
    assert first["worker"] != driver["worker"]
    assert is_id(first["task"], 48)
    assert first["task"] != second["task"]
    assert first["actor"] is None
    assert first["task_name"].endswith("describe")
    assert second["task_name"] == "renamed"


def test_the_id_of_a_task_is_part_of_the_id_of_its_result(hpcray):
    @hpcray.remote
    def task_id():
        return hpcray.get_runtime_context().get_task_id()

    ref = task_id.remote()
    assert ref.task_id().hex() == hpcray.get(ref)


def test_a_task_knows_the_resources_it_was_given(hpcray):
    @hpcray.remote
    def resources():
        return hpcray.get_runtime_context().get_assigned_resources()

    assert hpcray.get(resources.remote()) == {"CPU": 1.0}
    assert hpcray.get(resources.options(num_cpus=0.5).remote()) == {"CPU": 0.5}


def test_an_actor_knows_its_id_its_name_and_its_handle(hpcray, identity):
    @hpcray.remote
    class Curious:
        def describe(self):
            context = hpcray.get_runtime_context()
            more = {
                "handle": context.current_actor,
                "restarted": context.was_current_actor_reconstructed,
                "resources": context.get_assigned_resources(),
            }
            return identity(context), more

    curious = Curious.options(name="curious").remote()
    (first, more), (second, _) = hpcray.get([curious.describe.remote(), curious.describe.remote()])
    assert is_id(first["actor"], 32)
    assert first["actor"] == second["actor"] == curious._actor_id.hex()
    assert first["worker"] == second["worker"]
    assert first["task"] != second["task"]
    assert first["actor_name"] == "curious"
    assert first["task_name"].endswith("Curious.describe")
    assert more == {"handle": curious, "restarted": False, "resources": {}}


def test_outside_an_actor_there_is_no_current_actor(hpcray):
    with pytest.raises(RuntimeError, match="actor"):
        _ = hpcray.get_runtime_context().current_actor


def test_an_actor_without_a_name_has_the_empty_name(hpcray):
    @hpcray.remote
    class Nameless:
        def name(self):
            return hpcray.get_runtime_context().get_actor_name()

    assert not hpcray.get(Nameless.remote().name.remote())


def test_the_context_as_a_dict_has_the_ids_that_exist(hpcray):
    @hpcray.remote
    def keys():
        return set(hpcray.get_runtime_context().get())

    assert {"job_id", "node_id", "namespace"} <= set(hpcray.get_runtime_context().get())
    assert {"job_id", "node_id", "namespace", "task_id"} <= hpcray.get(keys.remote())


def test_tasks_and_actors_see_an_initialised_job(hpcray):
    assert hpcray.get(hpcray.remote(lambda: hpcray.is_initialized()).remote()) is True
