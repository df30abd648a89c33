"""Resources: what the job has, what is free, and that tasks never take more."""

import os

import pytest

INIT = {"num_cpus": 2, "resources": {"licence": 1}, "num_gpus": 0}
pytestmark = pytest.mark.usefixtures("ray_start")


def test_cluster_resources_are_numbers_by_name(hpcray):
    resources = hpcray.cluster_resources()
    assert resources["CPU"] == 2.0
    assert resources["licence"] == 1.0
    assert {"memory", "object_store_memory"} <= set(resources)
    assert all(isinstance(amount, float) for amount in resources.values())


def test_each_node_tells_its_id_host_state_and_resources(hpcray):
    [node] = hpcray.nodes()
    assert len(node["NodeID"]) == 56
    assert node["Alive"] is True
    assert node["NodeManagerHostname"] == os.uname().nodename
    assert isinstance(node["NodeManagerAddress"], str)
    assert node["Resources"]["CPU"] == 2.0
    assert isinstance(node["Labels"], dict)


def test_available_resources_fall_while_tasks_run_and_return(hpcray, gate, wait_until):
    @hpcray.remote(num_cpus=1.5, resources={"licence": 0.5})
    def hold():
        gate.wait()

    def free():
        available = hpcray.available_resources()
        return available.get("CPU", 0.0), available.get("licence", 0.0)

    wait_until(lambda: free() == (2.0, 1.0), on_timeout=free)
    ref = hold.remote()
    wait_until(lambda: free() == (0.5, 0.5), on_timeout=free)
    gate.open()
    hpcray.get(ref)
    wait_until(lambda: free() == (2.0, 1.0), on_timeout=free)


def test_a_custom_resource_limits_how_many_run_at_once(hpcray, tmp_path):
    occupied = tmp_path / "occupied"

    @hpcray.remote(num_cpus=0, resources={"licence": 1})
    def alone():
        occupied.mkdir()  # fails if another task is here
        occupied.rmdir()

    hpcray.get([alone.remote() for _ in range(20)])


def test_tasks_without_cpus_run_while_all_cpus_are_taken(hpcray, gate, wait_until):
    @hpcray.remote(num_cpus=2)
    def hold():
        gate.wait()

    @hpcray.remote(num_cpus=0)
    def light():
        return 1

    holding = hold.remote()
    wait_until(lambda: gate.arrived() == 1)
    assert hpcray.get(light.remote(), timeout=60) == 1
    gate.open()
    hpcray.get(holding)


def test_fractions_of_a_cpu_add_up(hpcray, gate, wait_until):
    @hpcray.remote(num_cpus=0.5)
    def half():
        gate.wait()

    refs = [half.remote() for _ in range(5)]
    wait_until(lambda: gate.arrived() == 4)
    assert hpcray.available_resources().get("CPU", 0.0) == 0.0
    gate.open()
    hpcray.get(refs)
    assert gate.arrived() == 5


def test_a_task_that_asks_for_more_than_there_is_waits_and_get_times_out(hpcray):
    @hpcray.remote(num_cpus=100)
    def impossible():
        return 1

    with pytest.raises(hpcray.exceptions.GetTimeoutError):
        hpcray.get(impossible.remote(), timeout=0.2)


def test_an_actor_holds_the_resources_it_asked_for_until_it_ends(hpcray, wait_until):
    @hpcray.remote(num_cpus=1, resources={"licence": 1})
    class Holder:
        def ready(self):
            return True

    def free():
        available = hpcray.available_resources()
        return available.get("CPU", 0.0), available.get("licence", 0.0)

    holder = Holder.remote()
    assert hpcray.get(holder.ready.remote())
    wait_until(lambda: free() == (1.0, 0.0), on_timeout=free)
    hpcray.kill(holder)
    wait_until(lambda: free() == (2.0, 1.0), on_timeout=free)
