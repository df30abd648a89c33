"""The GCS: everything the control service knows.

Rules:
  1. No clock, socket, MPI or randomness here: `now` and messages come in, calls on `out` go out.
  2. Handlers change state; grants and placements are made once per turn, in `end_turn`.
  3. It sees classes of tasks and their counts, never tasks; actors one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from hpcray import payload
from hpcray.gcs import policies
from hpcray.gcs.actors import ActorRecord, Actors
from hpcray.gcs.groups import Group, PlacementGroups
from hpcray.gcs.patience import PATIENCE, Patience
from hpcray.gcs.scheduling import Scheduler
from hpcray.gcs.views import NodeView
from hpcray.ids import node_id
from hpcray.observe.findings import Finding
from hpcray.protocol import messages as m
from hpcray.raylet.core import NodeInfo
from hpcray.resources import Shape, as_floats

_to_msgpack = msgspec.msgpack.encode
_from_msgpack = msgspec.msgpack.decode


class GcsOut(Protocol):
    """The only way out of the GCS."""

    def send(self, rank: int, message: m.PeerMessage) -> None: ...


class GcsCore:
    """The control service of one job."""

    def __init__(
        self, nodes: list[NodeInfo], nonce: bytes, template: Callable[[bytes], m.Template], out: GcsOut
    ) -> None:
        self.nodes = nodes
        self._nonce = nonce
        self._template = template
        self._out = out
        self.views = {
            node.rank: NodeView(node.rank, node.resources, host=node.host, labels=node.labels, switch=node.switch)
            for node in nodes
        }
        self.groups = PlacementGroups(self.views, out)
        self.scheduler = Scheduler(self.views, self.groups, template)
        self.actors = Actors(self.views, self.groups, template, out)
        self._patience = Patience()
        self._handlers: dict[type, Callable[[int, Any], None]] = {
            m.Demand: self.scheduler.on_demand,
            m.Load: self._on_load,
            m.Stuck: lambda _, x: self._on_stuck(x),
            m.GrantReturned: lambda _, x: self.scheduler.on_returned(x),
            m.CreatePlacementGroup: lambda _, x: self.groups.on_create(x),
            m.RemovePlacementGroup: lambda _, x: self._on_remove_group(x.group),
            m.WatchPlacementGroup: lambda rank, x: self.groups.on_watch(x.group, rank),
            m.BundlesReserved: self.groups.on_reserved,
            m.RegisterActor: lambda _, x: self.actors.on_register(x),
            m.ActorStarted: lambda _, x: self._on_actor_news(self.actors.on_started, x),
            m.ActorEnded: lambda _, x: self._on_actor_news(self.actors.on_ended, x),
            m.ActorUnreferenced: lambda _, x: self.actors.on_unreferenced(x.actor),
            m.KillActor: lambda _, x: self.actors.on_kill(x.actor, no_restart=x.no_restart),
            m.WatchActor: lambda rank, x: self.actors.on_watch(x.actor, rank),
            m.Ask: self._on_ask,
            m.EndJob: self._on_end_job,
        }
        self._answers: dict[str, Callable[[Any], Any]] = {
            "nodes": lambda _: [self._describe(node) for node in nodes],
            "cluster_resources": lambda _: self._sum([node.resources for node in nodes]),
            "available_resources": lambda _: self._available(),
            "claim_name": self._claim_name,
            "get_actor": self._get_actor,
            "named_actors": lambda _: [list(key) for key in self.actors.names],
            "claim_group_name": self._claim_group_name,
            "placement_group": self._get_group,
            "why": self.why,
            "placement_groups": lambda _: [self._describe_group(group) for group in self.groups.known()],
        }

    def on_message(self, rank: int, message: m.PeerMessage) -> None:
        """A raylet's message.

        Raises:
            KeyError: Not a message to the GCS.
        """
        self._handlers[type(message)](rank, message)

    @property
    def is_waiting_for_room(self) -> bool:
        """Whether an actor or placement group waits for what a node may have free."""
        return self.actors.is_waiting_for_room or self.groups.is_waiting_for_room

    def end_turn(self, now: float) -> None:
        """Make the grants and placements that this turn's news allow."""
        if self.groups.has_news and self.groups.is_waiting_for_room:
            self.groups.place()
        if self.actors.is_waiting_for_room:
            self.actors.place()
        if (self.is_waiting_for_room or self._patience.due is not None) and self._patience.is_time(now):
            self._tell_of_the_overdue(now)
        if not self.scheduler.has_demands:
            return
        for home, grant in self.scheduler.grants():
            self._out.send(home, grant)

    @property
    def next_due(self) -> float | None:
        """When `end_turn` is to be called even if nothing happens until then."""
        return self._patience.due

    def _tell_of_the_overdue(self, now: float) -> None:
        waiting = self.actors.waiting | self.groups.waiting
        for identifier in self._patience.overdue(now, waiting.keys()):
            title, template = waiting[identifier]
            why = self.why(template) if template else self.groups.why_waiting(self.groups.groups[identifier])
            if why and (not template or policies.feasible(self._template(template), self.views.values())):
                self._notify(f"{title} has waited for a place for {PATIENCE:.0f} s:", why)

    def _on_stuck(self, message: m.Stuck) -> None:
        spec = self._template(message.template)
        if spec.group and self.groups.is_pending(spec.group):
            return  # which is told by itself
        if (spec.group or policies.feasible(spec, self.views.values())) and (why := self.why(message.template)):
            tasks = f"{message.count} tasks" if message.count > 1 else "1 task"
            self._notify(f"{tasks} {spec.name}() found no place for {PATIENCE:.0f} s, and none of them runs:", why)

    def _notify(self, title: str, lines: str) -> None:
        shown = [title, *(f"  {line}" for line in lines.splitlines())]
        self._out.send(0, m.LogLines(b"", "", 0, "", is_error=True, lines=shown))

    def _on_load(self, rank: int, load: m.Load) -> None:
        self.views[rank].on_load(load)
        self.scheduler.on_room(rank)
        self.groups.has_news = True

    def _on_actor_news(self, handle: Callable[[Any], None], message: m.PeerMessage) -> None:
        handle(message)
        self.groups.has_news = True  # what was kept for the actor to come is no longer

    def _on_remove_group(self, group: bytes) -> None:
        self.groups.on_remove(group)
        self.actors.end_group(group)

    # ---------------------------------------------------------------------------------------------------- explanations
    def explain(self, asked: str) -> list[Finding]:
        """Actors and placement groups of this name or id."""
        return self.actors.explain(asked) + self.groups.explain(asked)

    def living_actors(self) -> list[ActorRecord]:
        """All actors that are not dead."""
        return self.actors.living()

    def why(self, template: bytes) -> str:
        """Why nothing of a class is given a place now, in lines for people; empty if it would be."""
        spec = self._template(template)
        if not spec.group:
            return policies.why_not(spec, [view.as_if_placed() for view in self.views.values()])
        group = self.groups.groups.get(spec.group)
        if group is None:
            return f"its placement group {spec.group.hex()} was removed"
        if reason := self.groups.why_waiting(group):
            return f"its placement group {self.groups.name_of(group)} has no place:\n{reason}"
        return f"its placement group {self.groups.name_of(group)} is in use: something in the group has to end first"

    def _on_ask(self, rank: int, message: m.Ask) -> None:
        try:
            answer = self._answers[message.topic](_from_msgpack(message.arguments))
        except _Refusal as refusal:
            told = m.Told(message.client, message.number, ok=False, payload=refusal.payload)
        else:
            told = m.Told(message.client, message.number, ok=True, payload=_to_msgpack(answer))
        self._out.send(rank, told)

    def _on_end_job(self, rank: int, message: m.EndJob) -> None:
        def is_of_job(template: bytes) -> bool:
            return self._template(template).job == message.job

        self.scheduler.drop_home(is_of_job)
        self.actors.end_job(is_of_job)
        for group in self.groups.end_job(message.job):
            self.actors.end_group(group)
        for node in self.nodes:
            self._out.send(node.rank, m.JobEnded(message.job))

    # --------------------------------------------------------------------------------------------------------- answers
    def _describe(self, node: NodeInfo) -> dict[str, Any]:
        identifier = node_id(self._nonce, node.rank)
        return {
            "NodeID": identifier,
            "Alive": True,
            "alive": True,
            "NodeManagerAddress": node.host,
            "NodeManagerHostname": node.host,
            "NodeManagerPort": 0,
            "ObjectManagerPort": 0,
            "ObjectStoreSocketName": "",
            "RayletSocketName": "",
            "NodeName": node.host,
            "DeathReason": 0,
            "DeathReasonMessage": "",
            "Rank": node.rank,
            "Pid": node.pid,
            "Resources": as_floats(node.resources),
            "Labels": node.labels,
        }

    def _sum(self, shapes: list[Shape]) -> dict[str, float]:
        total: Shape = {}
        for shape in shapes:
            for name, amount in shape.items():
                total[name] = total.get(name, 0) + amount
        return as_floats(total)

    def _available(self) -> dict[str, float]:
        views = self.views.values()
        free = self._sum([{n: max(0, a) for n, a in view.available.items()} for view in views])
        return {name: amount for name, amount in free.items() if amount > 0}

    def _claim_name(self, arguments: Any) -> None:
        namespace, name, actor, handle = arguments
        error = self.actors.claim(namespace, name, actor, handle)
        if error is not None:
            raise _Refusal(error)

    def _claim_group_name(self, arguments: Any) -> None:
        namespace, name, group = arguments
        if (error := self.groups.claim(namespace, name, group)) is not None:
            raise _Refusal(error)

    def _get_group(self, arguments: Any) -> dict[str, Any] | None:
        """One placement group, by its id, or by namespace and name; None if there is none."""
        group, namespace, name = arguments
        found = self.groups.get(group) if group else self.groups.find(namespace, name)
        return None if found is None else self._describe_group(found)

    def _describe_group(self, group: Group) -> dict[str, Any]:
        return self.groups.describe(group, lambda rank: node_id(self._nonce, rank))

    def _get_actor(self, arguments: Any) -> bytes:
        namespace, name = arguments
        handle = self.actors.find(namespace, name)
        if handle is None:
            text = (
                f"there is no actor named {name!r} in namespace {namespace!r}: it was never created, has died, or lives "
                "in another namespace (get_actor(name, namespace=…))"
            )
            raise _Refusal(payload.system_error("ValueError", text))
        return handle


class _Refusal(Exception):
    def __init__(self, error: bytes) -> None:
        super().__init__(error)
        self.payload = error
