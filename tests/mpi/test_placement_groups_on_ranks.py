"""Placement groups on real ranks: `mpirun -n {2,4} python -m pytest --with-mpi tests/mpi`.

Where ranks share a host, rank 0 offers no CPUs once there is another.
"""

from __future__ import annotations

import time
from typing import Any

import pytest

import hpcray
from hpcray.exceptions import ActorDiedError, TaskPlacementGroupRemoved, WorkerCrashedError
from hpcray.util import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from hpcray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as Inside

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.hpcray(num_cpus=2, object_store_memory=64 << 20),
    pytest.mark.usefixtures("nothing_left_behind", "hpcray_job"),
]
CPUS_OF_A_NODE = 2


@hpcray.remote
def here() -> str:
    return hpcray.get_runtime_context().get_node_id()


@hpcray.remote(max_retries=0)
def sleep() -> None:
    time.sleep(600)


@hpcray.remote(num_cpus=1)
class Resident:
    def where(self) -> str:
        return hpcray.get_runtime_context().get_node_id()


def nodes_with_cpus() -> list[str]:
    return [node["NodeID"] for node in hpcray.nodes() if node["Resources"].get("CPU")]


def created(bundles: list[dict[str, float]], strategy: str) -> PlacementGroup:
    group = placement_group(bundles, strategy=strategy)
    assert group.wait(60), placement_group_table(group)
    return group


def places(group: PlacementGroup) -> list[str]:
    """Where a task finds each bundle to be, which is where the table says."""
    count = group.bundle_count
    refs = [here.options(num_cpus=0.01, scheduling_strategy=Inside(group, i)).remote() for i in range(count)]
    found = hpcray.get(refs, timeout=60)
    assert found == list(placement_group_table(group)["bundles_to_node_id"].values())
    return found


def free() -> float:
    return hpcray.available_resources().get("CPU", 0.0)


@pytest.fixture
def everything() -> float:
    """All CPUs of the job."""
    return hpcray.cluster_resources()["CPU"]


@pytest.mark.parametrize("strategy", ["SPREAD", "STRICT_SPREAD"])
def test_spread_bundles_are_on_different_nodes(strategy: str) -> None:
    nodes = nodes_with_cpus()
    assert sorted(places(created([{"CPU": 1}] * len(nodes), strategy))) == sorted(nodes)


@pytest.mark.parametrize("strategy", ["PACK", "STRICT_PACK"])
def test_packed_bundles_are_on_one_node(strategy: str) -> None:
    for _ in nodes_with_cpus():
        assert len(set(places(created([{"CPU": 1.5}, {"CPU": 0.5}], strategy)))) == 1


def test_a_group_larger_than_a_node_takes_several_or_waits(everything: float) -> None:
    nodes = nodes_with_cpus()
    group = created([{"CPU": 1}] * int(everything), "PACK")
    assert set(places(group)) == set(nodes)
    remove_placement_group(group)
    too_large = placement_group([{"CPU": 1}] * (CPUS_OF_A_NODE + 1), strategy="STRICT_PACK")
    too_many = placement_group([{"CPU": 1}] * (len(nodes) + 1), strategy="STRICT_SPREAD")
    assert not too_large.wait(0.3)
    assert not too_many.wait(0)


def test_a_removed_group_leaves_nothing(everything: float, wait_until: Any) -> None:
    group = created([{"CPU": 1}] * int(everything), "SPREAD")
    wait_until(lambda: free() == 0, on_timeout=free)
    running = [sleep.options(scheduling_strategy=Inside(group, i)).remote() for i in range(group.bundle_count - 1)]
    actor = Resident.options(scheduling_strategy=Inside(group, group.bundle_count - 1)).remote()
    hpcray.get(actor.where.remote(), timeout=60)
    waiting = [sleep.options(scheduling_strategy=Inside(group)).remote() for _ in range(50)]
    outside = [here.remote() for _ in range(20)]
    time.sleep(0.3)
    remove_placement_group(group)
    for ref in running:
        with pytest.raises(WorkerCrashedError):
            hpcray.get(ref, timeout=60)
    for ref in waiting:
        with pytest.raises(TaskPlacementGroupRemoved):
            hpcray.get(ref, timeout=60)
    with pytest.raises(ActorDiedError):
        hpcray.get(actor.where.remote(), timeout=60)
    hpcray.get(outside, timeout=60)
    wait_until(lambda: free() == everything, on_timeout=free)


def test_groups_compete_with_tasks_that_run_and_for_each_other(everything: float, wait_until: Any) -> None:
    tasks = [here.remote() for _ in range(200)]
    groups = [placement_group([{"CPU": 1}] * int(everything), strategy="SPREAD") for _ in range(5)]
    for group in groups:
        assert group.wait(60)
        assert set(places(group)) == set(nodes_with_cpus())
        remove_placement_group(group)
    hpcray.get(tasks, timeout=60)
    wait_until(lambda: free() == everything, on_timeout=free)


def test_many_tasks_run_in_any_bundle_of_any_node() -> None:
    nodes = nodes_with_cpus()
    group = created([{"CPU": 1}] * len(nodes), "STRICT_SPREAD")

    @hpcray.remote
    def slow() -> str:
        time.sleep(0.02)
        return hpcray.get_runtime_context().get_node_id()

    found = hpcray.get(
        [slow.options(scheduling_strategy=Inside(group)).remote() for _ in range(100)],
        timeout=60,
    )
    assert set(found) == set(nodes)


def test_actors_fill_the_bundles_of_all_nodes() -> None:
    nodes = nodes_with_cpus()
    group = created([{"CPU": 1}] * len(nodes), "STRICT_SPREAD")
    actors = [Resident.options(scheduling_strategy=Inside(group)).remote() for _ in nodes]
    assert sorted(hpcray.get([actor.where.remote() for actor in actors], timeout=60)) == sorted(nodes)


def test_fifty_groups_at_once(everything: float, wait_until: Any) -> None:
    strategies = ["PACK", "SPREAD", "STRICT_PACK"]
    groups = [placement_group([{"CPU": 0.01}] * 3, strategy=strategies[i % 3]) for i in range(50)]
    hpcray.get([group.ready() for group in groups], timeout=60)
    for group in groups[2::3]:
        assert len(set(places(group))) == 1
    for group in groups:
        remove_placement_group(group)
    wait_until(lambda: free() == everything, on_timeout=free)


def test_a_group_that_a_task_on_another_node_makes_and_another_removes(everything: float, wait_until: Any) -> None:
    @hpcray.remote(num_cpus=0, scheduling_strategy="SPREAD")
    def make() -> PlacementGroup:
        return placement_group([{"CPU": 1}])

    @hpcray.remote(num_cpus=0, scheduling_strategy="SPREAD")
    def remove(group: PlacementGroup) -> None:
        remove_placement_group(group)

    groups = [make.remote() for _ in range(20)]
    hpcray.get([remove.remote(group) for group in groups], timeout=60)
    for group in hpcray.get(groups, timeout=60):
        wait_until(lambda group=group: placement_group_table(group).get("state") == "REMOVED")
    wait_until(lambda: free() == everything, on_timeout=free)
