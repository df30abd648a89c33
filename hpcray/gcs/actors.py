"""The actor directory: where each actor lives, under which name, and why it died.

    PENDING ──placed──► STARTING ──started──► ALIVE
       ▲                    │ init failed        │ ended
       └──── restarts left ─┴────────────────────┤
                                                 └── none left, killed, unreferenced ──► DEAD

Rules:
  1. At most one incarnation of an actor is starting or alive; reports about an earlier one are ignored.
  2. A name belongs to at most one actor that is not dead.
  3. Everybody who watches an actor hears of each change, in order, and of its death last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from hpcray import payload
from hpcray.gcs import policies
from hpcray.gcs.groups import PlacementGroups
from hpcray.gcs.views import NodeView
from hpcray.ids import home_of, shown_actor
from hpcray.observe.findings import Finding
from hpcray.protocol import messages as m
from hpcray.resources import Shape, slots

PENDING, STARTING, ALIVE, DEAD = "pending", "starting", "alive", "dead"
KILLED = "it was ended by hpcray.kill()"
GROUP_REMOVED = "its placement group was removed"


class ActorsOut(Protocol):
    """The only way out of the directory."""

    def send(self, rank: int, message: m.PeerMessage) -> None: ...


class ActorRecord:
    """One actor, from its registration to the end of the job."""

    __slots__ = (
        "bundle",
        "error",
        "id",
        "incarnation",
        "is_detached",
        "is_wanted_dead",
        "key",
        "rank",
        "restarts",
        "state",
        "template",
        "watchers",
        "why",
    )

    def __init__(self, message: m.RegisterActor, restarts: int) -> None:
        self.id = message.actor
        self.template = message.template
        self.key = (message.namespace, message.name) if message.name else None
        self.is_detached = message.detached
        self.is_wanted_dead = False
        self.why = ""
        """If so."""
        self.restarts = restarts
        self.state = PENDING
        self.rank = -1
        self.bundle = -1
        """The bundle of its placement group that counts as its own."""
        self.incarnation = 0
        self.error = b""
        self.watchers: set[int] = {home_of(message.actor)}

    @property
    def shown_state(self) -> str:
        """The state under Ray's name."""
        if self.state in (PENDING, STARTING):
            return "RESTARTING" if self.incarnation > 1 else "PENDING_CREATION"
        return self.state.upper()


class Actors:
    """All actors of all jobs: pure."""

    def __init__(
        self,
        nodes: dict[int, NodeView],
        groups: PlacementGroups,
        template: Callable[[bytes], m.Template],
        out: ActorsOut,
    ) -> None:
        self._nodes = nodes
        self._groups = groups
        self._template = template
        self._out = out
        self.records: dict[bytes, ActorRecord] = {}
        self.names: dict[tuple[str, str], tuple[bytes, bytes]] = {}
        """(namespace, name) → actor and its pickled handle."""
        self._pending: dict[bytes, None] = {}
        self._early_watchers: dict[bytes, set[int]] = {}
        self._early_kills: set[bytes] = set()
        """Actors that were killed before the arguments of their creation existed."""
        self._in_groups: dict[bytes, dict[bytes, ActorRecord]] = {}
        """Placement group → actors in it that are not dead."""
        self._living: dict[int, int] = {}
        """Rank → actors that are starting or alive there."""

    # -------------------------------------------------------------------------------------------------- names
    def claim(self, namespace: str, name: str, actor: bytes, handle: bytes) -> bytes | None:
        """Reserve a name; the error's payload if it is taken."""
        if (namespace, name) in self.names:
            where = f"namespace {namespace!r}"
            text = f"the name {name!r} is taken by another actor of {where}: hpcray.get_actor({name!r}) finds it"
            return payload.system_error("ActorAlreadyExistsError", text)
        self.names[namespace, name] = (actor, handle)
        return None

    def find(self, namespace: str, name: str) -> bytes | None:
        """The pickled handle of a named actor that is not dead."""
        known = self.names.get((namespace, name))
        return known[1] if known else None

    # --------------------------------------------------------------------------------------------- life cycle
    def on_register(self, message: m.RegisterActor) -> None:
        spec = self._template(message.template)
        record = ActorRecord(message, spec.actor.max_restarts if spec.actor else 0)
        record.watchers |= self._early_watchers.pop(record.id, set())
        self.records[record.id] = record
        if message.error is not None:
            self._die(record, message.error)
            return
        if spec.group and self._groups.is_removed(spec.group):
            self._die(record, payload.group_removed(spec.group, spec.name, is_actor=True))
            return
        if spec.group:
            self._in_groups.setdefault(spec.group, {})[record.id] = record
        self._pending[record.id] = None
        if record.id in self._early_kills:
            self._early_kills.discard(record.id)
            self.on_kill(record.id, no_restart=True)

    def place(self) -> None:
        """Give pending actors a node, each the fitting one with the fewest actors. Once per turn."""
        for identifier in list(self._pending):
            record = self.records[identifier]
            spec = self._template(record.template)
            rank, record.bundle = self._choose_bundle(spec) if spec.group else (self._choose(spec), -1)
            if rank is None:
                continue
            del self._pending[identifier]
            record.state = STARTING
            record.rank = rank
            record.incarnation += 1
            self._living[rank] = self._living.get(rank, 0) + 1
            if not spec.group:
                self._nodes[rank].placing[identifier] = [spec.resources]
            self._out.send(home_of(identifier), m.PlaceActor(identifier, record.incarnation, rank))

    def _choose(self, spec: m.Template) -> int | None:
        needed = policies.demand_of(spec)
        nodes = policies.feasible(spec, self._nodes.values())
        fitting = policies.favourites(spec, [node for node in nodes if node.has_room_for(needed)])
        # Actors that hold nothing while they run would all be packed on one node by what it has free.
        return min((node.rank for node in fitting), key=lambda rank: (self._living.get(rank, 0), rank), default=None)

    def _choose_bundle(self, spec: m.Template) -> tuple[int | None, int]:
        """A rank with a bundle that other actors leave room in, and the bundle.

        Its raylet has the actor wait for tasks in the bundle, of which the GCS does not know, and may take another one.
        """
        needed = spec.resources
        taken: dict[int, Shape] = {}
        for record in self._in_groups[spec.group].values():
            if record.bundle >= 0:
                of_bundle = taken.setdefault(record.bundle, {})
                for name, amount in self._template(record.template).resources.items():
                    of_bundle[name] = of_bundle.get(name, 0) + amount
        fitting = []
        for rank, bundles in self._groups.bundles_on(spec).items():
            for index, bundle in bundles.items():
                by_others = taken.get(index, {})
                room = slots({name: amount - by_others.get(name, 0) for name, amount in bundle.items()}, needed)
                if room:
                    fitting.append((self._living.get(rank, 0), rank, room, index))
        if not fitting:
            return None, -1
        _, rank, _, index = min(fitting)
        return rank, index

    def on_started(self, message: m.ActorStarted) -> None:
        record = self._current(message.actor, message.incarnation)
        if record is None:
            return
        self._nodes[record.rank].placing.pop(record.id, None)
        if message.error is not None:
            self._leave(record)
            self._die(record, self._unborn(record) or message.error)
            return
        record.state = ALIVE
        self._announce(record)

    def on_ended(self, message: m.ActorEnded) -> None:
        record = self._current(message.actor, message.incarnation)
        if record is None:
            return
        self._leave(record)
        if record.is_wanted_dead or record.restarts == 0:
            self._die(record, self._unborn(record) or message.error)
            return
        if record.restarts > 0:
            record.restarts -= 1
        record.state = PENDING
        self._pending[record.id] = None
        self._announce(record)

    def on_unreferenced(self, identifier: bytes) -> None:
        self._end(identifier, drain=True, why="its last handle went out of scope")

    def on_kill(self, identifier: bytes, *, no_restart: bool) -> None:
        if no_restart and identifier not in self.records:
            self._early_kills.add(identifier)
        elif no_restart:
            self._end(identifier, drain=False, why=KILLED)
        elif (record := self.records.get(identifier)) is not None and record.state == ALIVE:
            self._out.send(record.rank, m.StopActor(identifier, drain=False, why=KILLED))

    def _end(self, identifier: bytes, *, drain: bool, why: str) -> None:
        record = self.records.get(identifier)
        if record is None or record.state == DEAD:
            return
        record.is_wanted_dead = True
        record.why = why
        if record.state == PENDING:
            self._pending.pop(identifier, None)
            error = payload.actor_died(identifier, self._template(record.template).name, f"{why}.")
            self._die(record, self._unborn(record) or error)
        elif record.state == ALIVE or not drain:
            # Sent while it is starting, this may arrive before the actor does: `_announce` repeats it.
            self._out.send(record.rank, m.StopActor(identifier, drain, why))

    def _unborn(self, record: ActorRecord) -> bytes | None:
        """Why an actor cannot come to live any more whose placement group was removed before it did."""
        if record.why != GROUP_REMOVED or record.state not in (PENDING, STARTING):
            return None
        template = self._template(record.template)
        return payload.group_removed(template.group, template.name, is_actor=True)

    @property
    def is_waiting_for_room(self) -> bool:
        """Whether an actor waits for a node."""
        return bool(self._pending)

    def _leave(self, record: ActorRecord) -> None:
        record.bundle = -1
        self._nodes[record.rank].placing.pop(record.id, None)
        self._living[record.rank] -= 1

    def _die(self, record: ActorRecord, error: bytes) -> None:
        record.state = DEAD
        record.error = error
        record.rank = -1
        if (group := self._template(record.template).group) in self._in_groups:
            in_group = self._in_groups[group]
            in_group.pop(record.id, None)
            if not in_group:
                del self._in_groups[group]
        if record.key is not None and self.names.get(record.key, (b"",))[0] == record.id:
            del self.names[record.key]
        self._announce(record)

    def _current(self, identifier: bytes, incarnation: int) -> ActorRecord | None:
        record = self.records.get(identifier)
        if record is None or record.incarnation != incarnation or record.state not in (STARTING, ALIVE):
            return None
        return record

    # -------------------------------------------------------------------------------------------- explanations
    def living(self) -> list[ActorRecord]:
        """All actors that are not dead."""
        return [record for record in self.records.values() if record.state != DEAD]

    def explain(self, asked: str) -> list[Finding]:
        """Actors of this name, class or id; of a class, those that are not dead."""
        findings = []
        for record in self.records.values():
            name, shown = self._template(record.template).name, shown_actor(record.id).hex()
            is_one = asked in (shown, record.id.hex()) or (record.key is not None and asked == record.key[1])
            if is_one or (asked == name and record.state != DEAD):
                waiting = record.template if record.state == PENDING else b""
                title = f"actor {name}" + (f" {record.key[1]!r}" if record.key is not None else "")
                findings.append(Finding("actor", shown, title, 0, self._story(record), waiting))
        return findings

    @property
    def waiting(self) -> dict[bytes, tuple[str, bytes]]:
        """Of those that wait for a node, what to call them, and their class."""
        templates = {identifier: self.records[identifier].template for identifier in self._pending}
        return {one: (f"actor {self._template(template).name}", template) for one, template in templates.items()}

    @staticmethod
    def _story(record: ActorRecord) -> str:
        if record.state == PENDING:
            return "waits for a node"
        if record.state == STARTING:
            return f"is being started on rank {record.rank}: its __init__ has not returned"
        if record.state == ALIVE:
            return f"lives on rank {record.rank}" + (
                f", and is about to end: {record.why}" if record.is_wanted_dead else ""
            )
        return "is dead"

    # ----------------------------------------------------------------------------------------------- watchers
    def on_watch(self, identifier: bytes, rank: int) -> None:
        record = self.records.get(identifier)
        if record is None:
            self._early_watchers.setdefault(identifier, set()).add(rank)
            return
        record.watchers.add(rank)
        self._tell(record, rank)

    def _announce(self, record: ActorRecord) -> None:
        for rank in record.watchers:
            self._tell(record, rank)
        if record.state == DEAD:
            record.watchers.clear()
        elif record.state == ALIVE and record.is_wanted_dead:
            self._out.send(record.rank, m.StopActor(record.id, True, record.why))

    def _tell(self, record: ActorRecord, rank: int) -> None:
        # Callers of an actor that is about to end wait for its end, rather than have their calls run after a
        # kill.
        is_coming_or_going = record.state == STARTING or (record.state == ALIVE and record.is_wanted_dead)
        state = PENDING if is_coming_or_going else record.state
        self._out.send(rank, m.ActorChanged(record.id, state, record.rank, record.incarnation, record.error))

    # --------------------------------------------------------------------------------------------------- jobs
    def end_group(self, group: bytes) -> None:
        """End the actors in a placement group that is no more."""
        for actor in list(self._in_groups.get(group, ())):
            self._end(actor, drain=False, why=GROUP_REMOVED)

    def end_job(self, is_of_job: Callable[[bytes], bool]) -> None:
        """End the actors of a job; detached ones stay."""
        for record in list(self.records.values()):
            if is_of_job(record.template) and not record.is_detached:
                self._end(record.id, drain=False, why="its job ended")
