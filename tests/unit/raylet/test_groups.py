"""Placement groups on raylets: bundles set aside and returned, who waits, and removal in the midst of everything."""

from __future__ import annotations

from typing import Any

import pytest

from hpcray import ids, payload
from hpcray.protocol import messages as m
from hpcray.raylet import groups as module
from hpcray.raylet.pool import LOOK_SECONDS
from hpcray.resources import UNIT
from hpcray.testing.cluster import NONCE, Cluster
from hpcray.testing.process import Process

CPU = {"CPU": UNIT}
HALF = {"CPU": UNIT // 2}
SHORT, LONG = 0.0001, 1.0


def started(*cpus: int, **options: Any) -> tuple[Cluster, Process]:
    cluster = Cluster(cpus, **options)
    return cluster, cluster.add_driver()


def created(cluster: Cluster, driver: Process, *bundles: dict[str, int], strategy: str = "PACK") -> bytes:
    """A group that has its bundles."""
    group = driver.create_group(bundles or [CPU], strategy)
    cluster.run()
    assert state_of(cluster, group) == "created"
    return group


def state_of(cluster: Cluster, group: bytes) -> str:
    gcs = cluster.ranks[0].gcs
    assert gcs is not None
    return gcs.groups.groups[group].state if group in gcs.groups.groups else "gone"


def in_group(cluster: Cluster, driver: Process, group: bytes, bundle: int = -1, **fields: Any) -> bytes:
    """A class of tasks (with `actor=…` of actors) in a group."""
    return cluster.template(driver, f"f{group.hex()}{bundle}{fields}", group=group, bundle=bundle, **fields)


def actor_in(cluster: Cluster, driver: Process, group: bytes, **fields: Any) -> bytes:
    template = in_group(cluster, driver, group, num_returns=0, actor=m.ActorOptions(), **fields)
    return driver.create_actor(template)


def error_of(cluster: Cluster, driver: Process, ref: bytes) -> str:
    """The kind of error that getting an object ends with; empty for a value."""
    driver.get([ref])
    cluster.run()
    assert ref in driver.values, "it waits for ever"
    return payload.describe_system_error(driver.errors[ref])[0] if ref in driver.errors else ""


def is_clean(cluster: Cluster) -> None:
    for node in cluster.ranks:
        ledger = node.core.ledger
        assert ledger.free == ledger.total
        assert not ledger.groups
        assert not node.core.pool.ready
        assert not node.core.pool.leases


# ----------------------------------------------------------------------------------------------------------------- bundles
def test_bundles_are_set_aside_and_come_back():
    cluster, driver = started(2, 2)
    group = created(cluster, driver, CPU, HALF, CPU, strategy="SPREAD")
    free = [node.core.ledger.free["CPU"] for node in cluster.ranks]
    assert sum(free) == 15_000
    assert min(free) >= UNIT // 2
    driver.remove_group(group)
    cluster.run()
    assert state_of(cluster, group) == "gone"
    is_clean(cluster)


def test_a_raylet_that_has_started_something_meanwhile_refuses_and_the_group_waits():
    cluster, _ = started(1)
    node = cluster.ranks[0]
    node.core.groups.on_reserve(m.ReserveBundles(b"g", {0: CPU}))
    assert node.core.ledger.free == {"CPU": 0}
    node.core.groups.on_reserve(m.ReserveBundles(b"h", {0: HALF, 1: CPU}))
    assert list(node.core.ledger.groups) == [b"g"]
    node.core.groups.on_return(m.ReturnBundles(b"g", []))
    node.core.groups.on_return(m.ReturnBundles(b"h", []))
    is_clean(cluster)


def test_a_task_that_is_started_while_the_reservation_travels_has_the_place():
    cluster, driver = started(0, 1)
    template = cluster.template(driver, "f")
    group = driver.create_group([CPU])
    ref = driver.submit(template)[0]
    held = ("rank", 0, 1)
    cluster.run(hold=[held])
    cluster.run()  # whichever was sent first has the place
    assert (state_of(cluster, group) == "created") != bool(cluster.running)
    if cluster.running:
        cluster.running[0].finish()
        cluster.run()
        assert state_of(cluster, group) == "created"
    driver.remove_group(group)
    cluster.run()
    for running in cluster.running:
        running.finish()
    assert error_of(cluster, driver, ref) == ""
    assert cluster.ranks[1].core.ledger.free == CPU


# ------------------------------------------------------------------------------------------------------------------ waiting
def test_who_waits_hears_of_the_creation():
    cluster, driver = started(1, 1)
    group = driver.create_group([CPU, CPU], "STRICT_SPREAD")
    refs = [driver.await_group(group) for _ in range(2)]
    assert [error_of(cluster, driver, ref) for ref in refs] == ["", ""]
    assert error_of(cluster, driver, driver.await_group(group)) == ""
    assert not cluster.ranks[0].core.groups.awaited


def test_who_waits_for_a_group_without_room_hears_of_its_removal():
    cluster, driver = started(1)
    group = driver.create_group([{"CPU": 2 * UNIT}])
    ref = driver.await_group(group)
    cluster.run()
    assert ref not in driver.values
    driver.remove_group(group)
    assert error_of(cluster, driver, ref) == "TaskPlacementGroupRemoved"
    assert error_of(cluster, driver, driver.await_group(group)) == "TaskPlacementGroupRemoved"


def test_who_has_let_go_of_its_reference_is_forgotten_when_the_group_comes():
    cluster, driver = started(1)
    blocker = created(cluster, driver, CPU)
    group = driver.create_group([CPU])
    driver.release([driver.await_group(group)])
    cluster.run()
    driver.remove_group(blocker)
    cluster.run()
    assert state_of(cluster, group) == "created"
    assert not cluster.ranks[0].core.table.entries


# -------------------------------------------------------------------------------------------------------------- what runs
def test_tasks_wait_for_their_group_and_run_in_it():
    cluster, driver = started(1, 1)
    group = driver.create_group([CPU, CPU], "STRICT_SPREAD")
    refs = [driver.submit(in_group(cluster, driver, group, bundle))[0] for bundle in (0, 1, -1, -1)]
    cluster.run()
    assert {worker.rank for worker in cluster.running} == {0, 1}
    while cluster.running:
        cluster.running[0].finish()
        cluster.run()
    assert [error_of(cluster, driver, ref) for ref in refs] == [""] * 4


def test_a_blocked_task_lends_its_bundle_to_others_of_the_group_only():
    cluster, driver = started(1)
    group = created(cluster, driver, CPU)
    template = in_group(cluster, driver, group)
    outer = driver.submit(template)[0]
    outside = driver.submit(cluster.template(driver, "outside"))[0]
    cluster.run()
    [parent] = cluster.running
    inner = parent.submit(parent.define(template, cluster.ranks[0].core.template(template)))
    parent.get(inner)
    cluster.run()
    [child] = cluster.running
    assert child is not parent
    child.finish()
    cluster.run()
    parent.finish()
    assert error_of(cluster, driver, outer) == ""
    assert outside not in driver.values
    driver.remove_group(group)
    cluster.run()
    cluster.running[0].finish()
    assert error_of(cluster, driver, outside) == ""


def test_an_actor_lives_in_its_bundle_and_leaves_it_free():
    cluster, driver = started(1)
    group = created(cluster, driver, CPU)
    actor = actor_in(cluster, driver, group)
    cluster.run()
    cluster.running[0].finish()
    call = driver.call(actor)[0]
    task = driver.submit(in_group(cluster, driver, group))[0]
    cluster.run()
    cluster.running[0].finish()
    assert error_of(cluster, driver, call) == ""
    assert task not in driver.values
    driver.release([call, ids.object_id(actor, 0)])
    cluster.run()
    cluster.running[0].finish()
    assert error_of(cluster, driver, task) == ""


# ----------------------------------------------------------------------------------------------------------------- removal
def test_removal_with_tasks_that_run_wait_and_follow_others_on_one_worker():
    cluster, driver = started(1)
    group = created(cluster, driver, CPU)
    template = in_group(cluster, driver, group)
    refs = [driver.submit(template)[0] for _ in range(30)]
    cluster.run()
    cluster.running[0].finish(seconds=SHORT)
    cluster.run()
    assert cluster.running[0].inbox  # some lie at the worker
    driver.remove_group(group)
    kinds = [error_of(cluster, driver, ref) for ref in refs]
    assert kinds == ["", "WorkerCrashedError"] + ["TaskPlacementGroupRemoved"] * 28
    is_clean(cluster)


@pytest.mark.parametrize("retries", [0, 3])
def test_removal_with_tasks_of_another_home(retries):
    cluster, driver = started(0, 1)
    group = created(cluster, driver, CPU)
    template = in_group(cluster, driver, group, max_retries=retries)
    refs = [driver.submit(template)[0] for _ in range(30)]
    cluster.run()
    cluster.running[0].finish(seconds=SHORT)
    cluster.run()
    driver.remove_group(group)
    kinds = [error_of(cluster, driver, ref) for ref in refs]
    assert kinds[0] == ""
    assert kinds[1] == ("TaskPlacementGroupRemoved" if retries else "WorkerCrashedError")
    assert set(kinds[2:]) == {"TaskPlacementGroupRemoved"}
    is_clean(cluster)


def test_removal_that_overtakes_a_task_on_its_way():
    cluster, driver = started(0, 1, 1)
    maker = cluster.ranks[0].gcs
    assert maker is not None
    group = created(cluster, driver, CPU)
    on = maker.groups.groups[group].placed[0]
    # The home is another rank than the GCS's and the bundle's.
    home = 3 - on
    parent = driver.submit(cluster.template(driver, "parent", node=home))[0]
    cluster.run()
    worker = cluster.worker_on(home)
    template = in_group(cluster, worker, group)
    ref = worker.submit(template)[0]
    held = ("rank", home, on)
    cluster.run(hold=[held])
    assert held in cluster.links  # Execute
    driver.remove_group(group)
    cluster.run(hold=[held])
    worker.get([ref])
    cluster.run()
    assert payload.describe_system_error(worker.errors[ref])[0] == "TaskPlacementGroupRemoved"
    worker.finish()
    assert error_of(cluster, driver, parent) == ""
    is_clean(cluster)


def test_removal_with_tasks_whose_arguments_are_not_there():
    cluster, driver = started(1, 1)
    group = created(cluster, driver, CPU)
    argument = driver.submit(cluster.template(driver, "g"))[0]
    ref = driver.submit(in_group(cluster, driver, group), [argument])[0]
    cluster.run()
    driver.remove_group(group)
    cluster.run()
    assert ref not in driver.values
    cluster.running[0].finish()
    assert error_of(cluster, driver, ref) == "TaskPlacementGroupRemoved"


def test_removal_with_a_blocked_task_frees_the_bundle_when_its_worker_is_gone():
    cluster, driver = started(1)
    group = created(cluster, driver, CPU)
    ref = driver.submit(in_group(cluster, driver, group))[0]
    never = driver.submit(cluster.template(driver, "g"))[0]
    cluster.run()
    [worker] = cluster.running
    worker.get([never])
    cluster.run()
    ledger = cluster.ranks[0].core.ledger
    up = ("up", 0, worker.number)
    driver.remove_group(group)
    cluster.run(hold=[up])
    assert ledger.free == {"CPU": 0}  # the process has not ended
    cluster.run()
    assert error_of(cluster, driver, ref) == "WorkerCrashedError"
    assert [one.running is not None for one in cluster.workers] == [True]  # g


def test_removal_ends_an_actor_and_what_it_was_called_for():
    cluster, driver = started(1, 1)
    group = created(cluster, driver, CPU)
    actor = actor_in(cluster, driver, group)
    cluster.run()
    cluster.running[0].finish()
    calls = [driver.call(actor)[0] for _ in range(3)]
    cluster.run()
    driver.remove_group(group)
    assert [error_of(cluster, driver, call) for call in calls] == ["ActorDiedError"] * 3
    assert error_of(cluster, driver, driver.call(actor)[0]) == "ActorDiedError"
    is_clean(cluster)


def test_removal_ends_an_actor_that_waits_for_its_bundle():
    cluster, driver = started(1)
    group = created(cluster, driver, CPU)
    task = driver.submit(in_group(cluster, driver, group))[0]
    cluster.run()
    actor = actor_in(cluster, driver, group)
    call = driver.call(actor)[0]
    cluster.run()
    assert call not in driver.values
    driver.remove_group(group)
    assert error_of(cluster, driver, call) == "ActorUnschedulableError"
    assert error_of(cluster, driver, task) == "WorkerCrashedError"
    is_clean(cluster)


def test_removal_that_overtakes_an_actor_on_its_way():
    cluster, driver = started(0, 1)
    group = created(cluster, driver, CPU)
    actor = ids.task_id(ids.client_prefix(0, NONCE, 9), 1)
    # The home sends the creation when the bundle is gone, as if the GCS's choice had reached it late.
    driver.remove_group(group)
    cluster.run()
    template = in_group(cluster, driver, group, num_returns=0, actor=m.ActorOptions())
    cluster.run()
    core = cluster.ranks[0].core
    core.push_definitions(1, template)
    core.send(1, m.StartActor(actor, 1, template, b"", []))
    cluster.ranks[0].end_turn()
    cluster.run()
    assert not cluster.ranks[1].core.hosted.actors
    is_clean(cluster)


def test_of_groups_that_were_removed_long_ago_the_gcs_is_asked_again(monkeypatch):
    monkeypatch.setattr(module, "REMEMBERED", 2)
    cluster, driver = started(1, 1)
    groups = [created(cluster, driver, CPU) for _ in range(2)]
    groups += [driver.create_group([CPU]) for _ in range(2)]
    for group in groups:
        driver.remove_group(group)
    cluster.run()
    assert list(cluster.ranks[0].core.groups.states) == groups[2:]
    for group in groups:
        assert error_of(cluster, driver, driver.await_group(group)) == "TaskPlacementGroupRemoved"
        assert len(cluster.ranks[0].core.groups.states) == 2


def test_tasks_of_a_group_that_is_gone_fail_at_once():
    cluster, driver = started(1, 1)
    group = created(cluster, driver, CPU)
    driver.remove_group(group)
    cluster.run()
    assert error_of(cluster, driver, driver.submit(in_group(cluster, driver, group))[0]) == "TaskPlacementGroupRemoved"
    is_clean(cluster)


def test_nothing_starts_in_bundles_that_may_have_to_be_given_back():
    cluster = Cluster([1, 1])
    driver = cluster.add_driver()
    core = cluster.ranks[1].core
    busy = m.Template(job=b"j", function=b"f", name="busy", num_returns=1, resources={"CPU": UNIT}, max_retries=0)
    taken = core.ledger.acquire(busy)  # of which the GCS has not heard
    group = driver.create_group([{"CPU": UNIT}, {"CPU": UNIT}], "STRICT_SPREAD")
    driver.submit(cluster.template(driver, "f", group=group))
    cluster.run(check=False)
    assert not cluster.running
    core.ledger.release(taken)
    cluster.advance(1.0)
    cluster.run()
    assert len(cluster.running) == 1


@pytest.mark.parametrize("bundle", [-1, 0])
def test_what_is_taken_back_from_a_dying_worker_of_a_removed_group_fails_too(bundle):
    cluster = Cluster([1])
    driver = cluster.add_driver()
    group = driver.create_group([{"CPU": UNIT}])
    cluster.run()
    template = cluster.template(driver, "f", group=group, bundle=bundle)
    driver.submit(template)
    cluster.run()
    cluster.running[0].finish(seconds=0.0001)
    cluster.run()
    refs = [driver.submit(template)[0] for _ in range(4)]
    cluster.run()
    (worker,) = cluster.running
    cluster.advance(LOOK_SECONDS / 2)
    driver.remove_group(group)
    cluster.run(hold=[("up", 0, worker.number)])
    for _ in range(2):
        cluster.advance(LOOK_SECONDS)
    cluster.run()
    driver.get(refs)
    cluster.run()
    assert set(refs) <= set(driver.errors)


def test_a_group_hears_that_an_actor_needs_no_more_than_it_has():
    cluster = Cluster([0, 2])
    driver = cluster.add_driver()
    options = m.ActorOptions()
    driver.create_actor(cluster.template(driver, "A", actor=options, resources={"CPU": UNIT}, num_returns=0))
    cluster.run()
    group = driver.create_group([{"CPU": UNIT}])
    cluster.run()
    cluster.running[0].finish()
    cluster.run()
    gcs = cluster.ranks[0].gcs
    assert gcs is not None
    assert gcs.groups.groups[group].state == "created"
