"""Placement groups as one raylet knows them: bundles that it has set aside, and what its clients wait for.

Rules:
  1. A group is watched at the GCS from the first time that a client of this raylet waits for it or runs something in it.
  2. A group that was removed stays removed: what is submitted to it later fails at once.
  3. Bundles that are returned take nobody in from then on; the workers in them end.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

from hpcray import payload
from hpcray.protocol import messages as m
from hpcray.raylet.clients import Client, Work, Worker
from hpcray.raylet.pool import Pool
from hpcray.raylet.tasks import Tasks
from hpcray.store.table import ObjectTable

REMEMBERED = 10_000
"""Removed groups that are known here; of others the GCS is asked again."""


class GroupsOut(Protocol):
    """The only way out of the groups."""

    clients: dict[int, Client]

    def to_gcs(self, message: m.PeerMessage) -> None: ...
    def report_load(self) -> None: ...
    def template(self, identifier: bytes) -> m.Template: ...
    def kill_worker(self, worker: Worker) -> None: ...
    def lost_its_bundle(self, work: Work) -> None: ...


class Groups:
    """The placement groups of one raylet: a pure core."""

    def __init__(self, pool: Pool, tasks: Tasks, table: ObjectTable, out: GroupsOut) -> None:
        self._pool = pool
        self._tasks = tasks
        self._table = table
        self._out = out
        self.states: dict[bytes, str] = {}
        """Of the groups that are watched; "" until the GCS has answered."""
        self._removed: deque[bytes] = deque()
        self.awaited: dict[bytes, dict[bytes, bytes]] = {}
        """Group → objects that come to exist when it does, and their payloads."""

    # ------------------------------------------------------------------------------------------------------ the users' end
    def watch(self, group: bytes) -> None:
        """Have the GCS tell of the group's changes."""
        if group not in self.states:
            self.states[group] = ""
            self._out.to_gcs(m.WatchPlacementGroup(group))

    def on_await(self, message: m.AwaitPlacementGroup) -> None:
        """An object is to exist when the group does."""
        self._table.references.create(message.id)
        self.awaited.setdefault(message.group, {})[message.id] = message.data
        self.watch(message.group)
        self._settle(message.group)

    def on_remove(self, message: m.RemovePlacementGroup) -> None:
        self.on_changed(message.group, "removed")
        self._out.to_gcs(message)

    def on_changed(self, group: bytes, state: str) -> None:
        """The GCS, or a client of this raylet, tells what has become of a group."""
        if self.is_removed(group):
            return
        self.states[group] = state
        self._settle(group)
        if state == "removed":
            self._tasks.fail_group(group)
            self._removed.append(group)
            if len(self._removed) > REMEMBERED:
                del self.states[self._removed.popleft()]

    def is_removed(self, group: bytes) -> bool:
        """Whether nothing can run in it any more."""
        return self.states.get(group) == "removed"

    def _settle(self, group: bytes) -> None:
        state = self.states[group]
        if state not in ("created", "removed") or group not in self.awaited:
            return
        for identifier, data in self.awaited.pop(group).items():
            error = payload.group_removed(group, "ready()")
            self._table.set_inline(identifier, data if state == "created" else error, [])

    # --------------------------------------------------------------------------------------------------- the bundles' end
    def on_reserve(self, message: m.ReserveBundles) -> None:
        ok = self._pool.ledger.reserve(message.group, message.bundles)
        self._out.to_gcs(m.BundlesReserved(message.group, ok))
        self._out.report_load()

    def on_return(self, message: m.ReturnBundles) -> None:
        accounts = self._pool.ledger.give_up(message.group, message.bundles)
        for client in list(self._out.clients.values()):
            worker = client.worker
            if worker is not None and worker.holding is not None and worker.holding.account in accounts:
                self._out.kill_worker(worker)
        for template in self._pool.classes_without_worker:
            if self._pool.has_no_bundle(template):
                for work in self._pool.withdraw(template, lambda _: True):
                    self._out.lost_its_bundle(work)
