"""Which worker runs what, and when: leases, pipelines, blocked workers, deaths."""

from __future__ import annotations

from typing import Any

import pytest

from hpcray import payload
from hpcray.protocol import messages as m
from hpcray.raylet.pool import FREE_WORKERS, LEASE_SECONDS, MAX_DEPTH
from hpcray.resources import UNIT
from hpcray.testing.cluster import Cluster
from hpcray.testing.process import Process

SHORT, LONG = 0.0001, 1.0


def alone(cpus: int, **options: Any) -> tuple[Cluster, Process]:
    cluster = Cluster([cpus], **options)
    return cluster, cluster.add_driver()


def finish_one(cluster: Cluster, **options: Any) -> None:
    cluster.running[0].finish(**options)
    cluster.run()


def finish_all(cluster: Cluster, **options: Any) -> int:
    count = 0
    while cluster.running:
        finish_one(cluster, **options)
        count += 1
    return count


def test_as_many_tasks_run_as_there_are_cpus():
    cluster, driver = alone(3)
    template = cluster.template(driver, "f")
    for _ in range(5):
        driver.submit(template)
    cluster.run()
    assert len(cluster.running) == 3
    assert cluster.ranks[0].core.ledger.free == {"CPU": 0}
    assert finish_all(cluster) == 5


def test_tasks_of_several_classes_share_the_cpus():
    cluster, driver = alone(2)
    for name in "fgh":
        for _ in range(3):
            driver.submit(cluster.template(driver, name))
    cluster.run()
    assert len(cluster.running) == 2
    assert finish_all(cluster) == 9
    assert cluster.ranks[0].core.ledger.free == {"CPU": 2 * UNIT}


def test_long_tasks_are_not_queued_behind_each_other():
    cluster, driver = alone(1)
    template = cluster.template(driver, "f")
    for _ in range(4):
        driver.submit(template)
    cluster.run()
    finish_one(cluster, seconds=LONG)
    assert not cluster.running[0].inbox


def test_short_tasks_are_pipelined():
    cluster, driver = alone(1)
    template = cluster.template(driver, "f")
    for _ in range(200):
        driver.submit(template)
    cluster.run()
    finish_one(cluster, seconds=SHORT)
    assert 1 < len(cluster.running[0].inbox) < MAX_DEPTH
    assert finish_all(cluster, seconds=SHORT) == 199


def test_a_class_that_was_slow_once_is_not_queued_deeply_again_at_once():
    cluster, driver = alone(1)
    pool = cluster.ranks[0].core.pool
    template = cluster.template(driver, "f")
    for seconds, depth in [(SHORT, 20), (LONG, 1), (SHORT, 1)]:
        driver.submit(template)
        cluster.run()
        finish_one(cluster, seconds=seconds)
        assert pool.depth(template) == depth


def test_a_worker_that_blocks_hands_back_and_lends_its_cpu():
    # def f(): get(g.remote())           # and more calls of f lie behind it
    cluster, driver = alone(1)
    template = cluster.template(driver, "f")
    driver.submit(template)
    cluster.run()
    finish_one(cluster, seconds=SHORT)
    for _ in range(5):
        driver.submit(template)
    cluster.run()
    (first,) = cluster.running
    assert len(first.inbox) > 1
    (ref,) = first.submit(cluster.template(first, "g"))
    first.get([ref])
    cluster.run()
    assert not first.inbox
    assert first.is_blocked
    assert finish_all(cluster) == 6


def test_what_was_handed_back_is_not_pinned_for_whoever_handed_it_back():
    # x = put(array); [f.remote(x) for _ in range(5)]        # the first call blocks
    cluster, driver = alone(1)
    template = cluster.template(driver, "f")
    driver.submit(template)
    cluster.run()
    finish_one(cluster, seconds=SHORT)
    x = driver.put(size=2000, large=True)
    cluster.run()
    for _ in range(5):
        driver.submit(template, [x])
    cluster.run()
    (first,) = cluster.running
    (ref,) = first.submit(cluster.template(first, "g"))
    first.get([ref])
    cluster.run()
    finish_all(cluster)
    driver.release(list(driver.held))
    cluster.run()
    assert not first.is_gone
    assert cluster.leftovers() == []


def test_a_worker_goes_on_even_if_its_cpu_is_taken_and_nothing_new_starts_meanwhile():
    cluster, driver = alone(1)
    template = cluster.template(driver, "f")
    for _ in range(3):
        driver.submit(template)
    cluster.run()
    (first,) = cluster.running
    ref = driver.put()
    (child,) = first.submit(cluster.template(first, "g"))
    first.get([child])
    cluster.run()
    assert len(cluster.running) == 1
    first.stop_getting()
    cluster.run()
    assert len(cluster.running) == 2
    assert cluster.ranks[0].core.ledger.free == {"CPU": -UNIT}
    first.finish()
    cluster.run()
    assert len(cluster.running) == 1
    finish_all(cluster)
    assert cluster.ranks[0].core.ledger.free == {"CPU": UNIT}
    assert ref in driver.held


def test_fifty_tasks_deep_on_one_cpu():
    cluster, driver = alone(1)
    driver.submit(cluster.template(driver, "f"))
    cluster.run(check=False)
    for _ in range(50):
        (worker,) = cluster.running
        worker.get(worker.submit(cluster.template(worker, "f")))
        cluster.run(check=False)
    assert finish_all(cluster) == 51


def test_children_that_nobody_waits_for_run_when_their_parent_is_done():
    cluster, driver = alone(1)
    driver.submit(cluster.template(driver, "parent"))
    cluster.run()
    (parent,) = cluster.running
    for _ in range(5):
        parent.submit(cluster.template(parent, "child"))
    cluster.run()
    assert finish_all(cluster) == 6


@pytest.mark.parametrize("seconds", [SHORT, LONG])
def test_a_class_that_waits_gets_its_turn_while_another_never_ends(seconds):
    cluster, driver = alone(1)
    many, one = cluster.template(driver, "many"), cluster.template(driver, "one")
    for _ in range(100):
        driver.submit(many)
    (ref,) = driver.submit(one)
    driver.get([ref])
    cluster.run()
    for _ in range(40):
        cluster.now += LEASE_SECONDS
        finish_one(cluster, seconds=seconds)
        driver.submit(many)
    assert ref in driver.values


def test_tasks_without_resources_have_a_bounded_number_of_workers():
    cluster, driver = alone(1)
    template = cluster.template(driver, "f", resources={})
    count = FREE_WORKERS + 20
    for _ in range(count):
        driver.submit(template)
    cluster.run(check=False)
    assert len(cluster.workers) == FREE_WORKERS
    assert finish_all(cluster) == count


def test_tasks_without_resources_that_wait_for_their_likes_do_not_deadlock():
    cluster, driver = alone(1)
    for _ in range(FREE_WORKERS):
        driver.submit(cluster.template(driver, "f", resources={}))
    cluster.run(check=False)
    for worker in cluster.running:
        worker.get(worker.submit(cluster.template(worker, "f", resources={})))
    cluster.run(check=False)
    assert finish_all(cluster) == 2 * FREE_WORKERS


def test_idle_workers_are_used_again_and_surplus_ones_retired():
    cluster, driver = alone(2)
    template = cluster.template(driver, "f")
    for _ in range(3):
        driver.submit(template)
        driver.submit(template)
        cluster.run()
        finish_all(cluster)
    assert len(cluster.workers) == 2
    for _ in range(3):
        driver.submit(template)
    cluster.run()
    for worker in cluster.running:
        worker.get(worker.submit(cluster.template(worker, "g")))
        cluster.run()
    finish_all(cluster)
    assert len(cluster.workers) == 2


def test_a_worker_serves_one_job_only():
    cluster, first = alone(1)
    second = cluster.add_driver()
    for driver in (first, second):
        driver.submit(cluster.template(driver, "f"))
        cluster.run()
        finish_all(cluster)
    jobs = [worker.job for worker in cluster.workers]
    assert len(jobs) == len(set(jobs))


def test_a_death_costs_the_running_task_and_none_of_those_behind_it():
    cluster, driver = alone(1)
    template = cluster.template(driver, "f")
    driver.submit(template)
    cluster.run()
    finish_one(cluster, seconds=SHORT)
    refs = [driver.submit(template)[0] for _ in range(5)]
    cluster.run()
    (worker,) = cluster.running
    assert worker.inbox
    cluster.kill(worker)
    driver.get(refs)
    cluster.run()
    finish_all(cluster)
    assert list(driver.errors) == refs[:1]
    assert driver.values.keys() >= set(refs)


def test_a_death_while_blocked_gives_back_what_was_held_and_no_more():
    cluster, driver = alone(1, extra={"GPU": UNIT})
    driver.submit(cluster.template(driver, "f", resources={"CPU": UNIT, "GPU": UNIT}))
    cluster.run()
    (worker,) = cluster.running
    worker.get(worker.submit(cluster.template(worker, "g", resources={"GPU": UNIT})))
    cluster.run()
    assert cluster.ranks[0].core.ledger.free == {"CPU": UNIT, "GPU": 0}
    cluster.kill(worker)
    cluster.run()
    assert cluster.ranks[0].core.ledger.free == {"CPU": UNIT, "GPU": 0}  # the child has it now
    finish_all(cluster)
    assert cluster.ranks[0].core.ledger.free == {"CPU": UNIT, "GPU": UNIT}


def test_a_worker_that_dies_with_reserved_memory_gives_it_back():
    cluster, driver = alone(1)
    driver.submit(cluster.template(driver, "f"))
    cluster.run()
    (worker,) = cluster.running
    worker.send(m.Reserve(b"x" * 28, 2000))
    cluster.run(hold={("down", 0, worker.number)})
    assert cluster.ranks[0].core.memory.in_use
    cluster.kill(worker)
    cluster.run()
    assert cluster.ranks[0].core.memory.in_use == 0


def test_what_a_dead_client_waited_for_is_not_pinned_for_it():
    cluster = Cluster([1, 1])
    driver = cluster.add_driver()
    (ref,) = driver.submit(cluster.template(driver, "f", node=1))
    driver.submit(cluster.template(driver, "g", node=0), nested=[ref])
    cluster.run()
    cluster.worker_on(0).get([ref])
    cluster.run()
    cluster.kill(next(worker for worker in cluster.workers if worker.is_blocked))
    cluster.run()
    cluster.worker_on(1).finish(size=2000, large=True)
    cluster.run()
    driver.release(list(driver.held))
    cluster.run()
    assert cluster.leftovers() == []


def test_the_first_of_two_results_is_given_up_if_there_is_no_room_for_the_second():
    cluster, driver = alone(1, arena_size=4096, store_timeout=5.0)
    (first, second) = driver.submit(cluster.template(driver, "f", num_returns=2), num_returns=2)
    cluster.run()
    cluster.running[0].finish(size=3000, large=True)
    cluster.run()
    cluster.advance(10.0)
    driver.get([first, second])
    cluster.run()
    assert [payload.describe_system_error(error)[0] for error in driver.errors.values()] == ["ObjectStoreFullError"] * 2
    assert cluster.ranks[0].core.memory.in_use == 0


def test_work_whose_arguments_are_on_their_way_takes_up_room():
    # x = put(array); [f.remote(x) for _ in range(50)]       # a node must not be sent all of them at once
    cluster = Cluster([0, 1])
    driver = cluster.add_driver()
    x = driver.put(size=2000, large=True)
    cluster.run()
    for _ in range(20):
        driver.submit(cluster.template(driver, "f"), [x])
    cluster.run(hold={("rank", 0, 1), ("bulk", 1, 1)})
    while ("rank", 0, 1) in cluster.choices():
        cluster.deliver(("rank", 0, 1))
        cluster.run(hold={("bulk", 1, 1)})
    assert len(cluster.ranks[0].core.tasks.queues) == 1
    cluster.run()
    assert finish_all(cluster) == 20


@pytest.mark.parametrize("cpus", [1, 2])
def test_prestarted_workers_are_used(cpus):
    cluster, driver = alone(cpus)
    cluster.ranks[0].core.pool.prestart(cpus)
    cluster.run()
    assert len(cluster.workers) == cpus
    for _ in range(cpus):
        driver.submit(cluster.template(driver, "f"))
    cluster.run()
    assert len(cluster.workers) == cpus
    assert finish_all(cluster) == cpus


def test_gpus_are_given_to_new_workers_only_and_who_has_had_some_ends():
    cluster, driver = alone(2, extra={"GPU": UNIT})
    plain = cluster.template(driver, "f")
    with_gpu = cluster.template(driver, "g", resources={"CPU": UNIT, "GPU": UNIT})
    for template in (plain, with_gpu, plain, with_gpu):
        driver.submit(template)
        cluster.run()
        assert finish_all(cluster) == 1
    assert len(cluster.workers) == 1  # the one of `plain`, again
    cluster.ranks[0].core.check()
