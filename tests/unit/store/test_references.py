"""References over several raylets: each test is a small program, written above it, under orders of delivery that are meant.

What programs on one or two ranks can bring about is in test_table.py; here it takes three, a death, or a second process.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from hpcray import ids, payload
from hpcray.exceptions import InternalError
from hpcray.protocol import messages as m
from hpcray.store.entry import Entry
from hpcray.store.references import References
from hpcray.testing.cluster import Cluster, Link
from hpcray.testing.process import Process

FOR_EVER = -1


@pytest.fixture(params=range(15))
def order(request: pytest.FixtureRequest) -> Callable[[list[Any]], Any]:
    """One of many orders in which messages arrive."""
    return Random(request.param).choice


@pytest.fixture
def cluster() -> Cluster:
    return Cluster([1, 1, 1])


@pytest.fixture
def driver(cluster: Cluster) -> Process:
    return cluster.add_driver()


def run_on(cluster: Cluster, process: Process, rank: int, nested: list[bytes], **options: Any) -> tuple[bytes, Process]:
    """`f.options(node=rank).remote(nested)`: the reference of its result, and the worker that runs it."""
    template = cluster.template(process, f"on{rank}", node=rank, resources={}, **options)
    (result,) = process.submit(template, [], nested)
    cluster.run()
    (worker,) = [w for w in cluster.running if w.running is not None and w.running.task == ids.task_of(result)]
    return result, worker


def put_on(cluster: Cluster, driver: Process, rank: int, nested: list[bytes] | None = None) -> bytes:
    """`get(f.options(node=rank).remote(nested))[0]`, where f returns `[put(nested)]`: only the driver has it then."""
    result, worker = run_on(cluster, driver, rank, nested or [])
    made = worker.put(nested or [])
    worker.finish([made])
    cluster.run()
    driver.release([result])
    cluster.run()
    return made


def exists(cluster: Cluster, identifier: bytes) -> bool:
    entry = cluster.ranks[ids.home_of(identifier)].core.table.entries.get(identifier)
    return entry is not None and not payload.is_error(entry.data or b"\0")


def let_go_of_everything(cluster: Cluster) -> None:
    cluster.run()
    for process in cluster.processes:
        process.release(list(process.held))
    cluster.run()
    assert cluster.leftovers() == []


# ------------------------------------------------------------------------------------- releases and borrows under way
def test_the_release_of_a_container_waits_for_the_borrow_of_what_was_taken_out(cluster, driver):
    # x = get(outer)[0]; del outer          outer lives on rank 1, x on rank 2; the borrow of x is slow
    x = put_on(cluster, driver, 2)
    outer = put_on(cluster, driver, 1, [x])
    driver.release([x])
    cluster.run()
    slow: list[Link] = [("rank", 0, 2)]
    driver.get([outer])
    cluster.run(hold=slow)
    assert x in driver.held
    driver.release([outer])
    cluster.run(hold=slow)
    assert exists(cluster, outer)
    assert exists(cluster, x)
    cluster.run()
    assert not exists(cluster, outer)
    driver.get([x])
    cluster.run()
    assert x in driver.values
    assert not driver.errors
    let_go_of_everything(cluster)


def test_the_end_of_a_task_waits_for_the_borrow_of_what_it_keeps(cluster, driver):
    # f.remote([x]); del x                  def f(refs): global kept; kept = refs        x lives on a third rank
    x = put_on(cluster, driver, 2)
    slow: list[Link] = [("rank", 1, 2)]
    driver.submit(cluster.template(driver, "f", node=1, resources={}), [], [x])
    driver.release([x])
    cluster.run(hold=slow)
    worker = cluster.worker_on(1)
    worker.finish(keep=True)
    cluster.run(hold=slow)
    assert exists(cluster, x)
    cluster.run()
    worker.get([x])
    cluster.run()
    assert not worker.errors
    let_go_of_everything(cluster)


def test_the_first_of_two_borrows_that_is_counted_does_not_end_the_waiting(cluster, driver):
    # f.remote([x, y]); del x, y            x lives on rank 2, y on rank 0, which is quicker to count
    x, y = put_on(cluster, driver, 2), driver.put()
    slow: list[Link] = [("rank", 1, 2)]
    (result,) = driver.submit(cluster.template(driver, "f", node=1, resources={}), [], [x, y])
    driver.release([x, y])
    cluster.run(hold=slow)
    cluster.worker_on(1).finish(keep=True)
    cluster.run(hold=slow)
    assert result not in driver.values
    assert exists(cluster, x)
    cluster.run()
    assert result in driver.values
    let_go_of_everything(cluster)


def test_a_reference_that_is_taken_again_while_its_release_waits_is_borrowed_again(cluster, driver):
    # kept = refs; del kept; kept = refs    on rank 1, while the borrow of something else is slow
    x, y = driver.put(), put_on(cluster, driver, 2)
    _, worker = run_on(cluster, driver, 1, [x])
    worker.release([x])
    cluster.run()
    worker.adopt([x])
    cluster.run()
    slow: list[Link] = [("rank", 2, 1)]
    worker.adopt([y])
    worker.release([x])
    worker.adopt([x])
    cluster.run(hold=slow)
    worker.finish(keep=True)
    driver.release([x, y])
    cluster.run()
    assert exists(cluster, x)
    worker.get([x, y])
    cluster.run()
    assert not worker.errors
    let_go_of_everything(cluster)


# -------------------------------------------------------------------------------------------------------- containers
def test_a_reference_in_a_container_in_a_container_is_returned(cluster, driver, order):
    # def f(): return [put([put(1)])]       outer = f.remote(); get(get(get(outer)[0])[0])
    (outer,) = driver.submit(cluster.template(driver, "f", node=1))
    cluster.run(order)
    worker = cluster.worker_on(1)
    inner = worker.put()
    middle = worker.put([inner])
    worker.finish([middle])
    cluster.run(order)
    driver.release([outer])
    cluster.run(order)
    assert driver.held == {middle}
    assert exists(cluster, inner)
    driver.get([middle])
    cluster.run(order)
    driver.release([middle])
    driver.get([inner])
    cluster.run(order)
    assert inner in driver.values
    assert not driver.errors
    let_go_of_everything(cluster)


def test_containers_on_three_ranks_are_freed_from_the_outside_in(cluster, driver, order):
    # x = put(1) on 2; y = put([x]) on 1; z = put([y]) on 0; del x, y; del z
    x = put_on(cluster, driver, 2)
    y = put_on(cluster, driver, 1, [x])
    z = driver.put([y])
    driver.release([x, y])
    cluster.run(order)
    assert all(exists(cluster, i) for i in (x, y, z))
    driver.release([z])
    cluster.run(order)
    assert not any(exists(cluster, i) for i in (x, y, z))
    let_go_of_everything(cluster)


# --------------------------------------------------------------------------------------------------- arguments, actors
def test_a_reference_in_the_arguments_of_a_task_that_cannot_start_lives(cluster, driver, order):
    # f.remote(slow.remote(), [x]); del x
    x = put_on(cluster, driver, 2)
    (slow,) = driver.submit(cluster.template(driver, "slow", node=1))
    driver.submit(cluster.template(driver, "f", node=2, resources={}), [slow], [x])
    driver.release([x, slow])
    cluster.run(order)
    assert exists(cluster, x)
    cluster.worker_on(1).finish()
    cluster.run(order)
    worker = cluster.worker_on(2)
    worker.get([x])
    cluster.run(order)
    assert x in worker.values
    worker.finish()
    let_go_of_everything(cluster)


def test_what_a_task_was_to_get_is_freed_when_it_can_never_start(cluster, driver, order):
    # f.remote(fails.remote(), [x]); del x
    x = put_on(cluster, driver, 2)
    (fails,) = driver.submit(cluster.template(driver, "fails", node=1))
    driver.submit(cluster.template(driver, "f", node=2), [fails], [x])
    driver.release([x, fails])
    cluster.run(order)
    cluster.worker_on(1).finish(failed=True)
    cluster.run(order)
    assert not exists(cluster, x)
    let_go_of_everything(cluster)


def actor_that_keeps(cluster, driver, order):
    """An actor on rank 1 that alone keeps a reference homed on rank 2: the actor, its worker, the object."""
    x = put_on(cluster, driver, 2)
    actor = driver.create_actor(
        cluster.template(driver, "A", node=1, resources={}, num_returns=0, actor=m.ActorOptions())
    )
    cluster.run(order)
    host = cluster.worker_on(1)
    host.finish()
    driver.call(actor, [], [x])
    driver.release([x])
    cluster.run(order)
    host.finish(keep=True)
    cluster.run(order)
    return actor, host, x


def test_a_reference_that_an_actor_keeps_lives_until_the_actor_ends(cluster, driver, order):
    # a.keep.remote([x]); del x; a.read.remote(); del a
    actor, host, x = actor_that_keeps(cluster, driver, order)
    assert exists(cluster, x)
    driver.call(actor)
    cluster.run(order)
    host.get([x])
    cluster.run(order)
    assert not host.errors
    host.finish(keep=True)
    driver.release([ids.object_id(actor, 0)])
    cluster.run(order)
    assert host.is_gone
    assert not exists(cluster, x)
    let_go_of_everything(cluster)


def test_what_an_actor_kept_is_freed_when_its_worker_is_killed(cluster, driver, order):
    # a.keep.remote([x]); del x; kill -9
    _, host, x = actor_that_keeps(cluster, driver, order)
    cluster.kill(host)
    cluster.run(order)
    assert not exists(cluster, x)
    let_go_of_everything(cluster)


# -------------------------------------------------------------------------------------------------------------- deaths
def test_the_arguments_of_a_task_that_is_tried_again_live(cluster, driver, order):
    # f.options(max_retries=-1).remote([x]); del x        and the first worker dies with the reference
    x = put_on(cluster, driver, 2)
    template = cluster.template(driver, "f", node=1, resources={}, max_retries=FOR_EVER)
    driver.submit(template, [], [x])
    driver.release([x])
    for _ in range(2):
        cluster.run(order)
        cluster.kill(cluster.worker_on(1))
    cluster.run(order)
    worker = cluster.worker_on(1)
    worker.get([x])
    cluster.run(order)
    assert x in worker.values
    worker.finish()
    let_go_of_everything(cluster)


def test_a_borrower_that_lent_to_another_may_die(cluster, driver, order):
    # def a(refs): b.remote(refs); os.kill(os.getpid(), 9)          a.remote([x]); del x
    x = driver.put()
    result, first = run_on(cluster, driver, 1, [x])
    driver.release([x, result])
    first.submit(cluster.template(first, "b", node=2, resources={}), [], [x])
    cluster.kill(first)
    cluster.run(order)
    second = cluster.worker_on(2)
    second.get([x])
    cluster.run(order)
    assert x in second.values
    assert not second.errors
    second.finish()
    let_go_of_everything(cluster)


def test_a_worker_that_dies_after_its_result_takes_nothing_of_it_along(cluster, driver, order):
    # def f(refs): return refs              and its process ends before the borrow for the driver is counted
    x = put_on(cluster, driver, 2)
    result, worker = run_on(cluster, driver, 1, [x])
    driver.release([x])
    worker.finish([x])
    cluster.kill(worker)
    cluster.run(order)
    driver.release([result])
    driver.get([x])
    cluster.run(order)
    assert x in driver.values
    assert not driver.errors
    let_go_of_everything(cluster)


# ------------------------------------------------------------------------------------------------------- user pickling
def test_a_pickled_reference_lives_as_long_as_the_job(cluster, driver, order):
    # data = pickle.dumps(x); del x; ...; f.remote(data)        def f(data): get(pickle.loads(data))
    x = put_on(cluster, driver, 2)
    driver.pickle([x])
    driver.release([x])
    cluster.run(order)
    assert exists(cluster, x)
    _, worker = run_on(cluster, driver, 1, [])
    worker.adopt([x])
    worker.get([x])
    cluster.run(order)
    assert x in worker.values
    worker.finish()
    cluster.run(order)
    assert exists(cluster, x)


def test_a_pickled_reference_that_its_process_took_to_the_grave_lives(cluster, driver, order):
    # def f(refs): write(pickle.dumps(refs)); os.kill(os.getpid(), 9)
    x = put_on(cluster, driver, 2)
    _, worker = run_on(cluster, driver, 1, [x])
    driver.release([x])
    worker.pickle([x])
    cluster.kill(worker)
    cluster.run(order)
    assert exists(cluster, x)


def test_a_reference_is_out_of_sight_only_when_its_raylet_has_read_what_made_it(cluster, driver):
    # other_process.send(pickle.dumps(put(1)))      and the other one is quicker to ask than the put to arrive
    other = cluster.add_driver()
    x = driver.put()
    number = driver.pickle([x])
    cluster.run(hold=[("up", 0, driver.number)])
    assert number not in driver.answers
    cluster.run()
    assert number in driver.answers
    other.adopt([x])
    other.get([x])
    cluster.run()
    assert x in other.values
    assert not other.errors


# ------------------------------------------------------------------------------------------------- the core by itself
class Ears:
    """Keeps what the core says, and does with entries what a table would."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, Any]] = []
        self.entries: dict[bytes, Entry] = {}

    def send(self, rank: int, message: Any) -> None:
        self.sent.append((rank, message))

    def on_unreachable(self, entry: Entry) -> None:
        del self.entries[entry.id]

    def on_unused(self, entry: Entry) -> None:
        del self.entries[entry.id]

    def on_used(self, entry: Entry) -> None: ...

    def on_forgotten(self, entry: Entry) -> None: ...


def name(home: int) -> bytes:
    return ids.object_id(ids.task_id(ids.client_prefix(home, b"12345678", 1), 1), 0)


def test_nobody_gives_back_more_than_was_counted():
    ears = Ears()
    references = References(0, ears.entries, ears, ears)
    references.create(name(0))
    references.on_borrow(name(0), 1)
    with pytest.raises(InternalError, match="knows of 1"):
        references.on_unborrow(name(0), 1, 2)
    with pytest.raises(InternalError, match="knows of 0"):
        references.on_unborrow(name(0), 2, 1)
    references.on_unborrow(name(0), 1, 1)
    references.drop(name(0))
    with pytest.raises(InternalError, match="knows of 0"):
        references.on_unborrow(name(0), 1, 1)  # the object is freed


def test_an_object_is_unreachable_when_the_last_of_holds_guests_and_borrowers_is_gone():
    ears = Ears()
    references = References(0, ears.entries, ears, ears)
    references.create(name(0))
    references.add_guest(name(0))
    references.on_borrow(name(0), 1)
    references.on_borrow(name(0), 1)
    references.drop(name(0))
    references.on_unborrow(name(0), 1, 1)
    references.drop_guest(name(0))
    assert name(0) in ears.entries
    references.on_unborrow(name(0), 1, 1)
    assert not ears.entries


def test_what_waits_for_borrows_that_are_counted_out_of_order_waits_for_the_last():
    ears = Ears()
    references = References(0, ears.entries, ears, ears)
    done: list[str] = []
    references.hold(name(1))
    references.hold(name(2))
    references.after_borrows(lambda: done.append("both"))
    references.hold(name(3))
    references.on_borrowed(2)
    assert not done
    references.on_borrowed(1)
    assert done == ["both"]
    references.on_borrowed(3)
    references.check()
