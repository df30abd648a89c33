"""What is awaited goes first, what waits for nothing is not held up, and jobs share."""

from __future__ import annotations

from random import Random

import pytest

from hpcray.raylet.pool import LEASE_SECONDS
from hpcray.raylet.queues import ClassQueue
from hpcray.resources import UNIT
from hpcray.testing.cluster import Cluster
from hpcray.testing.process import Process

SHORT, LONG = 0.0001, 1.0


class Item:
    is_awaited = False


def test_a_queue_is_first_come_first_served_but_for_what_is_awaited():
    queue: ClassQueue[Item] = ClassQueue()
    items = {name: Item() for name in (b"a", b"b", b"c", b"d")}
    for name, item in items.items():
        queue.push(name, item)
    assert queue.hasten(b"c")
    assert queue.hasten(b"d")
    assert not queue.hasten(b"x")
    assert len(queue) == 4
    assert list(queue) == [items[name] for name in (b"d", b"c", b"a", b"b")]
    first = queue.pop()
    assert first is items[b"d"]
    queue.push_first(b"d", first)
    assert [queue.pop() for _ in range(4)] == [items[name] for name in (b"d", b"c", b"a", b"b")]
    assert not queue


def finish_all(cluster: Cluster, **options: float) -> int:
    count = 0
    while cluster.running:
        cluster.running[0].finish(**options)
        cluster.run(check=False)
        count += 1
    return count


def test_what_a_worker_waits_for_runs_before_what_came_earlier():
    cluster = Cluster([1])
    driver = cluster.add_driver()
    for name in "fgg":
        driver.submit(cluster.template(driver, name))
    cluster.run()
    (parent,) = cluster.running
    refs = [parent.submit(cluster.template(parent, name))[0] for name in "gh"]
    parent.get(refs[1:])
    cluster.run()
    (child,) = cluster.running
    assert child.running is not None
    assert child.running.task == refs[1][:-4]
    child.finish()
    cluster.run()
    assert cluster.running == [parent]


def test_what_an_awaited_task_needs_goes_first_too():
    cluster = Cluster([1])
    driver = cluster.add_driver()
    for name in "fgg":
        driver.submit(cluster.template(driver, name))
    cluster.run()
    (parent,) = cluster.running
    needed = parent.submit(cluster.template(parent, "g"))
    (ref,) = parent.submit(cluster.template(parent, "h"), needed)
    parent.get([ref])
    for expected in (*needed, ref):
        cluster.run()
        (worker,) = cluster.running
        assert worker.running is not None
        assert worker.running.task == expected[:-4]
        worker.finish()


@pytest.mark.parametrize("cpus", [[1], [2], [0, 1], [1, 1]])
@pytest.mark.parametrize("seconds", [SHORT, LONG])
def test_recursive_tasks_need_as_many_processes_as_they_are_deep(cpus, seconds):
    # def fib(n): return n if n < 2 else sum(get([fib.remote(n - 1), fib.remote(n - 2)]))
    depth, random = 9, Random(f"{cpus} {seconds}")
    cluster = Cluster(cpus)
    driver = cluster.add_driver()
    (root,) = driver.submit(cluster.template(driver, "fib"))
    driver.get([root])
    numbers, asked, most = {root[:-4]: depth}, set(), 0
    while (links := cluster.choices()) or cluster.running:
        if links and (not cluster.running or random.random() < 0.7):
            cluster.deliver(random.choice(links))
            continue
        worker = random.choice(cluster.running)
        assert worker.running is not None
        task = worker.running.task
        if numbers[task] < 2 or task in asked:
            worker.finish(seconds=seconds)
        else:
            asked.add(task)
            refs = [worker.submit(cluster.template(worker, "fib"))[0] for _ in range(2)]
            numbers |= {refs[0][:-4]: numbers[task] - 1, refs[1][:-4]: numbers[task] - 2}
            worker.get(refs)
        most = max(most, len(cluster.workers))
    assert root in driver.values
    assert most <= (depth + 2) * sum(cpus)


@pytest.mark.parametrize("cpus", [[1], [2]])
def test_many_parents_that_wait_for_a_child_need_few_processes(cpus):
    cluster = Cluster(cpus)
    driver = cluster.add_driver()
    refs = [driver.submit(cluster.template(driver, "parent"))[0] for _ in range(200)]
    driver.get(refs)
    cluster.run(check=False)
    parents: set[bytes] = set()
    most = 0
    while cluster.running:
        worker = cluster.running[0]
        assert worker.running is not None
        task = worker.running.task
        if task + refs[0][-4:] in refs and task not in parents:
            parents.add(task)
            worker.get(worker.submit(cluster.template(worker, "child")))
        else:
            worker.finish(seconds=SHORT)
        cluster.run(check=False)
        most = max(most, len(cluster.workers))
    assert driver.values.keys() == set(refs)
    assert most <= 3 * sum(cpus)


@pytest.mark.parametrize("cpus", [[1], [0, 1]])
def test_a_task_that_lacks_an_argument_holds_up_nobody(cpus):
    cluster = Cluster(cpus)
    driver = cluster.add_driver()
    f, g = cluster.template(driver, "f"), cluster.template(driver, "g")
    (slow,) = driver.submit(cluster.template(driver, "slow", resources={}))
    (lacking,) = driver.submit(f, [slow])
    others = [driver.submit(template)[0] for template in (f, g, f, g)]
    driver.get([*others, lacking])
    cluster.run()
    for _ in others:
        worker = next(w for w in cluster.running if w.running and w.running.task != slow[:-4])
        worker.finish()
        cluster.run()
    assert driver.values.keys() == set(others)
    finish_all(cluster)
    assert lacking in driver.values


@pytest.mark.parametrize("cpus", [[1], [0, 1]])
def test_a_class_whose_resources_are_missing_holds_up_no_other(cpus):
    cluster = Cluster(cpus, extra={"GPU": UNIT})
    driver = cluster.add_driver()
    gpu = cluster.template(driver, "gpu", resources={"GPU": UNIT})
    for _ in range(6):
        driver.submit(gpu)  # all GPUs are in use
    driver.submit(cluster.template(driver, "never", resources={"TPU": UNIT}))
    cluster.run()
    others = [driver.submit(cluster.template(driver, "f"))[0] for _ in range(5)]
    driver.get(others)
    for _ in others:
        cluster.run()
        cluster.now += LEASE_SECONDS
        next(w for w in cluster.running if w.running and w.running.task + others[0][-4:] in others).finish(seconds=LONG)
    cluster.run()
    assert driver.values.keys() == set(others)


@pytest.mark.parametrize(
    ("cpus", "seconds"),
    [([1], (LONG, LONG)), ([4], (LONG, LONG)), ([0, 2, 2], (LONG, LONG)), ([1, 1], (LONG, LONG)), ([4], (LONG, 5.0))],
)
def test_two_drivers_share_the_workers(cpus, seconds):
    cluster = Cluster(cpus)
    drivers = [cluster.add_driver() for _ in range(2)]
    for driver in drivers:
        for name in "ff" if driver is drivers[0] else "fg":
            for _ in range(150):
                driver.submit(cluster.template(driver, name))
    cluster.run(check=False)
    busy = {driver.job: 0.0 for driver in drivers}
    ends: dict[Process, float] = {}
    end = 0.0
    while end < 20 * max(seconds):
        running = cluster.running
        for worker in running:
            ends.setdefault(worker, cluster.now + seconds[worker.job == drivers[1].job])
        worker = min(running, key=lambda worker: ends[worker])
        step = max(0.0, ends.pop(worker) - cluster.now)
        for other in running:
            busy[other.job] += step
        end += step
        cluster.now += step
        worker.finish(seconds=seconds[worker.job == drivers[1].job])
        for driver in drivers:
            driver.submit(cluster.template(driver, "f"))
        cluster.run(check=False)
    shares = sorted(busy.values())
    assert shares[0] > 0.35 * sum(shares), busy


@pytest.mark.parametrize("cpus", [[1], [0, 1]])
@pytest.mark.parametrize("seconds", [SHORT, LONG])
def test_tasks_of_a_class_start_in_the_order_in_which_they_came(cpus, seconds):
    cluster = Cluster(cpus)
    driver = cluster.add_driver()
    tasks = [driver.submit(cluster.template(driver, "f"))[0][:-4] for _ in range(60)]
    cluster.run(check=False)
    worker = cluster.running[0]
    assert finish_all(cluster, seconds=seconds) == 60
    assert worker.ran == tasks
