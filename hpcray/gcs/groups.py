"""Placement groups: bundles of resources that are set aside on nodes, all of a group or none.

    PENDING ──placed──► RESERVING ──all raylets agreed──► CREATED ──a node is lost──► RESCHEDULING ─┐
       ▲                    │ one had no room left          ▲                                         │
       └────────────────────┘                               └── the lost bundles reserved elsewhere ──┘
    any ──removed, or its job ended──► REMOVED (forgotten)

Raylets start work without asking, so a place that looked free may be taken when the reservation comes: then all bundles
are given back, and the group waits for the next news of room.

Rules:
  1. Of a group that is being reserved, every raylet that was asked answers once; only then is anything else done with it.
  2. What was asked for and not answered counts as taken on its node.
  3. Everybody who watches a group hears of each change, in order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from hpcray import payload
from hpcray.gcs.policies import bundles_could_fit, bundles_why_not, largest_first, place_bundles
from hpcray.gcs.views import NodeView
from hpcray.observe.findings import Finding
from hpcray.protocol import messages as m
from hpcray.resources import Shape, as_floats

PENDING, CREATED, RESCHEDULING, REMOVED = "pending", "created", "rescheduling", "removed"

REMEMBERED = 100_000
"""Removed groups whose ids are known: who waits for one of them is told, and not left to wait for its creation."""
SHOWN = 1_000
"""Removed groups that are listed."""


class GroupsOut(Protocol):
    """The only way out of the groups."""

    def send(self, rank: int, message: m.PeerMessage) -> None: ...


class Group:
    """One placement group that was not removed."""

    __slots__ = (
        "asked", "fresh", "id", "is_hopeless", "is_looked_at", "is_refused", "is_unwanted", "kind",
        "placed", "serial", "spec", "state", "watchers",
    )  # fmt: skip

    def __init__(self, spec: m.CreatePlacementGroup, serial: int) -> None:
        self.id = spec.group
        self.serial = serial
        """Which one it was to come here."""
        self.spec = spec
        self.kind = (spec.strategy, repr(spec.bundles), repr(spec.labels))
        """Groups of one kind are alike to the policies."""
        self.state = PENDING
        self.placed: dict[int, int] = {}
        """Bundle → rank, where it is or is about to be."""
        self.asked: dict[int, list[int]] = {}
        """Rank → bundles that it was asked to reserve and has not answered for."""
        self.fresh: dict[int, list[int]] = {}
        """Rank → bundles that it has reserved in the reservation under way."""
        self.is_refused = False
        """A raylet had no room: once all have answered, everything asked for is given back."""
        self.is_looked_at = False
        """Whether it was looked whether it could be placed at all."""
        self.is_hopeless = False
        """It could not."""
        self.is_unwanted = False
        """It was removed meanwhile."""
        self.watchers: set[int] = set()

    @property
    def being_reserved(self) -> set[int]:
        """Bundles that may be given back yet, since not all raylets have agreed."""
        return {index for bundles in (*self.asked.values(), *self.fresh.values()) for index in bundles}


class PlacementGroups:
    """All placement groups of all jobs: pure."""

    def __init__(self, nodes: dict[int, NodeView], out: GroupsOut) -> None:
        self._nodes = nodes
        self._out = out
        self.groups: dict[bytes, Group] = {}
        self._serial = 0
        self._names: dict[tuple[str, str], bytes] = {}
        self._waiting: dict[bytes, Group] = {}
        self._early_watchers: dict[bytes, set[int]] = {}
        self._early_removals: set[bytes] = set()
        """Groups that somebody removed who heard of them faster than this did."""
        self._ended_jobs: set[bytes] = set()
        self._removed: dict[bytes, None] = {}
        """Groups that are no more, the latest `REMEMBERED` of them."""
        self._shown: dict[bytes, Group] = {}
        """The latest `SHOWN` of them."""
        self.has_news = False
        """Room or groups came since `place`."""

    # ----------------------------------------------------------------------------------------------------------- events
    def claim(self, namespace: str, name: str, group: bytes) -> bytes | None:
        """Reserve a name; the error's payload if it is taken."""
        if (namespace, name) in self._names:
            text = f"the name {name!r} is taken by another placement group of namespace {namespace!r}"
            return payload.system_error("RaySystemError", text)  # Ray's choice
        self._names[namespace, name] = group
        return None

    def on_create(self, message: m.CreatePlacementGroup) -> None:
        self._serial += 1
        group = Group(message, self._serial)
        group.watchers = self._early_watchers.pop(message.group, set())
        self.groups[message.group] = self._waiting[message.group] = group
        self.has_news = True
        is_late = message.job in self._ended_jobs and not message.is_detached
        if is_late or message.group in self._early_removals:
            self._early_removals.discard(message.group)
            self.on_remove(message.group)

    def on_watch(self, identifier: bytes, rank: int) -> None:
        group = self.groups.get(identifier)
        if group is not None:
            group.watchers.add(rank)
            self._out.send(rank, m.PlacementGroupChanged(identifier, group.state))
        elif self.is_removed(identifier):
            self._out.send(rank, m.PlacementGroupChanged(identifier, REMOVED))
        else:
            # Somebody heard of it by another way, faster than its creation came here.
            self._early_watchers.setdefault(identifier, set()).add(rank)

    def is_removed(self, identifier: bytes) -> bool:
        """Whether there was such a group."""
        group = self.groups.get(identifier)
        return identifier in self._removed if group is None else group.is_unwanted

    def on_remove(self, identifier: bytes) -> None:
        group = self.groups.get(identifier)
        if group is None and identifier not in self._removed:
            self._early_removals.add(identifier)
        if group is None or group.is_unwanted:
            return
        group.is_unwanted = True
        self._waiting.pop(identifier, None)
        key = (group.spec.namespace, group.spec.name)
        if self._names.get(key) == identifier:
            del self._names[key]
        if not group.asked:
            self._forget(group)

    def end_job(self, job: bytes) -> list[bytes]:
        """Remove the groups of a job, those too that come yet, and say which; detached ones stay."""
        self._ended_jobs.add(job)
        ended = [group.id for group in self.groups.values() if group.spec.job == job and not group.spec.is_detached]
        for group in ended:
            self.on_remove(group)
        return ended

    def on_rank_lost(self, rank: int) -> None:
        """Bundles that were there are to be placed anew, on other nodes."""
        for group in list(self.groups.values()):
            lost = [index for index, where in group.placed.items() if where == rank]
            if not lost:
                continue
            for index in lost:
                del group.placed[index]
            group.fresh.pop(rank, None)
            if group.asked:
                # Whatever the others answer, it would not be whole.
                group.is_refused = True
                group.asked.pop(rank, None)
                self._end_reserving(group)
            elif not group.is_unwanted:
                self._wait(group)

    def on_reserved(self, rank: int, message: m.BundlesReserved) -> None:
        group = self.groups.get(message.group)
        if group is None or rank not in group.asked:
            return
        bundles = group.asked.pop(rank)
        del self._nodes[rank].placing[group.id]  # what it has free now comes with this answer
        if message.ok:
            group.fresh[rank] = bundles
        else:
            group.is_refused = True
            for index in bundles:
                del group.placed[index]
        self._end_reserving(group)

    def _end_reserving(self, group: Group) -> None:
        if group.asked:
            return
        if group.is_unwanted:
            self._forget(group)
        elif group.is_refused:
            for rank, bundles in group.fresh.items():
                for index in bundles:
                    del group.placed[index]
                self._out.send(rank, m.ReturnBundles(group.id, bundles))
            group.fresh = {}
            self._wait(group)
        else:
            group.fresh = {}
            self._change(group, CREATED)

    def _wait(self, group: Group) -> None:
        if group.state == CREATED:
            self._change(group, RESCHEDULING)
        self._waiting[group.id] = group
        self.has_news = True

    def _forget(self, group: Group) -> None:
        del self.groups[group.id]
        self._removed[group.id] = None
        self._shown[group.id] = group
        for known, most in ((self._removed, REMEMBERED), (self._shown, SHOWN)):
            if len(known) > most:
                del known[next(iter(known))]
        for rank in set(group.placed.values()):
            self._out.send(rank, m.ReturnBundles(group.id, []))
        self._change(group, REMOVED)

    def _change(self, group: Group, state: str) -> None:
        group.state = state
        for rank in group.watchers:
            self._out.send(rank, m.PlacementGroupChanged(group.id, state))

    # ---------------------------------------------------------------------------------------------------------- placing
    @property
    def is_waiting_for_room(self) -> bool:
        """Whether a group waits for what nodes may have free."""
        return bool(self._waiting)

    def place(self) -> None:
        """Reserve what the news since the last time allow, first come, first served, but nobody holds up others."""
        self.has_news = False
        hopeless: set[tuple[Any, ...]] = set()
        views = {rank: node.as_if_placed() for rank, node in self._nodes.items()}
        # Those that wait anew have their turn where they had it.
        for group in sorted(self._waiting.values(), key=lambda group: group.serial):
            spec = group.spec
            kind = (*group.kind, tuple(group.placed.items()))
            if kind in hopeless:
                continue
            nodes = list(views.values())
            ranks = place_bundles(spec.bundles, spec.strategy, nodes, labels=spec.labels, placed=group.placed)
            if ranks is None:
                hopeless.add(kind)
                self._warn_if_infeasible(group)
                continue
            del self._waiting[group.id]
            self._reserve(group, ranks, views)

    def _warn_if_infeasible(self, group: Group) -> None:
        if group.is_looked_at:
            return
        group.is_looked_at = True
        group.is_hopeless = self.is_infeasible(group)
        if group.is_hopeless:
            name = f" {group.spec.name!r}" if group.spec.name else ""
            text = f"The placement group{name} {group.id.hex()} will wait for ever, as this job can never hold it:"
            lines = [text, *self.why_waiting(group).splitlines()]
            self._out.send(0, m.LogLines(b"", "", 0, "", is_error=True, lines=lines))

    def _reserve(self, group: Group, ranks: list[int], views: dict[int, NodeView]) -> None:
        group.is_refused = False
        wanted: dict[int, dict[int, Shape]] = {}
        for index in largest_first(group.spec.bundles):  # by which the policy was sure that they fit
            if index not in group.placed:
                wanted.setdefault(ranks[index], {})[index] = group.spec.bundles[index]
        for rank, bundles in wanted.items():
            group.asked[rank] = list(bundles)
            for index in bundles:
                group.placed[index] = rank
            self._nodes[rank].placing[group.id] = list(bundles.values())
            if views[rank] is self._nodes[rank]:
                views[rank] = self._nodes[rank].as_if_placed()
            else:
                views[rank].take_off(*bundles.values())
        for rank, bundles in wanted.items():
            self._out.send(rank, m.ReserveBundles(group.id, bundles))

    # ---------------------------------------------------------------------------------------------------------- looking
    def bundles_on(self, template: m.Template) -> dict[int, dict[int, Shape]]:
        """Rank → the bundles there that a class may run in, by their index."""
        group = self.groups.get(template.group)
        if group is None or group.state == PENDING or group.is_unwanted:
            return {}
        bundles: dict[int, dict[int, Shape]] = {}
        being_reserved = group.being_reserved if group.state == RESCHEDULING else ()
        for index, rank in group.placed.items():
            if template.bundle in (-1, index) and index not in being_reserved:
                bundles.setdefault(rank, {})[index] = group.spec.bundles[index]
        return bundles

    @property
    def waiting(self) -> dict[bytes, tuple[str, bytes]]:
        """Of those that wait for room and could have it some time, what to call them."""
        waiting = {i: group for i, group in self._waiting.items() if not group.is_hopeless}
        return {i: (f"placement group {self.name_of(group)}", b"") for i, group in waiting.items()}

    def is_pending(self, identifier: bytes) -> bool:
        """Whether a group waits for room."""
        return identifier in self._waiting

    def known(self) -> list[Group]:
        """All groups, and those that were removed lately."""
        return [*self._shown.values(), *self.groups.values()]

    def get(self, identifier: bytes) -> Group | None:
        """One of `known`."""
        return self.groups.get(identifier) or self._shown.get(identifier)

    def find(self, namespace: str, name: str) -> Group | None:
        """A named group."""
        identifier = self._names.get((namespace, name))
        return self.groups.get(identifier) if identifier is not None else None

    def describe(self, group: Group, node_id: Callable[[int], str]) -> dict[str, Any]:
        """As Ray's `placement_group_table` shows it."""
        state = REMOVED if group.is_unwanted else group.state
        progress = {CREATED: "FINISHED", REMOVED: "REMOVED"}
        return {
            "placement_group_id": group.id.hex(),
            "name": group.spec.name,
            "bundles": {index: as_floats(shape) for index, shape in enumerate(group.spec.bundles)},
            "bundles_to_node_id": {
                index: node_id(group.placed[index]) if index in group.placed else ""
                for index in range(len(group.spec.bundles))
            },
            "strategy": group.spec.strategy,
            "state": state.upper(),
            "stats": {"scheduling_state": progress.get(state, "PENDING")},
        }

    @staticmethod
    def name_of(group: Group) -> str:
        """For people."""
        return group.spec.name or group.id.hex()

    def explain(self, asked: str) -> list[Finding]:
        """Groups of this name or id, and why they wait."""
        findings = []
        for group in self.groups.values():
            if asked and asked in (group.spec.name, group.id.hex()):
                story = f"({group.spec.strategy}) is {group.state}"
                if ranks := sorted(set(group.placed.values())):
                    story += f" on {'ranks' if len(ranks) > 1 else 'rank'} {', '.join(map(str, ranks))}"
                name = f"placement group {group.spec.name}".strip()
                why = self.why_waiting(group)
                findings.append(Finding("placement group", group.id.hex(), name, 0, story, why=why))
        return findings

    def why_waiting(self, group: Group) -> str:
        """Why a group has no place, in words; empty if it has one."""
        if group.id not in self._waiting:
            return "" if not group.asked else "its bundles are being reserved"
        spec, nodes = group.spec, [node.as_if_placed() for node in self._nodes.values()]
        return bundles_why_not(spec.bundles, spec.strategy, nodes, labels=spec.labels)

    def is_infeasible(self, group: Group) -> bool:
        """Whether it could not be placed if nothing else ran."""
        spec, nodes = group.spec, list(self._nodes.values())
        return not bundles_could_fit(spec.bundles, spec.strategy, nodes, labels=spec.labels)
