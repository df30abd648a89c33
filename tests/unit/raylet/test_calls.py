"""Actors, from the caller's raylet to the hosting one and back: order, deaths, restarts, and creations that come to nothing."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from hpcray import ids, payload
from hpcray.protocol import messages as m
from hpcray.resources import UNIT
from hpcray.testing.cluster import Cluster
from hpcray.testing.process import Process


def started(*cpus: int, **options: Any) -> tuple[Cluster, Process]:
    cluster = Cluster(cpus, **options)
    return cluster, cluster.add_driver()


def actor_class(cluster: Cluster, process: Process, *, restarts: int = 0, **fields: Any) -> bytes:
    options = m.ActorOptions(max_restarts=restarts, placement={"CPU": UNIT})
    return cluster.template(process, "A", **{"resources": {}, "num_returns": 0, "actor": options, **fields})


def host(cluster: Cluster) -> Process:
    """The process of the only actor that runs something."""
    (worker,) = [worker for worker in cluster.running if worker.actor]
    return worker


def finish_all(cluster: Cluster) -> None:
    while cluster.running:
        cluster.running[0].finish()
        cluster.run()


def kind_of(error: bytes) -> str:
    while error[0] == payload.DEPENDENCY_ERROR:
        error = payload.describe_dependency_error(error)[1]
    return "creation" if error[0] == payload.CREATION_ERROR else payload.describe_system_error(error)[0]


def call_and_get(cluster: Cluster, process: Process, actor: bytes) -> bytes:
    """The payload that one more call comes to."""
    (ref,) = process.call(actor)
    process.get([ref])
    cluster.run()
    finish_all(cluster)
    assert ref in process.values, "the call was never answered"
    return process.values[ref]


@pytest.mark.parametrize("rank", [0, 1])
def test_calls_that_were_made_before_the_actor_lives_run_in_order(rank):
    cluster, driver = started(1, 1)
    actor = driver.create_actor(actor_class(cluster, driver, node=rank))
    refs = [driver.call(actor)[0] for _ in range(5)]
    driver.get(refs)
    cluster.run()
    worker = host(cluster)
    finish_all(cluster)
    assert worker.called == [ref[:-4] for ref in refs]
    assert driver.values.keys() >= set(refs)


@pytest.mark.parametrize("seed", range(20))
def test_a_call_waits_for_its_arguments_and_those_behind_it_wait_too(seed):
    # a.m.remote(slow); a.m.remote(large); a.m.remote()
    random = Random(seed)
    cluster, driver = started(1, 1, 1)
    actor = driver.create_actor(actor_class(cluster, driver, node=1))
    (slow,) = driver.submit(cluster.template(driver, "slow", node=2))
    large = driver.put(size=2000, large=True)
    cluster.run(random.choice)
    calls = [driver.call(actor, arguments)[0][:-4] for arguments in ([slow], [large], [], [large, slow], [])]
    cluster.run(random.choice)
    worker = host(cluster)
    while running := cluster.running:
        process = random.choice(running)
        process.finish(size=2000, large=not process.actor)
        cluster.run(random.choice)
    assert worker.called == calls


def test_each_caller_has_its_own_order():
    # the driver's first call waits for a slow argument; a task's call need not wait for it
    cluster, driver = started(2, 1)
    actor = driver.create_actor(actor_class(cluster, driver, node=1))
    (slow,) = driver.submit(cluster.template(driver, "slow"))
    driver.call(actor, [slow])
    driver.submit(cluster.template(driver, "caller"), nested=[ids.object_id(actor, 0)])
    cluster.run()
    host(cluster).finish()
    cluster.run()
    caller = next(worker for worker in cluster.running if ids.object_id(actor, 0) in worker.held)
    (ref,) = caller.call(actor)
    caller.get([ref])
    cluster.run()
    host(cluster).finish()
    cluster.run()
    assert ref in caller.values


def test_calls_of_a_raylet_that_does_not_know_the_actor_find_it():
    cluster, driver = started(1, 1, 1)
    actor = driver.create_actor(actor_class(cluster, driver, node=1))
    driver.submit(cluster.template(driver, "caller", node=2), nested=[ids.object_id(actor, 0)])
    cluster.run()
    host(cluster).finish()
    cluster.run()
    (caller,) = [worker for worker in cluster.running if worker.rank == 2]
    (ref,) = caller.call(actor)
    caller.get([ref])
    cluster.run()
    host(cluster).finish()
    cluster.run()
    assert not caller.errors
    assert ref in caller.values


# -------------------------------------------------------------------------------------------------------------- deaths
@pytest.mark.parametrize("rank", [0, 1])
def test_a_death_answers_all_calls_and_those_that_come_later(rank):
    cluster, driver = started(1, 1)
    actor = driver.create_actor(actor_class(cluster, driver, node=rank))
    refs = [driver.call(actor)[0] for _ in range(3)]
    driver.get(refs)
    cluster.run()
    host(cluster).finish()
    cluster.run()
    cluster.kill(host(cluster))
    cluster.run()
    assert [kind_of(driver.errors[ref]) for ref in refs] == ["ActorDiedError"] * 3
    assert kind_of(call_and_get(cluster, driver, actor)) == "ActorDiedError"
    driver.release(list(driver.held))
    cluster.run()
    assert cluster.leftovers() == []


def test_an_actor_with_restarts_left_lives_again():
    cluster, driver = started(1, 1)
    actor = driver.create_actor(actor_class(cluster, driver, restarts=1))
    cluster.run()
    for last in (False, True):
        host(cluster).finish()
        cluster.run()
        (ref,) = driver.call(actor)
        driver.get([ref])
        cluster.run()
        cluster.kill(host(cluster))
        cluster.run()
        assert kind_of(driver.errors[ref]) == "ActorDiedError"
        assert bool(cluster.running) == (not last)
    assert kind_of(call_and_get(cluster, driver, actor)) == "ActorDiedError"


def test_kill_that_allows_a_restart_restarts():
    # hpcray.kill(actor, no_restart=False)
    cluster, driver = started(1, 1)
    actor = driver.create_actor(actor_class(cluster, driver, restarts=1))
    cluster.run()
    host(cluster).finish()
    cluster.run()
    driver.send(m.Kill(actor, False))
    cluster.run()
    assert not payload.is_error(call_and_get(cluster, driver, actor))


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_worker_that_dies_in_init_counts_as_a_death(restarts):
    cluster, driver = started(1, 1)
    actor = driver.create_actor(actor_class(cluster, driver, restarts=restarts))
    cluster.run()
    cluster.kill(host(cluster))
    cluster.run()
    assert payload.is_error(call_and_get(cluster, driver, actor)) == (restarts == 0)


def test_an_exception_in_init_is_final():
    cluster, driver = started(1, 1)
    actor = driver.create_actor(actor_class(cluster, driver, restarts=5))
    (ref,) = driver.call(actor)
    driver.get([ref])
    cluster.run()
    host(cluster).finish(failed=True)
    cluster.run()
    assert kind_of(driver.errors[ref]) == "ActorDiedError"
    assert not cluster.running


def test_calls_whose_arguments_are_on_their_way_when_the_actor_dies_are_answered_once():
    cluster, driver = started(1, 1)
    actor = driver.create_actor(actor_class(cluster, driver, node=1))
    large = [driver.put(size=2000, large=True) for _ in range(2)]
    cluster.run()
    host(cluster).finish()
    cluster.run()
    refs = [driver.call(actor, arguments)[0] for arguments in ([large[0]], [], [large[1]], [])]
    driver.get(refs)
    bulk = {("bulk", 1, tag) for tag in range(10)}
    cluster.run(hold=bulk)
    (worker,) = [worker for worker in cluster.workers if worker.actor]
    cluster.kill(worker)
    cluster.run(hold=bulk)
    cluster.run()
    assert [kind_of(driver.errors[ref]) for ref in refs] == ["ActorDiedError"] * 4
    driver.release(list(driver.held))
    cluster.run()
    assert cluster.leftovers() == []


# ------------------------------------------------------------------------------------------------ ends before beginnings
def remote_caller(cluster: Cluster, driver: Process, actor: bytes) -> Process:
    """A task on rank 1 that holds the actor's handle."""
    driver.submit(cluster.template(driver, "caller", node=1), nested=[ids.object_id(actor, 0)])
    cluster.run()
    (caller,) = [worker for worker in cluster.running if worker.rank == 1 and not worker.actor]
    return caller


def test_an_argument_that_fails_ends_the_actor_for_all_who_call_it_now_and_later():
    cluster, driver = started(2, 1)
    (bad,) = driver.submit(cluster.template(driver, "bad"))
    actor = driver.create_actor(actor_class(cluster, driver), [bad])
    caller = remote_caller(cluster, driver, actor)
    (early,) = caller.call(actor)
    caller.get([early])
    cluster.run()
    next(worker for worker in cluster.running if worker.rank == 0).finish(failed=True)
    cluster.run()
    assert kind_of(caller.errors[early]) == "creation"
    for process in (driver, driver, caller):
        (ref,) = process.call(actor)
        process.get([ref])
        cluster.run()
        assert kind_of(process.errors[ref]) == "creation"


def test_an_actor_that_nobody_refers_to_before_its_arguments_exist_never_lives():
    # A.remote(slow.remote())
    cluster, driver = started(1)
    (slow,) = driver.submit(cluster.template(driver, "slow"))
    actor = driver.create_actor(actor_class(cluster, driver), [slow])
    driver.release([ids.object_id(actor, 0), slow])
    cluster.run()
    finish_all(cluster)
    assert cluster.leftovers() == []


def test_its_name_is_free_again():
    cluster, driver = started(1)
    (slow,) = driver.submit(cluster.template(driver, "slow"))
    actor = driver.new_id()
    actors = cluster.ranks[0].gcs.actors
    assert actors.claim("", "name", actor, b"") is None
    driver.send(m.CreateActor(actor, actor_class(cluster, driver), b"", [slow], [], "name", "", False))
    driver.send(m.Release([ids.object_id(actor, 0)]))
    cluster.run()
    assert actors.find("", "name") is None


def test_an_actor_that_is_killed_before_its_arguments_exist_is_dead():
    # a = A.remote(slow.remote()); hpcray.kill(a)
    cluster, driver = started(2)
    (slow,) = driver.submit(cluster.template(driver, "slow"))
    actor = driver.create_actor(actor_class(cluster, driver), [slow])
    (ref,) = driver.call(actor)
    driver.send(m.Kill(actor, True))
    driver.get([ref])
    cluster.run()
    finish_all(cluster)
    assert kind_of(driver.errors[ref]) == "ActorDiedError"


def test_an_actor_that_waits_for_room_dies_when_nobody_refers_to_it():
    cluster, driver = started(1)
    driver.submit(cluster.template(driver, "f"))
    cluster.run()
    actor = driver.create_actor(actor_class(cluster, driver))
    cluster.run()
    assert cluster.ranks[0].gcs.is_waiting_for_room
    driver.release([ids.object_id(actor, 0)])
    cluster.run()
    assert not cluster.ranks[0].gcs.is_waiting_for_room
    finish_all(cluster)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("end", ["kill", "release"])
def test_an_actor_may_be_ended_at_any_moment_of_its_birth(seed, end):
    random = Random(seed)
    cluster, driver = started(0, 1)
    large = driver.put(size=2000, large=True)
    cluster.run()
    actor = driver.create_actor(actor_class(cluster, driver), [large])
    for _ in range(random.randint(0, 12)):
        if links := cluster.choices():
            cluster.deliver(random.choice(links))
    if end == "kill":
        driver.send(m.Kill(actor, True))
        (ref,) = driver.call(actor)
        driver.get([ref])
        cluster.run(random.choice)
        finish_all(cluster)
        assert kind_of(driver.errors[ref]) == "ActorDiedError"
    driver.release(list(driver.held))
    cluster.run(random.choice)
    finish_all(cluster)
    assert cluster.leftovers() == []
    view = cluster.ranks[0].gcs.scheduler.nodes[1]
    assert not view.placing


def test_an_actor_drains_its_calls_before_it_ends():
    # get([Counter.remote().add.remote() for _ in range(3)])       with one Counter whose handle dies at once
    cluster, driver = started(1)
    actor = driver.create_actor(actor_class(cluster, driver))
    refs = [driver.call(actor)[0] for _ in range(3)]
    driver.release([ids.object_id(actor, 0)])
    driver.get(refs)
    cluster.run()
    finish_all(cluster)
    assert not driver.errors
    assert driver.values.keys() >= set(refs)
    assert not [worker for worker in cluster.workers if worker.actor]


def test_an_actor_that_is_detached_outlives_its_handles_and_its_driver():
    cluster, driver = started(1)
    other = cluster.add_driver()
    driver.create_actor(actor_class(cluster, driver), detached=True)
    driver.create_actor(actor_class(cluster, driver))
    cluster.run()
    finish_all(cluster)
    node = cluster.ranks[0]
    node.core.to_gcs(m.EndJob(driver.job))
    cluster.kill(driver)
    cluster.run()
    assert len([worker for worker in cluster.workers if worker.actor]) == 1
    assert not other.is_gone


def test_actors_are_placed_where_there_is_a_cpu_and_then_hold_none():
    cluster, driver = started(1, 1)
    for _ in range(6):
        driver.create_actor(actor_class(cluster, driver))
        cluster.run()
    finish_all(cluster)
    hosts = [worker.rank for worker in cluster.workers if worker.actor]
    assert sorted(hosts) == [0, 0, 0, 1, 1, 1]
    assert all(node.core.ledger.free == node.core.ledger.total for node in cluster.ranks)


def test_actors_that_hold_a_cpu_are_not_placed_two_on_one():
    cluster, driver = started(1, 1)
    template = actor_class(cluster, driver, resources={"CPU": UNIT})
    for _ in range(3):
        driver.create_actor(template)
    cluster.run()
    assert sorted(worker.rank for worker in cluster.running) == [0, 1]
    assert cluster.ranks[0].gcs.is_waiting_for_room
    cluster.kill(cluster.running[0])
    cluster.run()
    assert not cluster.ranks[0].gcs.is_waiting_for_room
