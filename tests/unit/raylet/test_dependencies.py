"""Arguments of work: prefetched, fetched when the work could run, pinned until it does, and never in each other's way."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from hpcray import ids, payload
from hpcray.protocol import messages as m
from hpcray.raylet.clients import Work
from hpcray.raylet.dependencies import Claims
from hpcray.resources import UNIT
from hpcray.testing.cluster import Cluster
from hpcray.testing.process import Process

ARENA = 1 << 14
BIG = 5000
"""Bytes of an argument: an arena has room for three, and two of them are more than bundles may hold together."""


def two_hosts(cpus: int = 1, **options: Any) -> tuple[Cluster, Process]:
    cluster = Cluster([1, cpus], arena_size=ARENA, **options)
    return cluster, cluster.add_driver()


def on_1(cluster: Cluster, process: Process, name: str = "f", **options: Any) -> bytes:
    return cluster.template(process, name, node=1, **options)


def put(cluster: Cluster, process: Process, size: int = BIG) -> bytes:
    ref = process.put(size=size, large=True)
    cluster.run()
    return ref


def finish_all(cluster: Cluster, order: Any = lambda links: links[0]) -> list[bytes]:
    """Let every task end that runs, until none does; in which order they ran."""
    ran: list[bytes] = []
    cluster.run(order)
    while running := cluster.running:
        assert running[0].running is not None
        ran.append(running[0].running.task)
        running[0].finish()
        cluster.run(order)
    return ran


def arguments(cluster: Cluster, rank: int = 1) -> Any:
    return cluster.ranks[rank].core.pool.arguments


def release_all(cluster: Cluster) -> None:
    for process in cluster.processes:
        process.release(list(process.held))
    cluster.run()
    assert cluster.leftovers() == []


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_bundles_may_believe_an_object_to_have_different_sizes(order):
    bundles = [{b"x": 5000, b"y": 10}, {b"x": 100}]
    claims = Claims()
    claims.add(bundles[0])
    assert claims.added(bundles[1]) == 0
    claims.add(bundles[1])
    assert claims.size == 5010
    for index in order:
        claims.remove(bundles[index])
    assert claims.size == 0


@pytest.mark.parametrize("seed", range(5))
def test_tasks_whose_arguments_do_not_fit_together_run_one_after_the_other(seed):
    # [f.remote(x, y) for x, y in pairs]        # of each pair, two thirds of the arena
    cluster, driver = two_hosts(2)
    refs = []
    for _ in range(4):
        pair = [put(cluster, driver), put(cluster, driver)]
        refs += driver.submit(on_1(cluster, driver), pair)
        driver.release(pair)
    assert len(finish_all(cluster, Random(seed).choice)) == 4
    driver.get(refs)
    cluster.run()
    assert not driver.errors
    assert not arguments(cluster)._active
    release_all(cluster)


def test_tasks_that_share_an_argument_run_together():
    cluster, driver = two_hosts(4)
    x = put(cluster, driver, 6000)
    for _ in range(4):
        driver.submit(on_1(cluster, driver), [x])
    cluster.run()
    assert len(cluster.running) == 4
    finish_all(cluster)
    release_all(cluster)


def test_arguments_that_can_never_fit_are_an_error_of_that_task_alone():
    cluster, driver = two_hosts(1)
    refs = [put(cluster, driver) for _ in range(4)]
    (bad,) = driver.submit(on_1(cluster, driver), refs)
    (good,) = driver.submit(on_1(cluster, driver), refs[:1])
    cluster.run()
    finish_all(cluster)
    driver.get([bad, good, *refs])
    cluster.run()
    assert driver.errors.keys() == {bad}
    error, (text, *_) = payload.describe_system_error(driver.errors[bad])
    assert error == "ObjectStoreFullError"
    assert f"{ARENA:,}" in text
    release_all(cluster)


def test_arguments_are_pinned_from_the_time_when_their_task_could_run_until_it_does():
    cluster, driver = two_hosts(1)
    x = put(cluster, driver)
    driver.submit(on_1(cluster, driver), [x])
    core = cluster.ranks[1].core
    pins = []
    while links := cluster.choices():
        cluster.deliver(links[0])
        if (entry := core.table.entries.get(x)) is not None and entry.block is not None:
            pins.append(entry.block.pins)
    assert min(pins) >= 1
    assert not arguments(cluster)._active
    finish_all(cluster)
    assert core.table.entries[x].block.pins == 0
    release_all(cluster)


def test_a_prefetched_argument_that_made_room_for_something_else_is_fetched_again():
    # a.slow.remote(); a.use.remote(x)          # x comes meanwhile, and goes again
    cluster, driver = two_hosts(1)
    x = put(cluster, driver)
    driver.submit(on_1(cluster, driver))
    cluster.run()
    core = cluster.ranks[1].core
    work_before = cluster.worker_on(1)
    # Two ranks may grant at once: the task comes although the CPU is taken.
    entry = cluster.ranks[0].core.table.entries[x]
    template = on_1(cluster, driver)
    cluster.run()
    task = driver.new_id()
    core.on_peer_message(0, m.Execute(task, 0, template, b"\0" + b"", [m.RemoteDependency(x, entry.size, [0])]))
    cluster.ranks[1].end_turn()
    cluster.run()
    here = core.table.entries[x]
    assert here.block is not None  # prefetched
    assert here.block.pins == 0
    for _ in range(3):
        work_before.put(size=BIG, large=True)
    cluster.run()
    assert here.block is None  # it made room
    assert core.pool.arguments.count_missing(template) + len(core.pool.ready.get(template, ())) == 1


def spilled_puts(cluster: Cluster, process: Process, *sizes: int) -> list[bytes]:
    """Objects that do not fit into the driver's store together, put one after the other."""
    refs = []
    for size in sizes:
        refs.append(put(cluster, process, size))
        for _ in range(3):
            cluster.advance(1.0)
            cluster.run()
    return refs


def seconds_until(cluster: Cluster, is_over: Callable[[], bool]) -> int:
    """How long nothing happens before it is over."""
    for waited in range(100):
        cluster.run()
        if is_over():
            return waited
        cluster.advance(1.0)
    raise AssertionError("it is never over")


@pytest.mark.parametrize("later", [0, 10])
def test_a_result_does_not_wait_behind_arguments_that_wait_for_its_task(later):
    cluster, driver = two_hosts(2)
    template = on_1(cluster, driver)
    x, y = spilled_puts(cluster, driver, 8000, 10_000)
    (first,) = driver.submit(template, [x])
    cluster.run()
    (worker,) = cluster.running
    (second,) = driver.submit(template, [y])
    cluster.run()
    assert len(cluster.running) == 1
    for _ in range(later):
        cluster.advance(1.0)
        cluster.run()
    worker.finish(size=3000, large=True)
    driver.watch([first])
    assert seconds_until(cluster, lambda: first in driver.ready) == 0
    finish_all(cluster)
    driver.get([first, second])
    cluster.run()
    assert not driver.errors
    release_all(cluster)


def test_a_get_does_not_wait_behind_arguments_that_wait_for_its_task():
    cluster, driver = two_hosts(2)
    template = on_1(cluster, driver)
    x, z, y = spilled_puts(cluster, driver, 8000, 3000, 10_000)
    (first,) = driver.submit(template, [x], nested=[z])
    cluster.run()
    (worker,) = cluster.running
    (second,) = driver.submit(template, [y])
    cluster.run()
    worker.get([z])
    assert seconds_until(cluster, lambda: z in worker.values) == 0
    finish_all(cluster)
    driver.get([first, second])
    cluster.run()
    assert not driver.errors
    release_all(cluster)


def test_a_result_does_not_wait_for_ever_for_room_that_arguments_have_pinned():
    # One of the second task's arguments is here, the other has no room before the first task ends, which needs some itself.
    cluster, driver = two_hosts(2)
    template = on_1(cluster, driver)
    x, y, z = spilled_puts(cluster, driver, 4000, 7000, 6000)
    (first,) = driver.submit(template, [x])
    cluster.run()
    (worker,) = cluster.running
    (second,) = driver.submit(template, [y, z])
    cluster.run()
    assert len(cluster.running) == 1
    worker.finish(size=8000, large=True)
    driver.watch([first])
    assert seconds_until(cluster, lambda: first in driver.ready) <= 2
    assert seconds_until(cluster, lambda: bool(cluster.running)) <= 2
    finish_all(cluster)
    driver.get([first, second])
    cluster.run()
    assert not driver.errors
    release_all(cluster)


@pytest.mark.parametrize("seed", range(10))
def test_two_ranks_that_need_what_the_other_has_on_disk_do_not_wait_for_each_other_for_long(seed):
    # Each has one argument of its task here, and has room for just one more: what comes, or what the other wants.
    cluster, driver = two_hosts(1)
    templates = [cluster.template(driver, f"f{rank}", node=rank) for rank in range(2)]
    own: list[list[bytes]] = [[], []]
    for _ in range(3):
        own[0] += spilled_puts(cluster, driver, 7000)
        own[1] += driver.submit(templates[1])
        cluster.run()
        cluster.worker_on(1).finish(size=7000, large=True)
        for _ in range(3):
            cluster.advance(1.0)
            cluster.run()
    refs = driver.submit(templates[1], [own[1][2], own[0][0]]) + driver.submit(templates[0], [own[0][2], own[1][0]])
    order = Random(seed).choice
    ran: list[bytes] = []
    waited = 0
    while len(ran) < len(refs):
        ran += finish_all(cluster, order)
        cluster.advance(1.0)
        waited += 1
    assert waited <= 5
    driver.get(refs)
    cluster.run()
    assert not driver.errors
    release_all(cluster)


def test_an_argument_in_the_middle_of_the_memory_is_no_obstacle_to_the_others():
    cluster, driver = two_hosts(1)
    table = cluster.ranks[1].core.table
    blocks: list[Any] = []
    table.memory.reserve(b"before it", 5120, blocks.append)
    x, y = spilled_puts(cluster, driver, 5000, 8000)
    work = [bundle_of(cluster, ref, template) for ref, template in ((x, b"x"), (y, b"y"))]
    work[1].dependencies[:0] = work[0].dependencies
    dependencies = arguments(cluster)
    told: list[Work] = []
    assert not dependencies.add(work[0], lambda: told.append(work[0]))
    dependencies.activate(lambda template: int(template == b"x"))
    cluster.ranks[1].end_turn()
    cluster.run()
    assert told == [work[0]]
    assert not dependencies.add(work[1], lambda: told.append(work[1]))
    dependencies.activate(lambda template: int(template == b"y"))
    cluster.ranks[1].end_turn()
    table.memory.abandon(blocks[0])
    assert table.entries[x].block.pins
    assert table.memory.largest_free < 8000
    assert seconds_until(cluster, lambda: told[-1] is work[1]) <= 2
    for each in work:
        dependencies.release(each)
    cluster.ranks[1].end_turn()
    release_all(cluster)


def bundle_of(cluster: Cluster, identifier: bytes, template: bytes) -> Work:
    """Work that came to rank 1 and needs one object, of a class that the pool itself has no place for."""
    resources = {"absent": UNIT}
    cluster.ranks[1].core.templates[template] = m.Template(b"", b"", "f", 1, resources, 0)
    size = cluster.ranks[0].core.table.entries[identifier].size
    return Work(identifier[:-4], 0, 0, template, b"", [m.RemoteDependency(identifier, size, [0])])


def test_pinned_arguments_of_work_that_cannot_run_give_way():
    # Two classes: the first could run, and its arguments came; then its place was taken, and only the second can run.
    cluster, driver = two_hosts(1)
    x, y = put(cluster, driver), put(cluster, driver)
    dependencies = arguments(cluster)
    first, second = bundle_of(cluster, x, b"first"), bundle_of(cluster, y, b"second")
    told: list[Work] = []
    for work in (first, second):
        assert not dependencies.add(work, lambda work=work: told.append(work))
    dependencies.activate(lambda template: int(template == b"first"))
    cluster.ranks[1].end_turn()
    cluster.run()
    assert told == [first]
    table = cluster.ranks[1].core.table
    assert table.entries[x].block.pins == 1
    dependencies.activate(lambda template: int(template == b"second"))
    assert table.entries[x].block.pins == 0
    cluster.ranks[1].end_turn()
    cluster.run()
    assert told == [first, second]
    assert dependencies.take(first, lambda: None)  # nothing has needed its room
    for work in (first, second):
        dependencies.release(work)
    cluster.ranks[1].end_turn()
    release_all(cluster)


def test_a_bundle_that_is_on_its_way_does_not_give_way():
    cluster, driver = two_hosts(1)
    x, y = put(cluster, driver), put(cluster, driver)
    dependencies = arguments(cluster)
    first, second = bundle_of(cluster, x, b"first"), bundle_of(cluster, y, b"second")
    told: list[Work] = []
    for work in (first, second):
        assert not dependencies.add(work, lambda work=work: told.append(work))
    dependencies.activate(lambda template: int(template == b"first"))
    dependencies.activate(lambda template: int(template == b"second"))
    assert list(dependencies._active) == [first]
    cluster.ranks[1].end_turn()
    cluster.run()
    assert told[0] is first
    for work in (first, second):
        dependencies.release(work)
    cluster.ranks[1].end_turn()
    release_all(cluster)


def test_calls_whose_arguments_do_not_fit_together_keep_their_order():
    cluster, driver = two_hosts(1)
    actor = driver.create_actor(
        cluster.template(driver, "A", resources={}, num_returns=0, node=1, actor=m.ActorOptions())
    )
    cluster.run()
    cluster.worker_on(1).finish()
    cluster.run()
    calls = []
    for _ in range(6):
        x = put(cluster, driver, 6000)
        calls += driver.call(actor, [x])
        driver.release([x])
    host = next(worker for worker in cluster.workers if worker.actor)
    finish_all(cluster, Random(3).choice)
    assert host.called == sorted(host.called)
    assert len(host.called) == 6
    driver.get(calls)
    cluster.run()
    assert not driver.errors
    release_all(cluster)


def test_calls_of_an_actor_that_is_ended_while_their_arguments_come_are_answered_at_once():
    cluster, driver = two_hosts(1)
    actor = driver.create_actor(
        cluster.template(driver, "A", resources={}, num_returns=0, node=1, actor=m.ActorOptions())
    )
    cluster.run()
    cluster.worker_on(1).finish()
    x = put(cluster, driver)
    (call,) = driver.call(actor, [x])
    hold = {("rank", 1, 0)}
    cluster.run(hold=hold)  # the pull is under way
    driver.send(m.Kill(actor, True))
    cluster.run(hold=hold)
    cluster.run()
    driver.get([call])
    cluster.run()
    assert payload.describe_system_error(driver.errors[call])[0] == "ActorDiedError"
    release_all(cluster)


def test_arguments_too_large_for_a_prefetch_are_fetched_when_another_class_gives_its_place_up():
    # A task on rank 1 starts another there, just before one from rank 0 comes: that has no place then.
    cluster = Cluster([0, 1], arena_size=1 << 13)
    driver = cluster.add_driver()
    large = put(cluster, driver)
    driver.submit(on_1(cluster, driver, "parent", resources={}))
    cluster.run()
    parent = cluster.worker_on(1)
    late = {("rank", 0, 1)}
    (ref,) = driver.submit(on_1(cluster, driver), [large])
    cluster.run(hold=late)
    parent.submit(cluster.template(parent, "child"))
    cluster.run(hold=late)
    (child,) = (worker for worker in cluster.running if worker is not parent)
    cluster.run()
    child.finish(keep=True)
    cluster.run()
    assert ids.task_of(ref) in {worker.running.task for worker in cluster.running if worker.running}
