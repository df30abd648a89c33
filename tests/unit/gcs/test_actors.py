"""The actor directory: states, names, watchers, and reports that come too late or too early."""

from __future__ import annotations

from typing import Any

import pytest

from hpcray import ids, payload
from hpcray.gcs.actors import ALIVE, DEAD, PENDING, STARTING, ActorRecord, Actors
from hpcray.gcs.groups import PlacementGroups
from hpcray.gcs.views import NodeView
from hpcray.protocol import messages as m
from hpcray.resources import UNIT

CPU = {"CPU": UNIT}
HOME = 0


class Out:
    def __init__(self) -> None:
        self.sent: list[tuple[int, Any]] = []

    def send(self, rank: int, message: Any) -> None:
        self.sent.append((rank, message))

    def take(self, kind: type | None = None) -> list[tuple[int, Any]]:
        sent, self.sent = self.sent, []
        return [(rank, message) for rank, message in sent if kind is None or isinstance(message, kind)]


class Directory(Actors):
    """The directory of a job with two nodes, as the tests speak to it."""

    def __init__(self, restarts: int = 0, **fields: Any) -> None:
        self.out = Out()
        self.nodes = {rank: NodeView(rank, CPU) for rank in (0, 1)}
        options = m.ActorOptions(max_restarts=restarts)
        values: dict[str, Any] = {"num_returns": 0, "resources": CPU, "max_retries": 0, "actor": options, **fields}
        template = m.Template(job=b"job", function=b"class", name="A", **values)
        super().__init__(self.nodes, PlacementGroups(self.nodes, self.out), lambda _: template, self.out)

    def register(
        self, actor: bytes, name: str = "", *, detached: bool = False, error: bytes | None = None
    ) -> ActorRecord:
        self.on_register(m.RegisterActor(actor, b"A", name, "space", detached, error))
        return self.records[actor]

    def started(self, actor: bytes) -> ActorRecord:
        record = self.register(actor)
        self.place()
        self.on_started(m.ActorStarted(actor, record.incarnation, None))
        assert record.state == ALIVE
        return record


def actor(number: int) -> bytes:
    return ids.task_id(ids.client_prefix(HOME, b"12345678", 1), number)


A, B, C = actor(1), actor(2), actor(3)


@pytest.fixture
def directory() -> Directory:
    return Directory()


def changes(sent: list[tuple[int, Any]]) -> list[tuple[int, str]]:
    return [(rank, message.state) for rank, message in sent if isinstance(message, m.ActorChanged)]


def test_an_actor_is_placed_started_and_announced(directory):
    record = directory.register(A)
    assert record.state == PENDING
    directory.place()
    assert record.state == STARTING
    assert directory.out.take() == [(HOME, m.PlaceActor(A, 1, 0))]
    assert directory.nodes[0].placing == {A: [CPU]}
    directory.on_started(m.ActorStarted(A, 1, None))
    assert not directory.nodes[0].placing
    assert changes(directory.out.take()) == [(HOME, ALIVE)]


def test_the_node_with_the_fewest_actors_is_chosen(directory):
    assert [directory.started(one).rank for one in (A, B)] == [0, 1]


def test_without_room_it_waits_until_a_node_reports_some(directory):
    for node in directory.nodes.values():
        node.on_load(m.Load({"CPU": 0}, {}, {}, {}))
    directory.register(A)
    directory.place()
    assert directory.is_waiting_for_room
    directory.nodes[1].on_load(m.Load(CPU, {}, {}, {}))
    directory.place()
    assert directory.records[A].rank == 1
    assert not directory.is_waiting_for_room


@pytest.mark.parametrize("soft", [False, True])
def test_affinity_waits_for_its_node(soft):
    directory = Directory(node=1, node_is_soft=soft)
    directory.nodes[1].on_load(m.Load({"CPU": 0}, {}, {}, {}))
    record = directory.register(A)
    directory.place()
    assert record.rank == -1
    directory.nodes[1].on_load(m.Load(CPU, {}, {}, {}))
    directory.place()
    assert record.rank == 1


@pytest.mark.parametrize(("soft", "rank"), [(False, -1), (True, 0)])
def test_affinity_to_a_node_that_does_not_exist(soft, rank):
    directory = Directory(node=7, node_is_soft=soft)
    record = directory.register(A)
    directory.place()
    assert record.rank == rank


def test_an_error_of_init_is_final_whatever_restarts_are_left():
    directory = Directory(restarts=3)
    record = directory.register(A)
    directory.place()
    directory.on_started(m.ActorStarted(A, 1, b"error"))
    assert (record.state, record.error) == (DEAD, b"error")
    assert not directory.nodes[0].placing
    assert directory.started(B).rank == 0  # its place counts for nothing


def test_restarts_are_counted_down_then_it_is_dead():
    directory = Directory(restarts=1)
    record = directory.started(A)
    directory.on_ended(m.ActorEnded(A, 1, b"first"))
    assert record.state == PENDING
    directory.place()
    assert record.incarnation == 2
    directory.on_started(m.ActorStarted(A, 2, None))
    directory.on_ended(m.ActorEnded(A, 2, b"second"))
    assert (record.state, record.error) == (DEAD, b"second")


def test_minus_one_restarts_for_ever():
    directory = Directory(restarts=-1)
    record = directory.started(A)
    for incarnation in range(1, 10):
        directory.on_ended(m.ActorEnded(A, incarnation, b""))
        directory.place()
        directory.on_started(m.ActorStarted(A, incarnation + 1, None))
        assert record.state == ALIVE


def test_reports_of_an_earlier_incarnation_are_ignored():
    directory = Directory(restarts=1)
    record = directory.started(A)
    directory.on_ended(m.ActorEnded(A, 1, b""))
    directory.on_ended(m.ActorEnded(A, 1, b""))
    directory.on_started(m.ActorStarted(A, 1, None))
    assert record.state == PENDING
    directory.on_started(m.ActorStarted(B, 1, None))  # nobody knows B


def test_watchers_hear_the_present_state_each_change_and_the_death_last(directory):
    directory.started(A)
    directory.out.take()
    directory.on_watch(A, 1)
    assert changes(directory.out.take()) == [(1, ALIVE)]
    directory.on_ended(m.ActorEnded(A, 1, b""))
    assert sorted(changes(directory.out.take())) == [(HOME, DEAD), (1, DEAD)]
    directory.on_watch(A, 1)
    assert changes(directory.out.take()) == [(1, DEAD)]


def test_who_watches_before_the_registration_is_told_too(directory):
    directory.on_watch(A, 1)
    assert not directory.out.sent
    directory.started(A)
    assert sorted(changes(directory.out.take())) == [(HOME, ALIVE), (1, ALIVE)]


def test_an_actor_that_failed_before_it_was_placed_is_dead_for_all(directory):
    directory.claim("space", "name", A, b"handle")
    directory.on_watch(A, 1)
    record = directory.register(A, "name", error=b"why")
    assert (record.state, record.error) == (DEAD, b"why")
    assert sorted(changes(directory.out.take())) == [(HOME, DEAD), (1, DEAD)]
    assert directory.find("space", "name") is None
    assert not directory.is_waiting_for_room


def test_a_name_belongs_to_one_until_that_is_dead(directory):
    assert directory.claim("space", "name", A, b"handle") is None
    error = directory.claim("space", "name", B, b"other")
    assert payload.describe_system_error(error)[0] == "ActorAlreadyExistsError"
    assert directory.claim("elsewhere", "name", B, b"other") is None
    directory.register(A, "name")
    assert directory.find("space", "name") == b"handle"
    directory.on_kill(A, no_restart=True)
    assert directory.find("space", "name") is None
    assert directory.claim("space", "name", C, b"new") is None


@pytest.mark.parametrize("drain", [False, True])
def test_an_end_while_pending_is_immediate(directory, drain):
    record = directory.register(A)
    if drain:
        directory.on_unreferenced(A)
    else:
        directory.on_kill(A, no_restart=True)
    assert record.state == DEAD
    directory.place()
    assert directory.out.take(m.PlaceActor) == []


def test_an_end_while_starting_is_repeated_when_it_lives(directory):
    directory.register(A)
    directory.place()
    directory.on_unreferenced(A)
    assert directory.out.take(m.StopActor) == []
    directory.on_started(m.ActorStarted(A, 1, None))
    assert directory.out.take(m.StopActor) == [(0, m.StopActor(A, drain=True, why="its last handle went out of scope"))]


def test_a_kill_before_the_registration_is_remembered(directory):
    directory.on_kill(A, no_restart=True)
    assert directory.register(A).state == DEAD
    assert directory.register(B).state == PENDING


def test_a_kill_ends_the_worker_and_no_restart_follows():
    directory = Directory(restarts=5)
    record = directory.started(A)
    directory.out.take()
    directory.on_kill(A, no_restart=True)
    assert directory.out.take() == [(0, m.StopActor(A, drain=False, why="it was ended by hpcray.kill()"))]
    directory.on_ended(m.ActorEnded(A, 1, b"killed"))
    assert record.state == DEAD


def test_a_kill_that_allows_restarts_uses_one():
    directory = Directory(restarts=1)
    record = directory.started(A)
    directory.on_kill(A, no_restart=False)
    directory.on_ended(m.ActorEnded(A, 1, b"killed"))
    assert record.state == PENDING


def test_what_is_dead_stays_dead(directory):
    record = directory.started(A)
    directory.on_ended(m.ActorEnded(A, 1, b"first"))
    directory.on_kill(A, no_restart=True)
    directory.on_unreferenced(A)
    assert record.error == b"first"


def test_the_end_of_a_job_ends_its_actors_but_the_detached(directory):
    directory.started(A)
    detached = directory.register(B, detached=True)
    waiting = directory.register(C)
    directory.out.take()
    directory.end_job(lambda _: True)
    assert directory.out.take(m.StopActor) == [(0, m.StopActor(A, drain=False, why="its job ended"))]
    assert detached.state == PENDING
    assert waiting.state == DEAD
