"""What all raylets tell of their stores when one of their clients asks."""

from __future__ import annotations

from random import Random
from typing import Any

import msgspec

from hpcray import ids
from hpcray.observe.statistics import Amount, ObjectReport, ObjectsWanted, StoreStatistics
from hpcray.protocol import messages as m
from hpcray.testing.cluster import Cluster
from hpcray.testing.process import Process

FIRST = Random(0).choice


def ask(cluster: Cluster, process: Process, topic: str, arguments: Any = None) -> Any:
    number = ids.index_of(process.new_id() + bytes(4)) + len(process.answers) + 1000
    process.send(m.Query(number, topic, msgspec.msgpack.encode(arguments)))
    cluster.run(FIRST)
    answer = process.answers[number]
    assert answer.ok, answer.payload
    return msgspec.msgpack.decode(answer.payload)


def statistics(cluster: Cluster, process: Process) -> list[StoreStatistics]:
    found = msgspec.convert(ask(cluster, process, "store_statistics"), list[StoreStatistics])
    for each in found:
        used = each.primary.bytes + each.secondary.bytes + each.unused.bytes + each.freed.bytes
        assert each.size == each.free + each.writing + used
    return found


def reports(cluster: Cluster, process: Process, wanted: ObjectsWanted) -> dict[tuple[bytes, int], ObjectReport]:
    parts = msgspec.convert(ask(cluster, process, "objects", wanted), list[list[ObjectReport]])
    return {(report.id, report.rank): report for part in parts for report in part}


def test_an_idle_job_has_nothing_on_any_rank(cluster, driver):
    found = statistics(cluster, driver)
    assert [each.rank for each in found] == [0, 1, 2]
    assert [each.host for each in found] == ["host0", "host1", "host2"]
    for each in found:
        assert each.free == each.size == each.largest_free == 1 << 16
        assert (each.writing, each.primary, each.pinned, each.inline) == (0, Amount(), Amount(), Amount())


def test_a_worker_may_ask_too(cluster, driver):
    driver.submit(cluster.template(driver, "f", node=2))
    cluster.run(FIRST)
    assert len(statistics(cluster, cluster.worker_on(2))) == 3


def test_a_client_that_died_meanwhile_is_not_answered(cluster, driver):
    other = cluster.add_driver()
    cluster.run(FIRST)
    other.send(m.Query(1, "store_statistics", msgspec.msgpack.encode(None)))
    other.send(m.Query(2, "objects", msgspec.msgpack.encode(ObjectsWanted())))
    cluster.kill(other)
    cluster.run(FIRST)
    assert len(statistics(cluster, driver)) == 3


def test_a_put_is_primary_and_pinned_while_somebody_looks_and_freed_while_only_that_keeps_it(cluster, driver):
    ref = driver.put(size=2000, large=True)
    small = driver.put()
    cluster.run(FIRST)
    mine = statistics(cluster, driver)[0]
    assert (mine.primary.objects, mine.pinned.objects, mine.inline.objects) == (1, 0, 1)
    assert mine.primary.bytes >= 2000
    driver.get([ref])
    cluster.run(FIRST)
    mine = statistics(cluster, driver)[0]
    assert mine.pinned == mine.primary
    assert (mine.hits, mine.misses) == (1, 0)
    keys = [(ref, 0)]
    found = reports(cluster, driver, ObjectsWanted(limit=1))
    assert [key for key in found if key[1] == 0] == keys
    report = found[ref, 0]
    name = cluster.ranks[0].core.client_name(driver.client)
    assert (report.state, report.made_by) == ("primary", f"put by {name}")
    assert (report.clients, report.holds, report.pinned_by) == ([name], 0, [name])
    driver.release([ref, small])
    cluster.run(FIRST)
    assert statistics(cluster, driver)[0].free == 1 << 16


def test_memory_that_is_looked_at_after_its_object_was_freed_is_freed_memory(cluster, driver):
    ref = driver.put(size=2000, large=True)
    cluster.run(FIRST)
    driver.get([ref])
    cluster.run(FIRST)
    driver.send(m.Release([ref]))  # the view lives on
    driver.held.discard(ref)
    cluster.run(FIRST)
    mine = statistics(cluster, driver)[0]
    assert mine.primary == Amount()
    assert mine.freed.objects == 1
    assert mine.freed == mine.pinned
    driver.send(m.Unpin([ref]))
    cluster.run(FIRST)
    assert statistics(cluster, driver)[0].freed == Amount()


def test_memory_of_an_object_that_is_freed_while_it_is_written_to_disk_is_freed_memory():
    cluster = Cluster([1], arena_size=1 << 13)
    driver = cluster.add_driver()
    ref = driver.put(size=6000, large=True)
    cluster.run(FIRST)
    driver.put(size=5000, large=True)
    cluster.deliver(("up", 0, driver.number))
    node = cluster.ranks[0]
    ((write, _),) = node.disk_jobs.items()
    driver.release([ref])
    cluster.deliver(("up", 0, driver.number))
    found = node.core.surveys.statistics(0.0)
    assert (found.writing, found.freed.objects, found.pinned.objects) == (0, 1, 1)
    cluster.deliver(("disk", 0, write))
    assert node.core.surveys.statistics(0.0).freed == Amount()


def test_memory_that_is_reserved_and_not_sealed_is_being_written(cluster, driver):
    identifier = ids.object_id(driver.new_id(), 0)
    driver._writing[identifier] = lambda _: None
    driver.send(m.Reserve(identifier, 3000))
    cluster.run(FIRST)
    assert 3000 <= statistics(cluster, driver)[0].writing < 3064


def test_a_fetched_copy_is_a_miss_a_secondary_copy_and_traffic_at_both_ends(cluster, driver):
    template = cluster.template(driver, "make", node=1)
    (ref,) = driver.submit(template)
    cluster.run(FIRST)
    cluster.worker_on(1).finish(large=True, size=2000)
    cluster.run(FIRST)
    head, executor, _ = statistics(cluster, driver)
    assert (head.primary.objects, executor.primary.objects) == (0, 1)
    driver.get([ref])
    cluster.run(FIRST)
    head, executor, _ = statistics(cluster, driver)
    assert head.secondary == executor.primary == head.pinned
    assert head.misses == 1
    assert head.received == executor.sent
    assert head.received.objects == 1
    assert head.received.bytes >= 2000
    assert head.received_per_second > 0
    assert executor.sent_per_second > 0
    found = reports(cluster, driver, ObjectsWanted(ids=[ref]))
    assert {rank: report.state for (_, rank), report in found.items()} == {0: "copy", 1: "primary"}
    assert found[ref, 0].made_by.startswith("make() for driver")
    assert found[ref, 1].made_by == ""
    cluster.now += 1000.0
    head, executor, _ = statistics(cluster, driver)
    assert head.received_per_second + executor.sent_per_second < 1


def test_references_are_told_apart_by_who_holds_them(cluster, driver):
    inner = driver.put()
    outer = driver.put([inner])
    driver.submit(cluster.template(driver, "f", node=1), nested=[inner])
    cluster.run(FIRST)
    found = reports(cluster, driver, ObjectsWanted(ids=[inner]))
    assert len(found[inner, 0].clients) == 1
    assert found[inner, 0].holds == 2, "of the container and of the task"
    assert found[inner, 0].borrowers == {1: 1}
    assert found[inner, 1].clients == [cluster.ranks[1].core.client_name(cluster.worker_on(1).client)]
    assert outer in {identifier for identifier, _ in reports(cluster, driver, ObjectsWanted())}


def test_actors_and_their_calls_are_named(cluster, driver):
    actor = driver.create_actor(cluster.template(driver, "Counter", node=1, actor=m.ActorOptions()))
    cluster.run(FIRST)
    for worker in cluster.running:
        worker.finish()
    cluster.run(FIRST)
    (ref,) = driver.call(actor)
    cluster.run(FIRST)
    found = reports(cluster, driver, ObjectsWanted())
    assert found[ids.object_id(actor, 0), 0].made_by.startswith("Counter() for driver")
    assert found[ref, 0].made_by.startswith("actor method method() for driver")
    assert cluster.ranks[1].core.client_name(cluster.worker_on(1).client).endswith("(Counter)")


def test_a_neighbour_that_maps_an_object_is_named():
    cluster = Cluster([0, 1], machines=["one", "one"])
    driver = cluster.add_driver()
    cluster.run(FIRST)
    (ref,) = driver.submit(cluster.template(driver, "make"))
    cluster.run(FIRST)
    cluster.worker_on(1).finish(large=True, size=2000)
    driver.get([ref])
    cluster.run(FIRST)
    head, executor = statistics(cluster, driver)
    assert head.mapped.objects == 1
    assert head.primary == head.secondary == Amount()
    assert executor.pinned.objects == 1
    assert (head.received, executor.sent) == (Amount(), Amount())
    found = reports(cluster, driver, ObjectsWanted(ids=[ref]))
    assert found[ref, 0].state == "mapped"
    assert found[ref, 1].pinned_by == ["rank 0"]


def test_a_choice_that_is_none_is_refused(cluster, driver):
    driver.send(m.Query(7, "objects", msgspec.msgpack.encode({"limit": "many"})))
    cluster.run(FIRST)
    assert not driver.answers[7].ok
    assert len(statistics(cluster, driver)) == 3
