"""Placement groups at the GCS: each transition, refusals, removals at every moment, names, lost ranks, competition."""

from __future__ import annotations

from typing import Any

import pytest

from hpcray import payload
from hpcray.gcs import groups as module
from hpcray.gcs.actors import ALIVE, DEAD, PENDING, STARTING, ActorRecord, Actors
from hpcray.gcs.groups import CREATED, REMOVED, RESCHEDULING, Group, PlacementGroups
from hpcray.gcs.scheduling import Scheduler
from hpcray.gcs.views import NodeView
from hpcray.protocol import messages as m
from hpcray.resources import UNIT, Shape

CPU: Shape = {"CPU": UNIT}
P, Q = b"p" * 18, b"q" * 18
JOB = b"job"
WATCHER = 7


class Job:
    """The groups of a job with these CPUs per rank; raylets do what `answer` says."""

    def __init__(self, *cpus: int, **total: int) -> None:
        extra = {name: amount * UNIT for name, amount in total.items()}
        self.nodes = {rank: NodeView(rank, {"CPU": n * UNIT, **extra}, host=f"h{rank}") for rank, n in enumerate(cpus)}
        self.sent: list[tuple[int, Any]] = []
        self.groups = PlacementGroups(self.nodes, self)

    def send(self, rank: int, message: Any) -> None:
        self.sent.append((rank, message))

    def take(self, kind: type) -> list[tuple[int, Any]]:
        """What was sent of a kind since it was last looked at."""
        taken = [(rank, message) for rank, message in self.sent if isinstance(message, kind)]
        self.sent = [entry for entry in self.sent if not isinstance(entry[1], kind)]
        return taken

    def create(self, group: bytes, *bundles: Shape, strategy: str = "SPREAD", **fields: Any) -> Group:
        values = {"name": "", "namespace": "space", "is_detached": False, "labels": [], **fields}
        spec = m.CreatePlacementGroup(
            group, values.pop("job", JOB), values["name"], values["namespace"], strategy, list(bundles or (CPU,)),
            values["is_detached"], values["labels"],
        )  # fmt: skip
        self.groups.on_create(spec)
        return self.groups.groups.get(group) or Group(spec, 0)

    def answer(self, group: bytes, rank: int, *, ok: bool = True) -> None:
        """The raylet's answer, with the report that follows it."""
        self.groups.on_reserved(rank, m.BundlesReserved(group, ok))

    def report(self, rank: int, cpus: int) -> None:
        self.nodes[rank].on_load(m.Load({"CPU": cpus * UNIT}, {}, {}, {}))
        self.groups.has_news = True

    def created(self, group: bytes, *bundles: Shape, **fields: Any) -> Group:
        """A group that got what it wanted."""
        record = self.create(group, *bundles, **fields)
        self.groups.place()
        for rank in list(record.asked):
            self.answer(group, rank)
        assert record.state == CREATED
        self.sent.clear()
        return record

    def heard(self, rank: int = WATCHER) -> list[str]:
        """The states that a watcher was told since."""
        return [message.state for to, message in self.take(m.PlacementGroupChanged) if to == rank]


# ------------------------------------------------------------------------------------------------------------- transitions
def test_all_bundles_are_asked_for_at_once_and_the_last_answer_makes_the_group():
    job = Job(1, 1)
    group = job.create(P, CPU, CPU)
    job.groups.on_watch(P, WATCHER)
    job.groups.place()
    assert job.take(m.ReserveBundles) == [(0, m.ReserveBundles(P, {0: CPU})), (1, m.ReserveBundles(P, {1: CPU}))]
    job.answer(P, 0)
    assert (group.state, job.heard()) == (module.PENDING, [module.PENDING])
    job.answer(P, 1)
    assert (group.state, job.heard()) == (CREATED, [CREATED])
    assert not job.groups.is_waiting_for_room
    assert not any(node.placing for node in job.nodes.values())


def test_bundles_of_one_node_are_asked_for_together():
    job = Job(2)
    job.create(P, CPU, CPU)
    job.groups.place()
    assert job.take(m.ReserveBundles) == [(0, m.ReserveBundles(P, {0: CPU, 1: CPU}))]


def test_bundles_are_reserved_in_the_order_in_which_they_were_found_to_fit():
    # Of two GPUs: 0.6 and 0.4 on one, 0.5 and 0.5 on the other. In the order given the last would find no place.
    shares = [{"GPU": int(share * UNIT)} for share in (0.5, 0.4, 0.5, 0.6)]
    job = Job(1, GPU=2)
    job.create(P, *shares, strategy="PACK")
    job.groups.place()
    [(_, message)] = job.take(m.ReserveBundles)
    assert list(message.bundles) == [3, 0, 2, 1]


def test_without_room_it_waits_and_news_of_room_place_it():
    job = Job(1, 1)
    job.report(1, 0)
    group = job.create(P, CPU, CPU)
    job.groups.place()
    assert not job.sent
    assert job.groups.is_waiting_for_room
    assert not job.groups.has_news
    job.report(1, 1)
    job.groups.place()
    assert sorted(group.asked) == [0, 1]


def test_a_refusal_gives_back_what_others_granted_once_all_have_answered():
    job = Job(1, 1, 1)
    group = job.create(P, CPU, CPU, CPU)
    job.groups.place()
    job.take(m.ReserveBundles)
    job.answer(P, 0)
    job.answer(P, 1, ok=False)
    job.report(1, 0)
    assert not job.take(m.ReturnBundles)
    job.answer(P, 2)
    assert job.take(m.ReturnBundles) == [(0, m.ReturnBundles(P, [0])), (2, m.ReturnBundles(P, [2]))]
    assert group.state == module.PENDING
    assert not group.placed
    job.groups.place()
    assert not job.take(m.ReserveBundles)  # rank 1 has no room
    job.report(1, 1)
    job.groups.place()
    assert len(job.take(m.ReserveBundles)) == 3


def test_a_late_answer_is_none():
    job = Job(1)
    group = job.created(P, CPU)
    job.answer(P, 0, ok=False)
    job.answer(Q, 0)
    assert group.state == CREATED
    assert not job.sent


# ---------------------------------------------------------------------------------------------------------------- removal
def test_removed_before_it_was_placed():
    job = Job(0)
    job.create(P, CPU)
    job.groups.on_watch(P, WATCHER)
    job.groups.on_remove(P)
    assert job.heard() == [module.PENDING, REMOVED]
    assert not job.take(m.ReturnBundles)
    assert not job.groups.is_waiting_for_room
    assert not job.groups.groups


def test_removed_when_created():
    job = Job(1, 1, 1)
    job.created(P, CPU, CPU)
    job.groups.on_watch(P, WATCHER)
    job.groups.on_remove(P)
    assert job.heard() == [CREATED, REMOVED]
    assert job.take(m.ReturnBundles) == [(0, m.ReturnBundles(P, [])), (1, m.ReturnBundles(P, []))]
    job.groups.on_remove(P)
    assert not job.sent


@pytest.mark.parametrize("ok", [True, False])
def test_removed_while_reserving_it_ends_when_all_have_answered(ok):
    job = Job(1, 1)
    job.create(P, CPU, CPU)
    job.groups.place()
    job.groups.on_watch(P, WATCHER)
    job.answer(P, 0)
    job.groups.on_remove(P)
    job.groups.on_remove(P)
    assert job.groups.is_removed(P)
    assert not job.take(m.ReturnBundles)
    job.answer(P, 1, ok=ok)
    returned = [(0, m.ReturnBundles(P, [])), (1, m.ReturnBundles(P, []))]
    assert job.take(m.ReturnBundles) == (returned if ok else returned[:1])
    assert job.heard() == [module.PENDING, REMOVED]
    assert not job.groups.groups
    assert not any(node.placing for node in job.nodes.values())


def test_a_removal_may_overtake_the_creation():
    job = Job(1)
    job.groups.on_watch(P, WATCHER)
    job.groups.on_remove(P)
    assert not job.sent
    job.create(P, CPU)
    assert job.heard() == [REMOVED]
    assert not job.groups.is_waiting_for_room
    job.created(Q, CPU)


def test_who_watches_a_group_that_is_gone_is_told():
    job = Job(1)
    job.created(P, CPU)
    job.groups.on_remove(P)
    job.groups.on_watch(P, WATCHER)
    assert job.heard() == [REMOVED]


def test_who_watches_before_the_creation_hears_of_everything():
    job = Job(1)
    job.groups.on_watch(P, WATCHER)
    job.create(P, CPU)
    job.groups.place()
    job.answer(P, 0)
    job.groups.on_remove(P)
    assert job.heard() == [CREATED, REMOVED]


def test_as_many_removed_groups_as_said_are_remembered_and_listed(monkeypatch):
    monkeypatch.setattr(module, "REMEMBERED", 3)
    monkeypatch.setattr(module, "SHOWN", 2)
    job = Job(1)
    names = [bytes([number]) * 18 for number in range(4)]
    for name in names:
        job.created(name, CPU)
        job.groups.on_remove(name)
    assert [job.groups.is_removed(name) for name in names] == [False, True, True, True]
    assert [group.id for group in job.groups.known()] == names[2:]
    assert job.groups.describe(job.groups.known()[0], str)["state"] == "REMOVED"


# ------------------------------------------------------------------------------------------------------------------- names
def test_a_name_is_one_groups_until_it_is_removed():
    job = Job(1)
    assert job.groups.claim("space", "name", P) is None
    refusal = job.groups.claim("space", "name", Q)
    assert refusal is not None
    assert payload.describe_system_error(refusal)[0] == "RaySystemError"
    assert job.groups.claim("another", "name", Q) is None
    group = job.create(P, CPU, name="name")
    assert job.groups.find("space", "name") is group
    assert job.groups.find("space", "other") is None
    job.groups.place()
    job.groups.on_remove(P)  # though a raylet has not answered
    assert job.groups.find("space", "name") is None
    assert job.groups.claim("space", "name", Q) is None
    job.answer(P, 0)
    job.create(Q, CPU, name="name")
    assert job.groups.find("space", "name").id == Q


# -------------------------------------------------------------------------------------------------------------------- jobs
def test_the_end_of_a_job_removes_its_groups_but_no_detached_ones():
    job = Job(5)
    job.created(P, CPU)
    kept = job.created(Q, CPU, is_detached=True)
    other = job.created(b"o" * 18, CPU, job=b"another")
    assert job.groups.end_job(JOB) == [P]
    assert set(job.groups.groups.values()) == {kept, other}


def test_a_group_that_comes_after_the_end_of_its_job_is_removed_at_once():
    job = Job(5)
    job.groups.end_job(JOB)
    job.create(P, CPU)
    assert job.groups.is_removed(P)
    assert not job.groups.is_waiting_for_room
    job.created(Q, CPU, is_detached=True)


# -------------------------------------------------------------------------------------------------------------- lost ranks
def test_a_rank_is_lost_before_the_group_is_placed():
    job = Job(1, 1)
    group = job.create(P, CPU, CPU, CPU)
    job.groups.place()
    job.groups.on_rank_lost(1)
    assert group.state == module.PENDING
    assert not job.take(m.ReserveBundles)


@pytest.mark.parametrize("has_answered", [True, False])
@pytest.mark.parametrize("is_last", [True, False])
def test_a_rank_is_lost_while_reserving(has_answered, is_last):
    job = Job(1, 1, 1)
    group = job.create(P, CPU, CPU)
    job.groups.place()
    job.take(m.ReserveBundles)
    if has_answered:
        job.answer(P, 1)
    if is_last and not has_answered:
        job.answer(P, 0)
    lose(job, 1)
    if not is_last or has_answered:
        job.answer(P, 0)
    assert group.state == module.PENDING
    assert job.take(m.ReturnBundles) == [(0, m.ReturnBundles(P, [0]))]
    job.groups.place()
    assert sorted(rank for rank, _ in job.take(m.ReserveBundles)) == [0, 2]


def test_a_created_group_gets_its_lost_bundles_elsewhere():
    job = Job(1, 1, 1)
    group = job.created(P, CPU, CPU)
    job.groups.on_watch(P, WATCHER)
    lose(job, 1)
    assert group.state == RESCHEDULING
    job.groups.place()
    assert job.take(m.ReserveBundles) == [(2, m.ReserveBundles(P, {1: CPU}))]
    job.answer(P, 2)
    assert job.heard() == [CREATED, RESCHEDULING, CREATED]
    assert group.placed == {0: 0, 1: 2}


def test_another_rank_is_lost_while_lost_bundles_are_reserved():
    job = Job(1, 1, 1, 2)
    group = job.created(P, CPU, CPU)
    lose(job, 1)
    job.groups.place()
    lose(job, 0)
    job.answer(P, 2)
    assert group.state == RESCHEDULING
    assert job.take(m.ReturnBundles) == [(2, m.ReturnBundles(P, [1]))]
    job.take(m.ReserveBundles)
    job.groups.place()
    for rank in [rank for rank, _ in job.take(m.ReserveBundles)]:
        job.answer(P, rank)
    assert group.state == CREATED
    assert sorted(group.placed) == [0, 1]
    assert set(group.placed.values()) <= {2, 3}


def test_a_refusal_while_rescheduling_leaves_the_other_bundles_where_they_are():
    job = Job(1, 1, 1)
    group = job.created(P, CPU, CPU)
    lose(job, 1)
    job.groups.place()
    job.answer(P, 2, ok=False)
    assert group.placed == {0: 0}
    assert group.state == RESCHEDULING
    assert not job.take(m.ReturnBundles)
    assert job.groups.is_waiting_for_room


def test_a_rank_is_lost_that_was_asked_for_a_group_that_nobody_wants():
    job = Job(1, 1)
    job.create(P, CPU, CPU)
    job.created(Q, {}, strategy="PACK")
    job.groups.place()
    job.answer(P, 0)
    job.groups.on_remove(P)
    lose(job, 1)
    assert list(job.groups.groups) == [Q]
    assert job.take(m.ReturnBundles) == [(0, m.ReturnBundles(P, []))]


def lose(job: Job, rank: int) -> None:
    del job.nodes[rank]
    job.groups.on_rank_lost(rank)


# -------------------------------------------------------------------------------------------------------------- competition
def test_of_two_groups_the_first_gets_the_room_and_the_second_what_it_leaves():
    job = Job(1, 1)
    first, second = job.create(P, CPU, CPU), job.create(Q, CPU, CPU)
    job.groups.place()
    assert sorted(first.asked) == [0, 1]
    assert not second.asked
    for rank in (0, 1):
        job.answer(P, rank)
        job.report(rank, 0)
    job.groups.on_remove(P)
    for rank in (0, 1):
        job.report(rank, 1)
    job.groups.place()
    assert sorted(second.asked) == [0, 1]


def test_a_group_that_was_refused_has_its_turn_before_those_that_came_later():
    job = Job(1)
    first, second = job.create(P, CPU), job.create(Q, CPU)
    job.groups.place()
    job.answer(P, 0, ok=False)
    job.report(0, 1)
    job.groups.place()
    assert first.asked
    assert not second.asked


def test_a_small_group_is_not_held_up_by_a_large_one():
    job = Job(1)
    large, small = job.create(P, {"CPU": 2 * UNIT}), job.create(Q, CPU)
    job.groups.place()
    assert not large.asked
    assert small.asked


def test_groups_alike_are_not_tried_again_when_one_found_no_place(monkeypatch):
    job = Job(1)
    tried = []

    def place(bundles: Any, *_: Any, **__: Any) -> None:
        tried.append(len(bundles))

    monkeypatch.setattr(module, "place_bundles", place)
    for number in range(10):
        job.create(bytes([number]) * 18, *[CPU] * (1 + number % 2))
    job.groups.place()
    assert tried == [1, 2]


def test_what_was_asked_for_counts_until_the_report_that_comes_with_the_answer():
    job = Job(4)
    for number in range(5):
        job.create(bytes([number]) * 18, CPU)
    job.groups.place()
    assert len(job.take(m.ReserveBundles)) == 4
    job.report(0, 4)  # sent before it was asked
    job.groups.place()
    assert not job.take(m.ReserveBundles)


# ------------------------------------------------------------------------------------------------------- what runs in them
def template(group: bytes = P, bundle: int = -1, **fields: Any) -> m.Template:
    values: dict[str, Any] = {"num_returns": 1, "resources": CPU, "max_retries": 0, **fields}
    return m.Template(job=JOB, function=b"function", name="f", group=group, bundle=bundle, **values)


def test_bundles_are_offered_once_the_group_is_whole():
    job = Job(1, 1)
    job.create(P, CPU, CPU)
    assert job.groups.bundles_on(template(Q)) == {}
    job.groups.place()
    job.answer(P, 0)
    assert job.groups.bundles_on(template()) == {}
    job.answer(P, 1)
    assert job.groups.bundles_on(template()) == {0: {0: CPU}, 1: {1: CPU}}
    assert job.groups.bundles_on(template(bundle=1)) == {1: {1: CPU}}
    job.groups.on_remove(P)
    assert job.groups.bundles_on(template()) == {}


def test_of_a_group_that_is_mended_the_bundles_that_stayed_are_offered():
    job = Job(2, 1, 1, 1)
    group = job.created(P, CPU, CPU, CPU, strategy="STRICT_SPREAD")
    assert group.placed == {0: 0, 1: 1, 2: 2}
    lose(job, 1)
    job.groups.place()
    assert job.groups.bundles_on(template()) == {0: {0: CPU}, 2: {2: CPU}}
    job.answer(P, 3)
    assert job.groups.bundles_on(template()) == {0: {0: CPU}, 2: {2: CPU}, 3: {1: CPU}}


def test_tasks_are_granted_places_in_bundles_only():
    job = Job(9, 9)
    job.created(P, CPU, {"CPU": 2 * UNIT}, strategy="STRICT_SPREAD")
    spec = template()
    gcs = Scheduler(job.nodes, job.groups, lambda _: spec)
    gcs.on_demand(0, m.Demand(b"f", 10))
    counts: dict[int, int] = {}
    for _, grant in gcs.grants():
        counts[grant.rank] = counts.get(grant.rank, 0) + grant.count
    sizes = {rank: next(iter(bundles.values()))["CPU"] // UNIT for rank, bundles in job.groups.bundles_on(spec).items()}
    assert counts == sizes
    job.groups.on_remove(P)
    assert gcs.grants() == []


class Directory(Actors):
    def __init__(self, job: Job, **specs: m.Template) -> None:
        self.specs = {name.encode(): spec for name, spec in specs.items()}
        super().__init__(job.nodes, job.groups, self.specs.__getitem__, job)

    def register(self, actor: bytes, spec: bytes = b"any") -> ActorRecord:
        self.on_register(m.RegisterActor(actor, spec, "", "", False, None))
        self.place()
        return self.records[actor]


def actor(number: int) -> bytes:
    return bytes(23) + bytes([number])


def of_actors(**fields: Any) -> m.Template:
    return template(actor=m.ActorOptions(), **fields)


def test_actors_wait_for_the_group_and_take_up_no_room_outside():
    job = Job(1)
    job.create(P, CPU)
    actors = Directory(job, any=of_actors())
    record = actors.register(actor(1))
    assert record.state == PENDING
    job.groups.place()
    job.answer(P, 0)
    job.report(0, 0)
    actors.place()
    assert record.state == STARTING
    assert not job.nodes[0].placing


def test_actors_go_where_other_actors_leave_room():
    job = Job(1, 1)
    job.created(P, CPU, CPU)
    actors = Directory(job, any=of_actors(), other=template(b"", actor=m.ActorOptions(), resources={}))
    for number in range(5):
        actors.register(actor(number), b"other")
    ranks = [actors.register(actor(10 + number)).rank for number in range(3)]
    assert sorted(ranks) == [-1, 0, 1]
    ended = actors.records[actor(10)]
    actors.on_started(m.ActorStarted(ended.id, 1, None))
    actors.on_ended(m.ActorEnded(ended.id, 1, b"error"))
    actors.place()
    assert actors.records[actor(12)].rank == ranks[0]


def test_an_actor_of_a_bundle_goes_there_and_waits_for_the_one_that_has_it():
    job = Job(1, 1)
    group = job.created(P, CPU, CPU)
    actors = Directory(job, any=of_actors(), one=of_actors(bundle=1))
    record = actors.register(actor(1), b"one")
    assert (record.rank, record.bundle) == (group.placed[1], 1)
    assert actors.register(actor(2), b"one").state == PENDING
    assert actors.register(actor(3)).rank == group.placed[0]


def test_actors_end_with_their_group_in_every_state():
    job = Job(2)
    job.created(P, CPU, CPU)
    actors = Directory(job, any=of_actors(), other=template(b"", actor=m.ActorOptions()))
    outsider = actors.register(actor(9), b"other")
    alive, starting, pending = (actors.register(actor(number)) for number in range(3))
    actors.on_started(m.ActorStarted(alive.id, 1, None))
    assert [record.state for record in (alive, starting, pending)] == [ALIVE, STARTING, PENDING]
    job.groups.on_remove(P)
    actors.end_group(P)
    assert [message.actor for _, message in job.take(m.StopActor)] == [alive.id, starting.id]
    for record in (alive, starting):
        actors.on_ended(m.ActorEnded(record.id, 1, b"killed"))
    late = actors.register(actor(4))
    assert {record.state for record in (alive, starting, pending, late)} == {DEAD}
    assert alive.error == b"killed"
    unborn = {payload.describe_system_error(record.error)[0] for record in (starting, pending, late)}
    assert unborn == {"ActorUnschedulableError"}
    assert outsider.state == STARTING
    assert not actors._in_groups


# ------------------------------------------------------------------------------------------------------------------- words
def test_descriptions_are_as_rays():
    job = Job(1, 1)
    group = job.create(P, CPU, {"CPU": 5000}, name="name", strategy="SPREAD")
    assert job.groups.describe(group, lambda rank: f"node{rank}") == {
        "placement_group_id": P.hex(),
        "name": "name",
        "bundles": {0: {"CPU": 1.0}, 1: {"CPU": 0.5}},
        "bundles_to_node_id": {0: "", 1: ""},
        "strategy": "SPREAD",
        "state": "PENDING",
        "stats": {"scheduling_state": "PENDING"},
    }
    job.groups.place()
    assert job.groups.why_waiting(group) == "its bundles are being reserved"
    for rank in (0, 1):
        job.answer(P, rank)
    described = job.groups.describe(group, lambda rank: f"node{rank}")
    assert described["state"] == "CREATED"
    assert set(described["bundles_to_node_id"].values()) == {"node0", "node1"}
    assert job.groups.why_waiting(group) == ""


def test_why_a_group_waits_and_whether_it_always_will():
    job = Job(1)
    large, busy = job.create(P, {"CPU": 2 * UNIT}), job.create(Q, CPU)
    job.report(0, 0)
    job.groups.place()
    assert "2 CPU" in job.groups.why_waiting(large)
    assert job.groups.why_waiting(busy)
    assert [job.groups.is_infeasible(group) for group in (large, busy)] == [True, False]


def test_users_are_told_once_of_groups_that_can_never_be_placed():
    job = Job(1)
    job.create(P, {"CPU": 2 * UNIT}, name="large")
    job.create(b"r" * 18, {"CPU": 2 * UNIT})
    job.create(Q, CPU)
    for _ in range(2):
        job.report(0, 0)
        job.groups.place()
    [(rank, lines)] = job.take(m.LogLines)
    assert rank == 0
    assert "'large'" in lines.lines[0]
    assert "2 CPU" in "".join(lines.lines)
