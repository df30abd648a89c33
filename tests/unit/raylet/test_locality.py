"""Tasks go where most of their arguments are, if that is far away, much, and has room."""

from __future__ import annotations

import pytest

from hpcray.raylet.queues import HomeQueue
from hpcray.raylet.tasks import WORTH_ASKING
from hpcray.testing.cluster import Cluster
from hpcray.testing.process import Process

LARGE = WORTH_ASKING + 64
ARENA = 8 * WORTH_ASKING


def with_object_on(rank: int, size: int, *, machines: tuple[str, ...] = ()) -> tuple[Cluster, Process, bytes]:
    """A job of three ranks, and a result that lies on one of them."""
    cluster = Cluster([2, 2, 2], arena_size=ARENA, machines=machines)
    driver = cluster.add_driver()
    make = cluster.template(driver, "make", node=rank)
    (made,) = driver.submit(make)
    cluster.run(check=False)
    cluster.worker_on(rank).finish(size=size, large=True)
    cluster.run(check=False)
    return cluster, driver, made


def ranks_of(cluster: Cluster, driver: Process, made: bytes, count: int = 1) -> list[int]:
    use = cluster.template(driver, "use")
    for _ in range(count):
        driver.submit(use, [made])
    cluster.run(check=False)
    return sorted(worker.rank for worker in cluster.running)


@pytest.mark.parametrize("rank", [1, 2])
def test_a_task_goes_where_its_large_argument_is(rank):
    assert ranks_of(*with_object_on(rank, LARGE)) == [rank]


def test_a_small_argument_is_brought_to_where_the_task_was_made():
    assert ranks_of(*with_object_on(2, WORTH_ASKING // 2)) == [0]


def test_on_one_host_nothing_has_to_be_moved():
    assert ranks_of(*with_object_on(2, LARGE, machines=("a", "a", "a"))) == [0]


def test_what_finds_no_room_near_its_argument_runs_elsewhere():
    assert ranks_of(*with_object_on(2, LARGE), count=6) == [0, 0, 1, 1, 2, 2]


def test_a_strategy_is_stronger():
    cluster, driver, made = with_object_on(2, LARGE)
    bound = cluster.template(driver, "bound", node=1)
    driver.submit(bound, [made])
    cluster.run(check=False)
    assert [worker.rank for worker in cluster.running] == [1]


class Item:
    is_awaited = False


def test_a_grant_takes_first_what_would_rather_run_there():
    queue: HomeQueue[Item] = HomeQueue()
    items = {name: Item() for name in (b"a", b"b", b"c", b"d")}
    for name, part in ((b"a", None), (b"b", 1), (b"c", 2), (b"d", 2)):
        queue.part(part).push(name, items[name])
    assert (len(queue), queue.count_here, queue.near()) == (4, 1, {1: 1, 2: 2})
    assert queue.pop_for(2) is items[b"c"]
    assert queue.hasten(b"d"), "who is waited for does not wait for a place far away"
    assert queue.near() == {1: 1}
    assert queue.pop_for(2) is items[b"d"]
    assert queue.pop_for(7) is items[b"a"]
    assert queue.pop_for(7) is items[b"b"]
    assert not queue
    assert not queue.away
