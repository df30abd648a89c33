"""The home side of tasks: waiting for arguments, placing, retries, and the ends of all of it."""

from __future__ import annotations

from typing import Any

import pytest

from hpcray import payload
from hpcray.protocol import messages as m
from hpcray.raylet.tasks import Tasks
from hpcray.resources import UNIT
from hpcray.testing.cluster import Cluster
from hpcray.testing.process import Process


def finish_all(cluster: Cluster, **options: Any) -> dict[int, int]:
    """Per rank, how many tasks ran to their end."""
    counts: dict[int, int] = {}
    while cluster.running:
        worker = cluster.running[sum(counts.values()) % len(cluster.running)]
        counts[worker.rank] = counts.get(worker.rank, 0) + 1
        worker.finish(**options)
        cluster.run()
    return counts


def kind_of(error: bytes) -> str:
    return payload.describe_system_error(error)[0]


def started(*cpus: int, **options: Any) -> tuple[Cluster, Process]:
    cluster = Cluster(cpus, **options)
    return cluster, cluster.add_driver()


def test_a_task_waits_for_its_arguments():
    cluster, driver = started(2)
    template = cluster.template(driver, "f")
    (first,) = driver.submit(template)
    driver.submit(template, [first])
    cluster.run()
    assert len(cluster.running) == 1
    assert finish_all(cluster) == {0: 2}


def test_an_argument_that_is_an_error_fails_the_task_without_running_it():
    cluster, driver = started(1)
    template = cluster.template(driver, "f")
    (first,) = driver.submit(template)
    (second,) = driver.submit(template, [first])
    driver.get([second])
    cluster.run()
    cluster.running[0].finish(failed=True)
    cluster.run()
    assert not cluster.running
    name, inner = payload.describe_dependency_error(driver.errors[second])
    assert name == "f"
    assert inner[0] == payload.TASK_ERROR


def test_work_stays_where_it_was_made_while_there_is_room_and_spills_then():
    cluster, driver = started(1, 1, 1)
    template = cluster.template(driver, "f")
    driver.submit(template)
    cluster.run()
    assert [worker.rank for worker in cluster.running] == [0]
    driver.submit(template)
    driver.submit(template)
    cluster.run()
    assert sorted(worker.rank for worker in cluster.running) == [0, 1, 2]


@pytest.mark.parametrize("spread", [False, True])
def test_places_that_were_granted_are_free_again_however_often(spread):
    cluster, driver = started(1, 1)
    template = cluster.template(driver, "f", spread=spread)
    for _ in range(40):
        driver.submit(template)
    cluster.run()
    counts = finish_all(cluster)
    assert sum(counts.values()) == 40
    assert min(counts.values()) > 5
    assert cluster.ranks[0].gcs is not None
    for node in cluster.ranks[0].gcs.scheduler.nodes.values():
        assert node.granted == node.arrived or not node.granted


def test_spread_tasks_run_on_a_job_of_one_rank():
    cluster, driver = started(2)
    driver.submit(cluster.template(driver, "f", spread=True))
    cluster.run()
    assert finish_all(cluster) == {0: 1}


def test_soft_affinity_to_a_node_that_is_not_there_runs_here():
    cluster, driver = started(1)
    driver.submit(cluster.template(driver, "f", node=7, node_is_soft=True))
    cluster.run()
    assert finish_all(cluster) == {0: 1}


def test_affinity_is_followed():
    cluster, driver = started(2, 1, 1)
    for _ in range(4):
        driver.submit(cluster.template(driver, "f", node=2))
    cluster.run()
    assert finish_all(cluster) == {2: 4}


def test_a_demand_that_no_node_can_meet_is_told_to_the_user_once():
    cluster, driver = started(1, 1)
    template = cluster.template(driver, "greedy", resources={"CPU": 9 * UNIT})
    for _ in range(3):
        driver.submit(template)
        cluster.run()
    (line,) = cluster.shown
    assert "greedy needs {'CPU': 9.0}" in line


def test_grants_for_which_there_is_nothing_left_to_run_are_returned():
    cluster, driver = started(1, 1)
    template = cluster.template(driver, "f")
    for _ in range(3):
        driver.submit(template)
    cluster.run(hold={("rank", 0, 1)})
    cluster.ranks[0].core.tasks.on_grant(m.Grant(template, 1, 5))
    scheduler = cluster.ranks[0].gcs.scheduler
    scheduler.nodes[1].take(template, 5)
    cluster.ranks[0].end_turn()
    cluster.run()
    assert sum(finish_all(cluster).values()) == 3
    assert scheduler.nodes[1].granted == scheduler.nodes[1].arrived
    assert not scheduler.has_demands


@pytest.mark.parametrize("rank", [0, 1])
def test_a_crash_costs_an_attempt_and_then_the_task(rank):
    cluster, driver = started(1, 1)
    (ref,) = driver.submit(cluster.template(driver, "f", node=rank, max_retries=2))
    driver.get([ref])
    cluster.run()
    for left in (2, 1, 0):
        assert not driver.errors
        cluster.kill(cluster.worker_on(rank))
        cluster.run()
        assert len(cluster.running) == (1 if left else 0)
    assert kind_of(driver.errors[ref]) == "WorkerCrashedError"
    assert "it was killed by the test" in str(payload.describe_system_error(driver.errors[ref]))


@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_that_is_to_be_retried_is(rank):
    cluster, driver = started(1, 1)
    (ref,) = driver.submit(cluster.template(driver, "f", node=rank, max_retries=1))
    driver.get([ref])
    cluster.run()
    cluster.worker_on(rank).finish(failed=True, retry=True)
    cluster.run()
    cluster.worker_on(rank).finish()
    cluster.run()
    assert ref in driver.values
    assert not driver.errors


@pytest.mark.parametrize("rank", [0, 1])
def test_after_the_last_retry_the_exception_is_the_result(rank):
    cluster, driver = started(1, 1)
    (ref,) = driver.submit(cluster.template(driver, "f", node=rank, max_retries=1))
    driver.get([ref])
    cluster.run()
    for _ in range(2):
        cluster.worker_on(rank).finish(failed=True, retry=True)
        cluster.run()
    assert driver.errors[ref][0] == payload.TASK_ERROR
    assert not cluster.running


def test_a_reply_to_an_earlier_attempt_is_ignored_and_what_it_brought_is_let_go_of():
    cluster, driver = started(0, 1)
    (ref,) = driver.submit(cluster.template(driver, "f", max_retries=1))
    inner = driver.put()
    driver.get([ref])
    cluster.run()
    core = cluster.ranks[0].core
    tasks: Tasks = core.tasks
    (task,) = tasks.tasks.values()
    task.attempt = 1
    tasks.on_finished(m.Finished(task.id, 0, [m.StoredResult(2000, [inner])], failed=False, retry=False), 1)
    core.check()
    assert not driver.values
    assert core.table.entries[inner].holds == 1
    task.attempt = 0
    cluster.ranks[0].end_turn()
    cluster.run()
    finish_all(cluster)
    assert ref in driver.values


def test_a_crash_of_an_earlier_attempt_is_ignored():
    cluster, driver = started(0, 1)
    driver.submit(cluster.template(driver, "f"))
    cluster.run()
    tasks = cluster.ranks[0].core.tasks
    (task,) = tasks.tasks.values()
    tasks.on_crashed(task.id, 7, b"\x11")
    tasks.on_crashed(b"unknown", 0, b"\x11")
    assert task.id in tasks.tasks


def test_two_returns_are_two_objects():
    cluster, driver = started(1, 1)
    refs = driver.submit(cluster.template(driver, "f", num_returns=2, node=1), num_returns=2)
    driver.get(refs)
    cluster.run()
    cluster.worker_on(1).finish()
    cluster.run()
    assert driver.values.keys() == set(refs)


def test_the_same_object_may_be_two_arguments():
    cluster, driver = started(0, 1)
    x = driver.put(size=2000, large=True)
    cluster.run()
    (ref,) = driver.submit(cluster.template(driver, "f"), [x, x])
    driver.get([ref])
    cluster.run()
    finish_all(cluster)
    assert ref in driver.values
    driver.release([x, ref])
    cluster.run()
    assert cluster.leftovers() == []


def test_resources_of_this_rank_are_asked_for_again_after_a_question_in_between():
    # ray.available_resources() while a task runs, then an actor that needs the CPU when it is free again
    cluster, driver = started(1)
    options = m.ActorOptions(placement={"CPU": UNIT})
    driver.create_actor(cluster.template(driver, "A", resources={}, actor=options))
    cluster.run()
    cluster.running[0].finish()
    cluster.run()
    driver.submit(cluster.template(driver, "f"))
    cluster.run()
    driver.send(m.Query(1, "available_resources", b"\xc0"))
    cluster.run()
    assert driver.answers[1].ok
    next(worker for worker in cluster.running if not worker.actor).finish()
    cluster.run()
    driver.create_actor(cluster.template(driver, "A", resources={}, actor=options))
    cluster.run()
    assert len([worker for worker in cluster.running if worker.actor]) == 1


def test_room_that_comes_back_before_its_lack_was_reported_leaves_no_report_to_be_made():
    # An actor on a rank that was granted no task starts one there itself.
    cluster = Cluster([0, 1])
    driver = cluster.add_driver()
    actor = driver.create_actor(cluster.template(driver, "A", node=1, resources={}, actor=m.ActorOptions()))
    cluster.run()
    cluster.worker_on(1).finish()
    driver.call(actor)
    cluster.run()
    caller = cluster.worker_on(1)
    caller.submit(cluster.template(caller, "f"))
    while not (others := [worker for worker in cluster.running if worker is not caller]):
        cluster.deliver(cluster.choices()[0])
    core = cluster.ranks[1].core
    assert core.report_due is not None
    others[0].finish()
    while links := cluster.choices():
        cluster.deliver(links[0])
    assert core.report_due is None


def test_a_task_runs_only_where_the_labels_are_that_it_asks_for():
    cluster = Cluster([2, 2])
    for rank, disk in enumerate(["slow", "fast"]):
        cluster.nodes[rank].labels["disk"] = disk
    driver = cluster.add_driver()
    driver.submit(cluster.template(driver, "f", labels=(m.LabelRule("disk", "in", ("fast",)),)))
    driver.submit(cluster.template(driver, "g", liked_labels=(m.LabelRule("disk", "in", ("fast",)),)))
    driver.submit(cluster.template(driver, "h", liked_labels=(m.LabelRule("disk", "in", ("slow",)),)))
    cluster.run()
    assert sorted(worker.rank for worker in cluster.running) == [0, 1, 1]


@pytest.mark.parametrize("ranks", [1, 2])
def test_labels_that_no_node_has_are_told_to_the_user_and_waited_for(ranks):
    cluster = Cluster([1] * ranks)
    driver = cluster.add_driver()
    driver.submit(cluster.template(driver, "f", labels=(m.LabelRule("disk", "in", ("fast",)),)))
    cluster.run()
    assert not cluster.running
    assert "f asks for labels that no node of this job has" in cluster.shown[0]


@pytest.mark.parametrize("node", [m.NO_NODE, 2])
def test_a_task_bound_to_a_node_that_is_not_there_fails(node):
    cluster = Cluster([1, 1])
    driver = cluster.add_driver()
    template = cluster.template(driver, "f", node=node)
    refs = [driver.submit(template)[0] for _ in range(2)]
    driver.get(refs)
    cluster.run()
    told = [payload.describe_system_error(driver.errors[ref]) for ref in refs]
    assert {name for name, _ in told} == {"TaskUnschedulableError"}
    assert "no such node" in told[0][1][0]


def test_a_task_bound_to_a_node_that_is_too_small_fails():
    cluster = Cluster([1, 2])
    driver = cluster.add_driver()
    (small,) = driver.submit(cluster.template(driver, "f", node=0, resources={"CPU": 2 * UNIT}))
    (large,) = driver.submit(cluster.template(driver, "f", node=1, resources={"CPU": 2 * UNIT}))
    driver.get([small, large])
    cluster.run()
    assert list(driver.errors) == [small]
    assert len(cluster.running) == 1


def test_the_tasks_of_an_ended_job_end_with_it_and_leave_nothing():
    cluster = Cluster([1])
    cluster.add_driver()
    driver = cluster.add_driver()
    template = cluster.template(driver, "f")
    driver.submit(template)
    cluster.run()
    cluster.running[0].finish(seconds=0.0001)
    cluster.run()
    argument = driver.put(size=4000, large=True)
    cluster.run()
    for _ in range(8):
        driver.submit(template, [argument])
    cluster.run()
    assert len(cluster.running[0].inbox) > 1, "some lie behind the one that runs"
    cluster.kill(driver)
    cluster.run()
    node = cluster.ranks[0]
    node.core.to_gcs(m.EndJob(driver.client.job))
    node.end_turn()
    cluster.run()
    assert not cluster.running
    assert cluster.leftovers() == []
