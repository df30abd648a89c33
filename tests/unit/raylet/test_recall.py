"""What lies behind a long task is taken back, runs elsewhere, and never twice."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from hpcray.protocol import messages as m
from hpcray.raylet.pool import LOOK_SECONDS, RETURN_SECONDS
from hpcray.testing.cluster import Cluster
from hpcray.testing.process import Process

SHORT, LONG = 0.0001, 1.0


def with_a_queue(cpus: list[int], count: int = 6) -> tuple[Cluster, Process, bytes, Process]:
    """A cluster whose first worker runs one of `count` tasks of a class that was short so far; the others are behind it."""
    cluster = Cluster(cpus)
    driver = cluster.add_driver()
    template = cluster.template(driver, "f")
    for _ in range(sum(cpus)):
        driver.submit(template)
    cluster.run()
    while cluster.running:
        cluster.running[0].finish(seconds=SHORT)
        cluster.run()
    others = [cluster.template(driver, f"other{rank}", node=rank) for rank, n in enumerate(cpus) for _ in range(n)]
    for other in others[1:]:
        driver.submit(other)
    cluster.run()
    for _ in range(count):
        driver.submit(template)
    cluster.run()
    (worker,) = [w for w in cluster.running if w.running is not None and w.running.template == template]
    assert len(worker.inbox) == count - 1
    for idle in [w for w in cluster.running if w is not worker]:
        idle.finish(seconds=LONG)
    cluster.run()
    return cluster, driver, template, worker


def pass_looks(cluster: Cluster) -> None:
    for _ in range(2):
        cluster.advance(LOOK_SECONDS)
    cluster.run()


def finish_all(cluster: Cluster) -> Counter[bytes]:
    """How often each task was taken up."""
    ran: Counter[bytes] = Counter()
    seen = {id(p): p for p in cluster.workers}
    while cluster.running:
        cluster.running[0].finish()
        cluster.run()
        seen |= {id(p): p for p in cluster.workers}
    for process in seen.values():
        ran.update(process.ran)
    return ran


def test_what_lies_behind_a_long_task_runs_on_an_idle_worker():
    cluster, _, _, worker = with_a_queue([2])
    assert len(cluster.running) == 1
    pass_looks(cluster)
    assert len(cluster.running) == 2
    assert not worker.inbox
    assert set(finish_all(cluster).values()) == {1}


def test_a_worker_that_gets_on_keeps_its_tasks():
    cluster, _, _, worker = with_a_queue([2], count=8)
    for _ in range(3):
        cluster.advance(LOOK_SECONDS / 2)
        worker.finish(seconds=SHORT)
        cluster.run()
    assert worker.inbox


def test_nothing_is_looked_at_when_no_worker_has_several_tasks():
    cluster, _, _, _ = with_a_queue([2])
    core = cluster.ranks[0].core
    assert core.next_due is not None
    pass_looks(cluster)
    finish_all(cluster)
    cluster.advance(LOOK_SECONDS)
    assert core.next_due is None


def test_recalled_tasks_keep_their_order_and_go_first():
    cluster, driver, template, worker = with_a_queue([1])
    behind = [run.task for run in worker.inbox]
    late = driver.submit(template)[0][:-4]
    cluster.run()
    pass_looks(cluster)
    finish_all(cluster)
    assert worker.ran[-len(behind) - 1 :] == [*behind, late]


def test_a_worker_that_started_them_meanwhile_has_them():
    cluster, _, _, worker = with_a_queue([2], count=3)
    link = ("up", 0, worker.number)
    for _ in range(2):
        worker.finish(seconds=SHORT)
        cluster.run(hold={link})
    for _ in range(2):
        cluster.advance(LOOK_SECONDS)
    cluster.run()
    assert cluster.running == [worker]
    assert set(finish_all(cluster).values()) == {1}


def test_a_recall_and_what_the_worker_hands_back_at_the_same_time():
    # def f(): get(g.remote())
    cluster, _, _, worker = with_a_queue([2])
    link = ("up", 0, worker.number)
    (ref,) = worker.submit(cluster.template(worker, "g"))
    worker.get([ref])  # hands back
    for _ in range(2):
        cluster.advance(LOOK_SECONDS)
    cluster.run(hold={link})
    cluster.run()
    assert set(finish_all(cluster).values()) == {1}


def test_until_the_worker_has_answered_nothing_is_sent_behind_what_it_runs():
    cluster, driver, template, worker = with_a_queue([1], count=3)
    answer = ("up", 0, worker.number)
    for _ in range(2):
        cluster.advance(LOOK_SECONDS)
    cluster.run(hold={answer})
    pool = cluster.ranks[0].core.pool
    pool._seconds[template] = SHORT
    for _ in range(3):
        driver.submit(template)
    cluster.run(hold={answer})
    assert not worker.inbox
    cluster.run()
    assert worker.inbox
    assert set(finish_all(cluster).values()) == {1}


def test_a_worker_that_dies_during_a_recall_costs_only_what_it_ran():
    cluster, driver, _, worker = with_a_queue([2])
    for _ in range(2):
        cluster.advance(LOOK_SECONDS)
    cluster.kill(worker)
    driver.get([i for i in driver.held if i not in driver.values])
    cluster.run()
    finish_all(cluster)
    assert len(driver.errors) == 1


def test_pins_for_recalled_tasks_are_given_back():
    # x = put(array); [f.remote(x) for _ in range(5)]
    cluster = Cluster([1])
    driver = cluster.add_driver()
    template = cluster.template(driver, "f")
    driver.submit(template)
    cluster.run()
    cluster.running[0].finish(seconds=SHORT)
    x = driver.put(size=2000, large=True)
    cluster.run()
    for _ in range(5):
        driver.submit(template, [x])
    cluster.run()
    assert cluster.running[0].inbox
    pass_looks(cluster)
    finish_all(cluster)
    driver.release(list(driver.held))
    cluster.run()
    assert cluster.leftovers() == []


@pytest.mark.parametrize("cpus", [[1, 1], [0, 1, 1]])
def test_what_finds_no_worker_here_goes_home_and_runs_on_another_rank(cpus):
    cluster, _, _, _ = with_a_queue(cpus)
    assert len(cluster.running) == 1
    pass_looks(cluster)
    assert {w.rank for w in cluster.running} == {rank for rank, count in enumerate(cpus) if count}
    ran = finish_all(cluster)
    assert set(ran.values()) == {1}
    scheduler = cluster.ranks[0].gcs.scheduler
    for node in scheduler.nodes.values():
        assert all(node.granted.get(t, 0) == count for t, count in node.arrived.items())


def test_ready_work_that_another_class_keeps_from_running_goes_home():
    cluster = Cluster([1, 1])
    driver = cluster.add_driver()
    f, g = cluster.template(driver, "f"), cluster.template(driver, "g")
    for rank in (0, 1):
        driver.submit(cluster.template(driver, "blocker", node=rank))
    cluster.run()
    here = next(w for w in cluster.running if w.rank == 0)
    child = here.submit(f)[0]
    here.get([child])  # its CPU is free: the child has it, and goes on with it
    cluster.run()
    driver.submit(g)
    cluster.run()
    here.stop_getting()
    cluster.run()
    next(w for w in cluster.running if w.rank == 1).finish()
    cluster.advance(RETURN_SECONDS)
    cluster.run()
    assert any(w.rank == 1 for w in cluster.running)
    finish_all(cluster)


def test_a_task_that_came_back_twice_or_late_is_not_queued_again():
    cluster = Cluster([0, 1])
    driver = cluster.add_driver()
    (ref,) = driver.submit(cluster.template(driver, "f"))
    driver.get([ref])
    cluster.run()
    home = cluster.ranks[0].core
    for attempt in (1, 7):
        home.on_peer_message(1, m.Returned(ref[:-4], attempt))
    home.on_peer_message(0, m.Returned(ref[:-4], 0))
    assert not home.tasks.queues
    assert sum(finish_all(cluster).values()) == 1


def test_a_task_of_an_ended_job_that_comes_back_fails():
    cluster = Cluster([0, 1])
    driver = cluster.add_driver()
    (ref,) = driver.submit(cluster.template(driver, "f"))
    cluster.run()
    home = cluster.ranks[0].core
    home.on_peer_message(0, m.JobEnded(driver.job))
    home.on_peer_message(1, m.Returned(ref[:-4], 0))
    assert not home.tasks.queues
    assert not home.tasks.tasks


@pytest.mark.parametrize("cpus", [[1], [2], [1, 1], [0, 1, 2]])
@pytest.mark.parametrize("seed", range(6))
def test_each_task_runs_once_in_any_order_of_events(cpus, seed):
    random = Random(f"{cpus} {seed}")
    cluster = Cluster(cpus)
    driver = cluster.add_driver()
    template = cluster.template(driver, "f")
    refs: list[bytes] = []
    workers: dict[int, Process] = {}
    recalled = 0
    for _ in range(700):
        draw, running = random.random(), cluster.running
        workers |= {id(p): p for p in cluster.workers}
        if draw < 0.15 and len(refs) < 250:
            refs += [driver.submit(template)[0] for _ in range(random.randint(1, 8))]
        elif draw < 0.35 and running:
            random.choice(running).finish(seconds=SHORT)
        elif draw < 0.36 and running:
            worker = random.choice(running)
            worker.get(worker.submit(template))
        elif draw < 0.41:
            cluster.advance(random.choice([LOOK_SECONDS, RETURN_SECONDS]))
            for pool in [node.core.pool for node in cluster.ranks]:
                recalled += any(worker.is_recalling for workers in pool.leases.values() for worker in workers)
                pool._seconds[template] = SHORT  # or few would be sent behind others any more
        elif links := cluster.choices():
            cluster.deliver(random.choice(links))
        cluster.check()
    driver.get(refs)
    while links := cluster.choices():
        cluster.deliver(random.choice(links))
    while cluster.running:
        random.choice(cluster.running).finish(seconds=SHORT)
        cluster.run(lambda links: random.choice(links), check=False)
        workers |= {id(p): p for p in cluster.workers}
    assert recalled
    assert set(Counter(task for p in workers.values() for task in p.ran).values()) == {1}
    assert driver.values.keys() == set(refs)
