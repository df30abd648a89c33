"""References and memory: first the scenarios that programs bring about, then the table by itself, case by case."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from hpcray import ids, payload
from hpcray.exceptions import InternalError
from hpcray.protocol import messages as m
from hpcray.store.allocator import Allocator
from hpcray.store.entry import ARGUMENT, AWAY, GET, HERE, INLINE, MAPPED, SPILLED
from hpcray.store.memory import STANDSTILL, Block
from hpcray.store.table import ObjectTable
from hpcray.testing.cluster import Cluster
from hpcray.testing.process import Process
from tests.unit.store.lone_table import (
    FAR,
    FARTHER,
    ME,
    NEIGHBOUR,
    PATIENCE,
    SIZE,
    ask,
    borrowed,
    fetch,
    name,
    need,
    write,
)

ORDERS = 15


@pytest.fixture(params=range(ORDERS))
def order(request: pytest.FixtureRequest) -> Callable[[list[Any]], Any]:
    """One of many orders in which messages arrive."""
    return Random(request.param).choice


def three_hosts() -> tuple[Cluster, Process]:
    cluster = Cluster([1, 1, 1])
    return cluster, cluster.add_driver()


def on(cluster: Cluster, process: Process, rank: int, **options: Any) -> bytes:
    return cluster.template(process, f"on{rank}", node=rank, **options)


def let_go_of_everything(cluster: Cluster, order: Callable[[list[Any]], Any]) -> None:
    cluster.run(order)
    for process in cluster.processes:
        process.release(list(process.held))
    cluster.run(order)
    assert cluster.leftovers() == []


# --------------------------------------------------------------------------------------------------------- references
def test_an_object_lives_as_long_as_the_object_that_holds_it(order):
    # inner = put(1); outer = put([inner]); del inner; get(get(outer)[0])
    cluster, driver = three_hosts()
    inner = driver.put()
    outer = driver.put([inner])
    driver.release([inner])
    cluster.run(order)
    driver.get([outer])
    cluster.run(order)
    driver.get([inner])
    cluster.run(order)
    assert driver.values.keys() == {outer, inner}
    assert not driver.errors
    let_go_of_everything(cluster, order)


def test_an_argument_lives_until_the_task_has_run(order):
    # ref = f.remote([put(1)])    # nobody but the task has the inner reference
    cluster, driver = three_hosts()
    inner = driver.put()
    driver.submit(on(cluster, driver, 1), nested=[inner])
    driver.release([inner])
    cluster.run(order)
    worker = cluster.worker_on(1)
    worker.get([inner])
    cluster.run(order)
    assert inner in worker.values
    assert not worker.errors
    worker.finish()
    let_go_of_everything(cluster, order)


def test_a_task_may_keep_a_reference_of_its_argument(order):
    # def f(refs): global kept; kept = refs
    cluster, driver = three_hosts()
    inner = driver.put()
    ref = driver.submit(on(cluster, driver, 1), nested=[inner])
    driver.release([inner])
    cluster.run(order)
    worker = cluster.worker_on(1)
    worker.finish(keep=True)
    driver.release(ref)
    cluster.run(order)
    assert inner in cluster.ranks[0].core.table.entries
    worker.get([inner])
    cluster.run(order)
    assert not worker.errors
    let_go_of_everything(cluster, order)


@pytest.mark.parametrize("large", [False, True])
def test_a_returned_reference_outlives_the_task_that_made_it(order, large):
    # def f(): return [put(1)]
    cluster, driver = three_hosts()
    (ref,) = driver.submit(on(cluster, driver, 1))
    cluster.run(order)
    worker = cluster.worker_on(1)
    inner = worker.put()
    worker.finish([inner], large=large, size=2000 if large else 0)
    cluster.run(order)
    driver.get([ref])
    cluster.run(order)
    driver.release([ref])
    driver.get([inner])
    cluster.run(order)
    assert inner in driver.values
    assert not driver.errors
    let_go_of_everything(cluster, order)


def test_a_returned_reference_may_be_homed_at_a_third_rank(order):
    # x = on2.remote();  y = on1.remote([x]); del x          def on1(refs): return refs
    cluster, driver = three_hosts()
    (first,) = driver.submit(on(cluster, driver, 2))
    cluster.run(order)
    maker = cluster.worker_on(2)
    inner = maker.put()
    maker.finish([inner])
    (second,) = driver.submit(on(cluster, driver, 1), [first])
    driver.release([first])
    cluster.run(order)
    worker = cluster.worker_on(1)
    assert inner in worker.held
    worker.finish([inner])
    cluster.run(order)
    driver.get([second])
    cluster.run(order)
    driver.get([inner])
    cluster.run(order)
    assert inner in driver.values
    assert not driver.errors
    let_go_of_everything(cluster, order)


def test_a_borrower_may_lend_to_another(order):
    # def a(refs): b.remote(refs)      # and returns without waiting
    # a.remote([x]); del x             # b, on a third rank, is the last that holds x
    cluster, driver = three_hosts()
    x = driver.put()
    ref = driver.submit(on(cluster, driver, 1), nested=[x])
    driver.release([x, *ref])
    cluster.run(order)
    first = cluster.worker_on(1)
    first.submit(on(cluster, first, 2), nested=[x])
    first.finish()
    cluster.run(order)
    second = cluster.worker_on(2)
    second.get([x])
    cluster.run(order)
    assert x in second.values
    assert not second.errors
    second.finish()
    let_go_of_everything(cluster, order)


def test_a_release_does_not_overtake_the_borrow_that_it_protects():
    # def f(refs): kept.extend(refs)    # the borrow of the inner one is slow, the end of the task fast
    cluster, driver = three_hosts()
    x = driver.put()
    ref = driver.submit(on(cluster, driver, 1), nested=[x])
    driver.release([x])
    slow = {("rank", 0, 1)}
    cluster.run()
    worker = cluster.worker_on(1)
    worker.finish(keep=True)
    cluster.run(hold=slow)  # the answer to the borrow is under way
    driver.get(ref)
    cluster.run(hold=slow)
    assert x in cluster.ranks[0].core.table.entries
    cluster.run()
    assert x in cluster.ranks[0].core.table.entries
    let_go_of_everything(cluster, lambda links: links[0])


def test_a_reply_waits_until_the_borrows_of_its_references_are_counted():
    # the returned reference is homed at rank 2; rank 0 must be counted there before rank 1 lets go
    cluster, driver = three_hosts()
    (first,) = driver.submit(on(cluster, driver, 2))
    cluster.run()
    maker = cluster.worker_on(2)
    inner = maker.put()
    maker.finish([inner])
    (second,) = driver.submit(on(cluster, driver, 1), [first])
    cluster.run()
    cluster.worker_on(1).finish([inner])
    driver.release([first])
    held = {("rank", 1, 2)}
    cluster.run(hold=held)
    driver.get([second])
    cluster.run(hold=held)
    assert driver.wanted == {second}
    assert inner in cluster.ranks[2].core.table.entries
    cluster.run()
    driver.get([inner])
    cluster.run()
    assert not driver.errors
    let_go_of_everything(cluster, lambda links: links[0])


def test_a_worker_that_dies_while_it_borrows_leaves_no_count(order):
    # def f(refs): os.kill(os.getpid(), 9)
    cluster, driver = three_hosts()
    x = driver.put()
    (ref,) = driver.submit(on(cluster, driver, 1), nested=[x])
    driver.release([x])
    while not cluster.running:
        cluster.deliver(order(cluster.choices()))
    cluster.kill(cluster.worker_on(1))
    driver.get([ref])
    cluster.run(order)
    assert payload.describe_system_error(driver.errors[ref])[0] == "WorkerCrashedError"
    let_go_of_everything(cluster, order)


def test_what_a_dead_worker_has_put_is_not_lost(order):
    # ref = f.remote(); x = get(ref)[0]; kill -9 the worker; get(x)
    cluster, driver = three_hosts()
    (ref,) = driver.submit(on(cluster, driver, 1))
    cluster.run(order)
    worker = cluster.worker_on(1)
    x = worker.put(size=2000, large=True)
    cluster.run(order)
    worker.finish([x], keep=True)
    cluster.run(order)
    cluster.kill(worker)
    driver.get([ref])
    cluster.run(order)
    driver.get([x])
    cluster.run(order)
    assert driver.values.keys() == {ref, x}
    assert not driver.errors
    let_go_of_everything(cluster, order)


def test_a_handle_that_was_passed_on_keeps_the_actor_alive(order):
    # counter = Counter.remote(); f.remote([counter]); del counter
    cluster, driver = three_hosts()
    actor = driver.create_actor(cluster.template(driver, "A", resources={}, actor=m.ActorOptions()))
    handle = ids.object_id(actor, 0)
    driver.submit(on(cluster, driver, 1), nested=[handle])
    driver.release([handle])
    cluster.run(order)
    next(worker for worker in cluster.running if worker.actor).finish()
    cluster.run(order)
    (caller,) = [worker for worker in cluster.running if not worker.actor]
    (result,) = caller.call(actor)
    caller.get([result])
    cluster.run(order)
    (host,) = [worker for worker in cluster.running if worker.actor]
    host.finish()
    cluster.run(order)
    assert result in caller.values
    assert not caller.errors
    caller.finish()
    let_go_of_everything(cluster, order)


def test_the_view_of_an_argument_ends_with_the_task():
    # x = put(array); get(f.remote(x)); del x       # the worker goes on to live, the memory is free again
    cluster, driver = three_hosts()
    x = driver.put(size=2000, large=True)
    cluster.run()
    refs = driver.submit(on(cluster, driver, 0), [x])
    cluster.run()
    cluster.worker_on(0).finish()
    driver.release([x, *refs])
    cluster.run()
    assert cluster.ranks[0].core.memory.in_use == 0
    assert cluster.workers


def test_a_large_argument_of_a_task_that_has_failed_meanwhile_is_freed_once():
    # x, y = fails.remote(), large.remote(); z = g.remote(x, y); del x, y           # another driver waits for the room
    cluster = Cluster([2], arena_size=1 << 13)
    driver, other = cluster.add_driver(), cluster.add_driver()
    (y,) = driver.submit(cluster.template(driver, "large"))
    cluster.run()
    writer = cluster.worker_on(0)
    (x,) = driver.submit(cluster.template(driver, "fails"))
    cluster.run()
    (failing,) = (worker for worker in cluster.running if worker is not writer)
    (z,) = driver.submit(cluster.template(driver, "g"), [x, y])
    driver.release([x, y])
    cluster.run()
    failing.finish(failed=True)
    cluster.run()
    writer.finish(large=True, size=6000)
    cluster.deliver(("up", 0, writer.number))
    first = other.put(size=4000, large=True)
    cluster.deliver(("up", 0, other.number))
    assert first not in cluster.ranks[0].core.table.entries, "it waits for room"
    cluster.run()
    second = other.put(size=4000, large=True)
    cluster.run()
    other.get([first, second])
    driver.get([z])
    cluster.run()
    assert other.values.keys() == {first, second}
    assert driver.errors.keys() == {z}


def test_a_list_of_many_objects_that_hold_each_other_is_freed():
    # for _ in range(5000): ref = put([ref])
    cluster, driver = three_hosts()
    ref = driver.put()
    for _ in range(5000):
        ref, last = driver.put([ref]), ref
        driver.release([last])
    cluster.run(check=False)
    driver.release([ref])
    cluster.run(check=False)
    assert cluster.leftovers() == []


def test_a_long_chain_of_tasks_fails_with_its_first():
    # for _ in range(3000): ref = f.remote(ref)          # and the first one raises
    cluster = Cluster([1])
    driver = cluster.add_driver()
    template = cluster.template(driver, "f")
    (ref,) = driver.submit(template)
    for _ in range(3000):
        (ref,), last = driver.submit(template, [ref]), ref
        driver.release([last])
    cluster.run(check=False)
    cluster.worker_on(0).finish(failed=True)
    driver.get([ref])
    cluster.run(check=False)
    assert ref in driver.errors


# -------------------------------------------------------------------------------------------------- the table by itself
def test_to_drop_what_nobody_holds_is_a_bug(table):
    with pytest.raises(InternalError, match="nothing here holds"):
        table.references.drop(name(ME, 1))


def test_holding_a_reference_homed_here_that_was_freed_gives_an_error_and_no_hang(table):
    entry = table.references.hold(name(ME, 1))
    assert entry.state == INLINE
    assert payload.describe_system_error(entry.data)[0] == "ObjectLostError"
    table.references.drop(name(ME, 1))
    assert not table.entries


def test_a_borrow_of_what_was_freed_is_counted_and_given_back(table):
    table.references.on_borrow(name(ME, 1), FAR)
    table.references.on_unborrow(name(ME, 1), FAR, 1)
    assert not table.entries


def test_what_is_held_twice_is_borrowed_once(table, out):
    x = name(FAR, 1)
    table.references.hold(x)
    table.references.hold(x)
    assert out.take() == [(FAR, m.Borrow(x, ME))]
    table.references.on_borrowed(FAR)
    table.references.drop(x)
    assert not out.sent
    table.references.drop(x)
    assert out.take() == [(FAR, m.Unborrow(x, 1))]
    assert not table.entries


def test_a_reference_that_came_counted_is_given_back_as_often_as_it_came(table, out):
    x = name(FAR, 1)
    table.references.hold_counted(x)
    table.references.hold_counted(x)
    table.references.drop(x)
    table.references.drop(x)
    assert out.take() == [(FAR, m.Unborrow(x, 2))]


def test_nothing_is_let_go_of_before_earlier_borrows_are_counted(table, out):
    x, y = name(FAR, 1), name(FARTHER, 1)
    borrowed(table, out, x)
    table.references.hold(y)
    table.references.drop(x)
    told = []
    table.references.after_borrows(lambda: told.append("replied"))
    assert out.take() == [(FARTHER, m.Borrow(y, ME))]
    assert not told
    table.references.on_borrowed(FARTHER)
    assert out.take() == [(FAR, m.Unborrow(x, 1))]
    assert told == ["replied"]
    table.references.drop(y)


def test_what_is_let_go_of_keeps_its_order_over_several_homes(table, out):
    x, y = name(FAR, 1), name(FARTHER, 1)
    order = []
    table.references.hold(x)
    table.references.after_borrows(lambda: order.append(1))
    table.references.hold(y)
    table.references.after_borrows(lambda: order.append(2))
    table.references.on_borrowed(FARTHER)
    assert order == []  # the older one is not counted yet
    table.references.on_borrowed(FAR)
    assert order == [1, 2]


def test_counts_for_others_go_to_the_home(table, out):
    mine, theirs = name(ME, 1), name(FAR, 1)
    table.references.create(mine)
    table.references.count_for(mine, FARTHER)
    table.references.count_for(theirs, FARTHER)
    table.references.count_for(theirs, FAR)  # the home itself needs no count
    assert out.take() == [(FAR, m.Borrow(theirs, FARTHER))]
    table.references.drop(mine)
    assert mine in table.entries
    table.references.on_unborrow(mine, FARTHER, 1)
    assert mine not in table.entries


@pytest.mark.parametrize("kind", ["inline", "here", "away"])
def test_a_result_that_nobody_wants_any_more_is_let_go_of(table, out, kind):
    x, inner = name(ME, 1), name(ME, 2)
    table.references.create(x)
    table.references.create(inner)
    table.references.drop(x)
    if kind == "inline":
        table.set_inline(x, b"\0", [inner])
    elif kind == "here":
        table.set_here(x, write(table, x), [inner])
    else:
        table.set_away(x, FAR, 1024, [inner])
        assert out.take() == [(FAR, m.Free([x]))]
    assert not table.entries
    assert table.memory.in_use == 0


@pytest.mark.parametrize("kind", ["inline", "here", "away"])
def test_an_object_whose_last_holder_lets_go_when_it_hears_of_it_is_freed_once(table, out, kind):
    # g.remote(fails.remote(), x): when x exists, g has all its arguments, and fails at once
    x = name(ME, 1)
    table.references.create(x)
    fetched = []
    assert not table.when_exists(x, lambda: table.references.drop(x))
    assert not table.when_local(x, fetched.append)
    if kind == "inline":
        table.set_inline(x, b"\0", [])
    elif kind == "here":
        table.set_here(x, write(table, x), [])
    else:
        table.set_away(x, FAR, 1024, [])
    assert not table.entries
    assert table.memory.in_use == 0
    assert not out.receiving
    assert [payload.describe_system_error(error)[0] for error in fetched] == ["ObjectLostError"]


def test_memory_goes_back_when_the_last_view_is_gone(table):
    x = name(ME, 1)
    table.references.create(x)
    block = write(table, x)
    table.set_here(x, block, [])
    table.memory.pin(block)
    table.references.drop(x)
    assert table.memory.in_use == 1024
    table.memory.unpin(block)
    assert table.memory.in_use == 0


def test_a_primary_copy_is_kept_until_its_home_frees_it(table, out):
    x = name(FAR, 1)
    table.keep_primary(x, write(table, x))
    assert ask(table, SIZE) == []
    table.on_free(x)
    assert table.memory.in_use == SIZE
    assert not table.entries


def test_waiters_are_told_once_the_object_exists(table):
    x = name(ME, 1)
    table.references.create(x)
    told = []
    assert not table.when_exists(x, lambda: told.append(1))
    assert not table.when_exists(x, lambda: told.append(2))
    table.set_inline(x, b"\0", [])
    assert told == [1, 2]
    assert table.when_exists(x, lambda: told.append(3))


def test_a_borrower_asks_the_home_once_and_gets_small_objects_in_the_answer(table, out):
    x = name(FAR, 1)
    borrowed(table, out, x)
    told = []
    assert not table.when_exists(x, lambda: told.append("exists"))
    assert not table.when_local(x, lambda _: told.append("local"))
    assert out.take() == [(FAR, m.Locate(x))]
    table.on_located(m.Located(x, b"\0data", 5, []))
    assert told == ["exists", "local"]
    assert table.entries[x].data == b"\0data"


def test_the_home_answers_where_an_object_is_once_it_exists(table, out):
    x = name(ME, 1)
    table.references.create(x)
    table.on_locate(x, FAR)
    assert not out.sent
    table.set_away(x, FARTHER, 1024, [])
    assert out.take() == [(FAR, m.Located(x, None, 1024, [FARTHER]))]
    table.transfers.on_copy_added(m.CopyAdded(x, mapped=False), FAR)
    table.on_locate(x, 7)
    assert out.take() == [(7, m.Located(x, None, 1024, [FAR, FARTHER]))]
    table.transfers.on_copy_dropped(x, FAR)
    table.on_locate(x, 7)
    assert out.take() == [(7, m.Located(x, None, 1024, [FARTHER]))]


def test_who_asks_for_an_object_that_is_freed_before_it_exists_is_told_so(table, out):
    x = name(ME, 1)
    table.references.create(x)
    table.on_locate(x, FAR)
    table.references.drop(x)
    ((_, message),) = out.take()
    assert payload.describe_system_error(message.data)[0] == "ObjectLostError"


def test_a_get_that_is_given_up_before_its_object_exists_leaves_nothing():
    # try: get(x, timeout=1)  except GetTimeoutError: return         # in a task that was passed [x]
    cluster = Cluster([1, 1])
    driver = cluster.add_driver()
    (x,) = driver.submit(on(cluster, driver, 0))
    driver.submit(on(cluster, driver, 1), nested=[x])
    driver.release([x])
    cluster.run()
    worker = cluster.worker_on(1)
    worker.get([x])
    cluster.run()
    worker.stop_getting()
    cluster.run()
    worker.finish()
    cluster.run()
    cluster.worker_on(0).finish()
    for process in cluster.processes:
        process.release(list(process.held))
    cluster.run()
    assert cluster.leftovers() == []


def test_the_home_says_so_when_it_is_asked_for_what_it_freed(table, out):
    table.on_locate(name(ME, 1), FAR)
    ((_, message),) = out.take()
    assert payload.describe_system_error(message.data)[0] == "ObjectLostError"


def test_a_transfer_makes_a_copy_and_tells_the_home(table, out):
    x = name(FAR, 1)
    told = []
    need(table, x, [FAR])
    assert not table.when_local(x, lambda _: told.append(1))
    ((_, pull),) = out.take()
    assert pull == m.Pull(x, pull.tag, GET, -1, 0)
    out.arrive()
    assert told == [1]
    assert out.take() == [(FAR, m.CopyAdded(x, mapped=False))]
    assert table.entries[x].state == HERE


def test_an_answer_of_the_home_does_not_start_a_second_transfer(table, out):
    x = name(FAR, 1)
    borrowed(table, out, x)
    table.when_exists(x, lambda: None)
    need(table, x, [FAR])
    assert not table.when_local(x, lambda _: None)
    assert [type(message) for _, message in out.take()] == [m.Locate, m.Pull]
    table.on_located(m.Located(x, None, 1024, [FAR]))
    assert not out.sent
    out.arrive()
    assert table.memory.in_use == 1024


def test_a_task_brings_the_place_of_what_others_here_wait_for(table, out):
    x = name(FAR, 1)
    borrowed(table, out, x)
    told = []
    assert not table.when_local(x, lambda _: told.append(1))
    need(table, x, [FAR])
    assert [type(message) for _, message in out.take()] == [m.Locate, m.Pull]
    out.arrive()
    assert told == [1]


def test_a_source_that_has_lost_its_copy_is_passed_over(table, out):
    x = name(FARTHER, 1)
    told = []
    need(table, x, [FAR, FARTHER])
    table.when_local(x, lambda _: told.append(1))
    out.arrive("it was evicted there")
    assert not told
    assert [(rank, type(message)) for rank, message in out.take()] == [(FAR, m.Pull), (FARTHER, m.Pull)]
    out.arrive()
    assert told == [1]
    assert table.memory.in_use == 1024


def test_without_any_copy_the_object_is_lost_and_whoever_waits_hears_of_it(table, out):
    x = name(FARTHER, 1)
    told = []
    need(table, x, [FAR])
    table.when_local(x, lambda _: told.append(1))
    out.arrive("gone")
    assert [type(message) for _, message in out.take()] == [m.Pull, m.Locate], "the home may know better"
    table.on_located(m.Located(x, None, 1024, []))
    assert told == [1]
    assert payload.describe_system_error(table.entries[x].data)[0] == "ObjectLostError"
    assert table.memory.in_use == 0


def test_a_later_task_adds_the_copies_that_it_knows_of(table, out):
    x = name(FARTHER, 1)
    need(table, x, [FAR])
    table.when_local(x, lambda _: None)
    need(table, x, [FARTHER])
    out.take()
    out.arrive("gone")
    assert [rank for rank, _ in out.take()] == [FARTHER]


def test_what_can_never_fit_is_an_error_in_the_same_turn(table):
    x = name(FAR, 1)
    need(table, x, [FAR], SIZE + 64)
    errors = []
    assert not table.when_local(x, errors.append)
    table.end_turn(0.0)
    ((kind, (text,)),) = map(payload.describe_system_error, errors)
    assert kind == "ObjectStoreFullError"
    assert f"{SIZE + 64:,} bytes" in text
    assert f"{SIZE:,} bytes in all" in text
    assert table.entries[x].state == AWAY, "the object itself is not touched"


def test_a_transfer_that_ends_after_its_object_was_freed_gives_its_memory_back(table, out):
    x = name(ME, 1)
    table.references.create(x)
    table.set_away(x, FAR, 1024, [])
    table.when_local(x, lambda _: None)
    table.references.drop(x)
    assert not table.entries
    out.arrive()
    assert table.memory.in_use == 0


def test_a_fetch_that_waited_for_room_while_its_object_was_freed_does_not_start(table, out):
    x, filler = name(ME, 1), name(ME, 2)
    table.references.create(filler)
    table.set_here(filler, write(table, filler, SIZE), [])
    table.references.create(x)
    table.set_away(x, FAR, 1024, [])
    table.when_local(x, lambda _: None)
    table.references.drop(x)
    table.references.drop(filler)
    assert not out.receiving
    assert table.memory.in_use == 0


def test_ranks_of_one_host_map_instead_of_transferring(table, out):
    x = name(NEIGHBOUR, 1)
    told = []
    need(table, x, [FAR, NEIGHBOUR])
    table.when_local(x, lambda _: told.append(1))
    assert out.take() == [(NEIGHBOUR, m.MapObject(x, GET))]
    table.transfers.pulls.on_mapped(m.ObjectMapped(x, 512, 1024), NEIGHBOUR)
    assert told == [1]
    assert out.take() == [(NEIGHBOUR, m.CopyAdded(x, mapped=True))]
    assert table.entries[x].state == MAPPED
    table.references.drop_guest(x)
    table.on_free(x)
    assert out.take() == [(NEIGHBOUR, m.UnmapObject(x))]
    assert not table.entries


def test_where_mapping_fails_the_object_is_fetched_from_elsewhere(table, out):
    x = name(FAR, 1)
    need(table, x, [FAR, NEIGHBOUR])
    table.when_local(x, lambda _: None)
    out.take()
    table.transfers.pulls.on_pull_failed(m.PullFailed(x, 0, 0), NEIGHBOUR)
    assert [(rank, type(message)) for rank, message in out.take()] == [(FAR, m.Pull)]


def test_a_mapping_that_comes_too_late_is_given_back(table, out):
    table.transfers.pulls.on_mapped(m.ObjectMapped(name(NEIGHBOUR, 1), 512, 1024), NEIGHBOUR)
    assert out.take() == [(NEIGHBOUR, m.UnmapObject(name(NEIGHBOUR, 1)))]


def test_what_a_neighbour_maps_stays_until_it_unmaps_it(table, out):
    x = name(ME, 1)
    table.references.create(x)
    block = write(table, x)
    table.set_here(x, block, [])
    table.transfers.on_map(x, NEIGHBOUR, GET)
    assert out.take() == [(NEIGHBOUR, m.ObjectMapped(x, block.offset, 1024))]
    table.transfers.on_copy_added(m.CopyAdded(x, mapped=True), NEIGHBOUR)
    table.references.drop(x)
    assert out.take() == [(NEIGHBOUR, m.Free([x]))]
    assert table.memory.in_use == 1024
    table.transfers.on_unmap(x, NEIGHBOUR)
    assert table.memory.in_use == 0


def test_what_is_not_here_can_be_neither_pulled_nor_mapped(table, out):
    x = name(ME, 1)
    table.transfers.on_pull(m.Pull(x, 5, GET, -1, 0), FAR)
    table.transfers.on_map(x, NEIGHBOUR, GET)
    assert out.take() == [(FAR, m.PullFailed(x, 5, 0)), (NEIGHBOUR, m.PullFailed(x, 0, 0))]


def test_what_is_being_sent_stays_until_it_is_sent(table, out):
    x = name(ME, 1)
    table.references.create(x)
    table.set_here(x, write(table, x), [])
    table.transfers.on_pull(m.Pull(x, 5, GET, -1, 0), FAR)
    table.references.drop(x)
    assert table.memory.in_use == 1024
    ((_, _, _, done),) = out.serving
    done(None)
    assert table.memory.in_use == 0


def test_a_copy_that_is_reported_after_the_end_is_freed(table, out):
    table.transfers.on_copy_added(m.CopyAdded(name(ME, 1), mapped=False), FAR)
    assert out.take() == [(FAR, m.Free([name(ME, 1)]))]


# ----------------------------------------------------------------------------------------------------- a full store
def test_copies_that_nobody_uses_make_room_oldest_first(table, out):
    for number in range(4):
        fetch(table, out, name(FAR, number))
    (block,) = ask(table, 2048)
    assert block is not None
    assert out.take() == [(FAR, m.CopyDropped(name(FAR, 0))), (FAR, m.CopyDropped(name(FAR, 1)))]
    assert set(table.entries) == {name(FAR, 2), name(FAR, 3)}


def test_a_copy_that_is_looked_at_stays_and_makes_room_when_the_view_ends(table, out):
    for number in range(4):
        fetch(table, out, name(FAR, number))
    block = table.entries[name(FAR, 0)].block
    assert block is not None
    table.memory.pin(block)
    told = ask(table, SIZE)
    assert told == []
    table.memory.unpin(block)
    assert len(told) == 1


def test_a_copy_that_is_needed_but_not_looked_at_makes_room_last_and_is_fetched_again(table, out):
    x = name(FAR, 9)
    need(table, x, [FAR])
    table.when_local(x, lambda _: None)
    out.arrive()
    for number in range(3):
        fetch(table, out, name(FAR, number))
    ask(table, 3 * 1024)
    assert table.entries[x].state == HERE
    out.take()
    (block,) = ask(table, 1024)
    assert block is not None
    assert out.take() == [(FAR, m.CopyDropped(x))]
    assert table.entries[x].state == AWAY
    table.memory.abandon(block)
    told = []
    assert not table.when_local(x, told.append)
    out.arrive()
    assert told == [None]


def test_creators_are_served_in_order_each_with_its_own_size(table, out):
    for number in range(4):
        fetch(table, out, name(FAR, number))
    pinned = [table.entries[name(FAR, number)].block for number in range(4)]
    for block in pinned:
        table.memory.pin(block)
    first, second, third = ask(table, 2048), ask(table, 1024), ask(table, 512)
    for block in pinned:
        table.memory.unpin(block)
    assert [block.size for (block,) in (first, second, third)] == [2048, 1024, 512]
    assert table.memory.in_use == 2048 + 1024 + 512


def test_a_small_request_waits_behind_a_large_one(table):
    x = name(ME, 1)
    table.references.create(x)
    table.set_here(x, write(table, x, 1024), [])
    large = ask(table, SIZE)
    small = ask(table, 64)
    assert small == []
    table.references.drop(x)
    assert len(large) == 1
    assert small == []  # the large one has all of it
    table.memory.abandon(large[0])
    assert len(small) == 1


def test_what_is_waited_for_does_not_wait_behind_what_has_to_run_later(table):
    half = [write(table, name(ME, n), SIZE // 2) for n in range(2)]
    argument, got = ask(table, SIZE // 2, ARGUMENT), ask(table, SIZE // 2, GET)
    table.memory.abandon(half[0])
    assert (len(argument), len(got)) == (0, 1)
    assert ask(table, SIZE, GET) == []
    table.memory.abandon(half[1])
    assert argument == []  # the second get is not served yet, and goes first, too
    table.memory.hasten(name(ME, 99), GET)
    table.memory.abandon(got[0])
    assert argument == []


def test_one_that_becomes_urgent_is_served_before_what_is_less_so(table):
    block = write(table, name(ME, 1), SIZE)
    large = ask(table, SIZE, ARGUMENT)
    told: list[Block | None] = []
    table.memory.reserve(name(ME, 2), 64, told.append, urgency=ARGUMENT)
    table.memory.hasten(name(ME, 2), GET)
    table.memory.abandon(block)
    assert (len(large), len(told)) == (0, 1)


def test_when_nothing_comes_free_for_a_large_request_those_that_fit_are_served(table):
    write(table, name(ME, 1), 1024)
    large = ask(table, SIZE)
    table.end_turn(0.0)
    others = [ask(table, size) for size in (64, SIZE - 64, 128)]
    table.end_turn(STANDSTILL / 2)
    assert others == [[], [], []]
    assert table.pressure.next_expiry == STANDSTILL
    table.end_turn(STANDSTILL)
    assert [len(told) for told in others] == [1, 0, 1]
    assert table.pressure.next_expiry == PATIENCE
    table.end_turn(PATIENCE)
    assert large == [None]


def test_as_long_as_more_comes_free_the_first_is_not_overtaken(table):
    blocks = [write(table, name(ME, n), SIZE // 8) for n in range(8)]
    ask(table, SIZE)
    small = ask(table, 64)
    table.end_turn(0.0)
    for number, block in enumerate(blocks[:-1], 1):
        table.memory.abandon(block)
        table.end_turn(number * 0.9 * STANDSTILL)
    assert small == []


def test_what_those_who_overtake_give_back_is_no_hope_for_the_first(table):
    write(table, name(ME, 1), 1024)
    large = ask(table, SIZE)
    table.end_turn(0.0)
    now = 0.0
    served = 0
    while not large:
        now += 0.5
        small = ask(table, 64)
        table.end_turn(now)
        if small and small[0] is not None:
            served += 1
            table.memory.abandon(small[0])
    assert large == [None]
    assert now == PATIENCE
    assert served > PATIENCE


def test_nobody_waits_behind_a_request_of_a_client_that_has_died():
    cluster = Cluster([1], arena_size=1 << 13, store_timeout=50.0)
    driver, other = cluster.add_driver(), cluster.add_driver()
    x = driver.put(size=5000, large=True)
    cluster.run()
    driver.get([x])
    cluster.run()
    other.put(size=6000, large=True)
    cluster.run()
    y = driver.put(size=1000, large=True)
    cluster.run()
    entries = cluster.ranks[0].core.table.entries
    assert y not in entries
    cluster.kill(other)
    cluster.run()
    assert y in entries


@pytest.mark.parametrize("has_it", [False, True])
def test_memory_that_will_not_be_written_is_free_again(has_it):
    cluster = Cluster([1], arena_size=1 << 13, store_timeout=50.0)
    driver, other = cluster.add_driver(), cluster.add_driver()
    if not has_it:
        x = other.put(size=5000, large=True)
        other.get([x])
        cluster.run()
    driver.put(size=6000, large=True)
    cluster.deliver(("up", 0, driver.number))
    driver.stop_writing()
    cluster.run()
    assert cluster.ranks[0].core.memory.in_use < 6000
    y = driver.put(size=1000, large=True)
    cluster.run()
    assert y in cluster.ranks[0].core.table.entries


def test_nobody_waits_behind_a_fetch_whose_object_was_freed(table, out):
    x, filler = name(ME, 1), name(ME, 2)
    write(table, filler, SIZE // 2)
    table.references.create(x)
    table.set_away(x, FAR, SIZE, [])
    assert not table.when_local(x, lambda _: None)
    told = ask(table, 64)
    table.end_turn(0.0)
    assert told == []
    table.references.drop(x)
    table.end_turn(0.1)
    assert len(told) == 1
    assert told[0] is not None
    assert not out.receiving


def test_what_is_larger_than_the_arena_is_refused_in_the_same_turn(table):
    told = ask(table, SIZE + 64)
    table.end_turn(0.0)
    assert told == [None]


def test_a_refusal_that_makes_another_ask_in_vain_is_news(table):
    told = []
    for number in (1, 2):  # the second is asked for when the first has ended
        need(table, name(FAR, number), [FAR], SIZE * 2)
        assert not table.when_local(name(FAR, number), told.append)
    table.end_turn(0.0)
    assert len(told) == 1
    assert table.memory.has_news
    table.end_turn(0.0)
    assert len(told) == 2
    assert not table.memory.has_news


def test_without_patience_who_asks_again_at_once_is_told_in_the_next_turn(out):
    table = ObjectTable(ME, Allocator(0, SIZE), out, patience=0.0)
    write(table, name(ME, 1), SIZE)
    told = []

    def ask_again(block: Block | None) -> None:
        told.append(block)
        table.memory.reserve(name(ME, 2), SIZE, ask_again)

    ask_again(None)
    table.end_turn(0.0)
    assert told == [None]
    table.end_turn(0.1)
    assert told == [None, None]
    table.end_turn(0.1)
    assert told == [None, None]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_task_whose_argument_is_on_disk_runs_if_nothing_else_happens(ranks):
    # The room for it is asked for at the end of the turn, when the task is dispatched.
    cluster = Cluster([1] * ranks, arena_size=1 << 13, store_timeout=5.0)
    driver = cluster.add_driver()
    objects = []
    for _ in range(8):
        objects.append(driver.put(size=2000, large=True))
        cluster.run()
    entries = cluster.ranks[0].core.table.entries
    spilled = next(i for i in objects if entries[i].state == SPILLED)
    driver.submit(on(cluster, driver, 0), [spilled])
    cluster.run()
    assert cluster.running


def test_two_results_that_are_larger_than_the_drivers_arena_are_two_errors():
    cluster = Cluster([0, 1], arena_size=[1 << 12, 1 << 14])
    driver = cluster.add_driver()
    refs = []
    for _ in range(2):
        refs += driver.submit(on(cluster, driver, 1))
        cluster.run()
        cluster.worker_on(1).finish(large=True, size=5000)
        cluster.run()
    driver.get(refs)
    cluster.run()
    assert driver.errors.keys() == {*refs}
