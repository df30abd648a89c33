"""`ray.util.state`: what lives and waits. Ray keeps what is over, too; hpcray does not."""

import importlib
import os

import numpy as np
import psutil
import pytest

pytestmark = pytest.mark.usefixtures("ray_start")
ON_RAY = os.environ.get("HPCRAY_TEST_IMPL") == "ray"
INIT = {"num_cpus": 2, **({"include_dashboard": True} if ON_RAY else {})}
FORGETS = pytest.mark.beyond_ray("Ray lists what is over, late")


@pytest.fixture
def state(hpcray, monkeypatch):
    if ON_RAY:  # which would otherwise look for any Ray on this host
        monkeypatch.setenv("RAY_ADDRESS", hpcray.get_runtime_context().gcs_address)
    return importlib.import_module(f"{hpcray.__name__}.util.state")


def states_of(state, name, **more):
    found = state.list_tasks(filters=[("name", "=", name)], **more)
    return sorted(one.state for one in found if one.state not in ("FINISHED", "FAILED"))


def test_tasks_wait_for_arguments_for_room_and_run(hpcray, state, gate, wait_until):
    @hpcray.remote(name="task_of_this_test")
    def task(x=None):
        gate.wait()

    refs = [task.remote() for _ in range(3)]
    refs.append(task.remote(refs[0]))
    wait_until(
        lambda: (
            states_of(state, "task_of_this_test")
            == ["PENDING_ARGS_AVAIL", "PENDING_NODE_ASSIGNMENT", "RUNNING", "RUNNING"]
        )
    )
    running = state.list_tasks(filters=[("name", "=", "task_of_this_test"), ("state", "=", "running")], detail=True)
    assert len(running) == 2
    for one in running:
        assert one.type == "NORMAL_TASK"
        assert one.job_id == hpcray.get_runtime_context().get_job_id()
        assert one.node_id == hpcray.get_runtime_context().get_node_id()
        assert one.required_resources == {"CPU": 1.0}
        assert psutil.pid_exists(one.worker_pid)
        assert one["state"] == one.state
    assert len(state.list_tasks(filters=[("name", "=", "task_of_this_test")], limit=1)) == 1
    counts = state.summarize_tasks()["cluster"]["summary"]
    assert any(entry["state_counts"].get("RUNNING") == 2 for entry in counts.values())
    if not ON_RAY:
        assert state.get_task(refs[3]).state == "PENDING_ARGS_AVAIL"
        assert state.get_task(running[0].task_id).state == "RUNNING"
    gate.open()
    hpcray.get(refs)


@pytest.mark.beyond_ray("Ray 2.60 does not say so within 30 s")
def test_a_task_that_waits_in_get_says_so(hpcray, state, gate, wait_until):
    @hpcray.remote(num_cpus=0, name="inner_of_this_test")
    def inner():
        gate.wait()

    @hpcray.remote(name="outer_of_this_test")
    def outer():
        hpcray.get(inner.remote())

    ref = outer.remote()
    wait_until(lambda: states_of(state, "outer_of_this_test") == ["RUNNING_IN_RAY_GET"])
    gate.open()
    hpcray.get(ref)


@FORGETS
def test_what_is_over_is_forgotten(hpcray, state, wait_until):
    @hpcray.remote
    def short():
        return 1

    @hpcray.remote
    class Short:
        def run(self):
            return 1

    ref = short.remote()
    hpcray.get(ref)
    actor = Short.remote()
    hpcray.get(actor.run.remote())
    hpcray.kill(actor)
    wait_until(lambda: state.list_tasks() == [] and state.list_actors() == [])
    assert state.get_task(ref) is None


def test_calls_of_an_actor_wait_for_each_other(hpcray, state, gate, wait_until):
    @hpcray.remote
    class Actor:
        def work(self):
            gate.wait()

    actor = Actor.options(name="the actor").remote()
    refs = [actor.work.remote() for _ in range(2)]

    def calls():
        return [
            one
            for one in state.list_tasks(filters=[("type", "=", "ACTOR_TASK")])
            if one.name == "Actor.work" and one.state not in ("FINISHED", "FAILED")
        ]

    wait_until(lambda: "RUNNING" in [one.state for one in calls()] and len(calls()) == 2)
    [one] = state.list_actors(filters=[("name", "=", "the actor"), ("state", "!=", "DEAD")], detail=True)
    assert one.class_name.endswith("Actor")
    assert one.state == "ALIVE"
    assert one.ray_namespace == hpcray.get_runtime_context().namespace
    assert one.is_detached is False
    assert psutil.pid_exists(one.pid)
    assert state.get_actor(one.actor_id).name == "the actor"
    assert {call.actor_id for call in calls()} == {one.actor_id}
    assert state.summarize_actors()["cluster"]["total_actors"] >= 1
    gate.open()
    hpcray.get(refs)


def test_actors_that_wait_say_for_what(hpcray, state, gate, wait_until):
    @hpcray.remote
    class Waiting:
        def __init__(self, x=None):
            pass

    @hpcray.remote
    def slow():
        gate.wait()

    def states():
        found = state.list_actors(filters=[("state", "!=", "DEAD")])
        return sorted(one.state for one in found if one.class_name.endswith("Waiting"))

    impossible = Waiting.options(num_cpus=100).remote()
    late = Waiting.remote(slow.remote())
    wait_until(lambda: states() == ["DEPENDENCIES_UNREADY", "PENDING_CREATION"])
    gate.open()
    del impossible, late


def test_objects_nodes_processes_and_jobs_are_listed(hpcray, state, wait_until):
    @hpcray.remote
    def pid():
        return os.getpid()

    worker = hpcray.get(pid.remote())
    ref = hpcray.put(np.ones(500_000))

    def found():
        return [one for one in state.list_objects() if one.object_id == ref.hex()]

    wait_until(found)
    assert 4_000_000 <= found()[0].object_size < 4_100_000
    assert found()[0].reference_type in ("LOCAL_REFERENCE", "PINNED_IN_MEMORY")
    [node] = state.list_nodes()
    assert (node.state, node.is_head_node) == ("ALIVE", True)
    assert node.node_id == hpcray.get_runtime_context().get_node_id()
    assert node.resources_total["CPU"] == 2
    assert state.get_node(node.node_id).node_id == node.node_id
    processes = {one.pid: one for one in state.list_workers()}
    assert processes[os.getpid()].worker_type == "DRIVER"
    assert processes[worker].worker_type == "WORKER"
    assert processes[worker].is_alive
    [job] = [job for job in state.list_jobs() if job.job_id == hpcray.get_runtime_context().get_job_id()]
    assert (job.type, job.status) == ("DRIVER", "RUNNING")
    assert state.summarize_objects()["cluster"]["total_objects"] >= 1


def test_placement_groups_are_listed(hpcray, state, wait_until):
    group = hpcray.util.placement_group([{"CPU": 1}], name="of this test")
    assert group.wait(30)
    [one] = state.list_placement_groups(filters=[("name", "=", "of this test"), ("state", "=", "CREATED")], detail=True)
    assert one.placement_group_id == group.id.hex()
    assert one.bundles[0]["unit_resources"]["CPU"] == 1
    assert state.get_placement_group(group.id.hex()).state == "CREATED"
    hpcray.util.remove_placement_group(group)


def test_wrong_filters_are_refused(state):
    for filters in ([("state", "<", 1)], [("state", "=")]):
        with pytest.raises(Exception, match=r"filter|predicate|unpack"):
            state.list_tasks(filters=filters)


@pytest.mark.beyond_ray("Ray asks other clusters by their dashboard")
def test_a_field_that_there_is_not_and_another_job_are_refused(state):
    with pytest.raises(ValueError, match="TaskState has no field 'colour'"):
        state.list_tasks(filters=[("colour", "=", "red")])
    with pytest.raises(ValueError, match="address"):
        state.list_tasks(address="http://somewhere:8265")
