"""Lanes: a driver that waits for each of its calls speaks to the worker itself, past the raylets.

One call at a time costs the wake-ups and cold caches of every process on its way. On a lane these are two: driver and
worker, joined by a socket that their raylets made for them. Which calls take it is the driver's to decide
(`hpcray/lanes.py`); its raylet hears of them only if somebody else has to know.

Rules:
  1. A lane carries one call at a time, and none while another call of that driver to the same target is under way: so
     lanes change nothing in the order of calls.
  2. Only the driver closes a lane (`CloseLane`), and not with a call under way: so no call is ever lost between a
     driver that sends and a worker that has closed. Raylets ask for it (`WantLane`), and the worker does (`LaneIdle`).
  3. When the worker dies, the driver is told, takes what the worker had answered, and closes the lane: calls that it has
     registered and not reported as done by then have crashed, and are retried or fail as any other.
  4. A lane of a class of tasks holds that class's resources, as a lease does; the worker is given nothing else.
"""

from __future__ import annotations

from typing import Protocol

from hpcray.ids import home_of
from hpcray.protocol import messages as m
from hpcray.raylet.actors import HostedActors
from hpcray.raylet.calls import Calls
from hpcray.raylet.clients import Client, Work, Worker
from hpcray.raylet.pool import Pool
from hpcray.raylet.tasks import Tasks

Key = tuple[int, int, int]
"""Home, number of the driver there, number of the lane."""


class LanesOut(Protocol):
    """The only way out of the lanes."""

    rank: int
    now: float
    clients: dict[int, Client]

    def send(self, rank: int, message: m.PeerMessage) -> None: ...
    def share_host(self, rank: int, other: int) -> bool: ...
    def push_definitions(self, rank: int, template: bytes) -> None: ...
    def template(self, identifier: bytes) -> m.Template: ...
    def tell(self, client: Client, message: m.RayletToClient) -> None: ...
    def join(self, worker: Worker, key: Key, template: bytes) -> bool: ...


class _Lane:
    """A lane of a driver of this raylet."""

    __slots__ = ("error", "is_leased", "is_wanted", "rank", "tasks")

    def __init__(self, rank: int, *, is_leased: bool) -> None:
        self.rank = rank
        self.is_leased = is_leased
        self.is_wanted = False
        self.error: bytes | None = None
        self.tasks: dict[bytes, bool] = {}
        """Calls under way on it that the driver has registered; True: of an actor."""


class Lanes:
    """The lanes of one raylet's drivers and those of its workers: a pure core."""

    def __init__(self, pool: Pool, tasks: Tasks, calls: Calls, hosted: HostedActors, out: LanesOut) -> None:
        self._pool = pool
        self._tasks = tasks
        self._calls = calls
        self._hosted = hosted
        self._out = out
        self._lanes: dict[tuple[int, int], _Lane] = {}
        self._workers: dict[Key, Worker] = {}
        self._served: dict[Worker, set[int]] = {}
        """Of each worker that serves or has served lanes, the homes of their drivers."""
        self._wanted: set[Key] = set()
        """Those of our workers whose drivers were asked to close them."""

    # ------------------------------------------------------------------------------------------------------------ home
    def on_open(self, client: Client, message: m.OpenLane) -> None:
        """A driver asks for a lane."""
        out = self._out
        rank = self._calls.rank_of(message.actor) if message.actor else self._rank_for(message.template)
        if rank is None or not out.share_host(rank, out.rank):
            out.tell(client, m.LaneClosed(message.lane, None))
            return
        self._lanes[client.number, message.lane] = _Lane(rank, is_leased=not message.actor)
        if message.template:
            out.push_definitions(rank, message.template)
        start = m.StartLane(client.number, message.lane, message.template, message.actor)
        if rank == out.rank:
            self.on_start(rank, start)
        else:
            out.send(rank, start)

    def _rank_for(self, template: bytes) -> int | None:
        spec = self._out.template(template)
        if self._tasks.may_stay(spec) and self._pool.has_slot(template):
            return self._out.rank
        return None if spec.spread else self._tasks.ran_on.get(template)

    def on_close(self, client: Client, message: m.CloseLane) -> None:
        """The driver has done with the lane."""
        lane = self._lanes.pop((client.number, message.lane), None)
        if lane is None:
            return
        if lane.error is None:
            self._out.send(lane.rank, m.EndLane(client.number, message.lane))
            return
        for task, is_call in lane.tasks.items():
            if is_call:
                self._calls.on_crashed(task, lane.error)
            else:
                self._tasks.on_crashed(task, 0, lane.error)

    def register(self, client: Client, number: int, task: bytes, *, is_call: bool) -> int:
        """The driver tells of a call that is under way on its lane. Returns the rank where it runs."""
        lane = self._lanes[client.number, number]
        lane.tasks[task] = is_call
        return lane.rank

    def on_finished(self, task: bytes, client: int) -> None:
        """A registered call is over."""
        for (number, _), lane in self._lanes.items():
            if number == client and lane.tasks.pop(task, None) is not None:
                return

    def on_lost(self, message: m.LaneLost) -> None:
        """Refused, or the worker died."""
        lane = self._lanes.get((message.client, message.lane))
        if lane is None:
            return
        if message.error is None:
            del self._lanes[message.client, message.lane]
        else:
            lane.error = message.error
        if (client := self._out.clients.get(message.client)) is not None:
            self._out.tell(client, m.LaneClosed(message.lane, message.error))

    def on_wanted(self, client_number: int, number: int) -> None:
        """The lane should be closed when no call is under way."""
        lane = self._lanes.get((client_number, number))
        client = self._out.clients.get(client_number)
        if lane is not None and client is not None and not lane.is_wanted:
            lane.is_wanted = True
            self._out.tell(client, m.LaneWanted(number))

    def want_own(self) -> None:
        """Tasks of this raylet wait for resources, which its drivers' lanes may hold."""
        for (client, number), lane in self._lanes.items():
            if lane.is_leased:
                self.on_wanted(client, number)

    def on_client_gone(self, client: Client) -> None:
        """A driver ended, and its lanes with it."""
        for key in [key for key in self._lanes if key[0] == client.number]:
            self.on_close(client, m.CloseLane(key[1]))

    # --------------------------------------------------------------------------------------------------------- hosting
    def on_start(self, home: int, message: m.StartLane) -> None:
        """A driver of this host wants to speak to one of our workers."""
        key = (home, message.client, message.lane)
        worker: Worker | None
        worker = (
            self._hosted.worker_of(message.actor) if message.actor else self._pool.lend(message.template, self._out.now)
        )
        if worker is not None and self._out.join(worker, key, message.template):
            self._workers[key] = worker
            self._served.setdefault(worker, set()).add(home)
            return
        if worker is not None and message.template:
            self._pool.take_back(worker)
        self._out.send(home, m.LaneLost(message.client, message.lane, None))

    def on_end(self, home: int, message: m.EndLane) -> None:
        """The driver has closed the lane: a leased worker is free again."""
        key = (home, message.client, message.lane)
        self._wanted.discard(key)
        worker = self._workers.pop(key, None)
        if worker is not None and worker.is_lent:
            self._pool.take_back(worker)

    def on_idle(self, key: Key) -> None:
        """The worker has served this lane long enough."""
        if key in self._workers:
            self._want(key)

    def want_back(self) -> None:
        """Others wait for resources that leased workers hold."""
        for key, worker in self._workers.items():
            if worker.is_lent:
                self._want(key)

    def _want(self, key: Key) -> None:
        if key not in self._wanted:
            self._wanted.add(key)
            home, client, lane = key
            self._out.send(home, m.WantLane(client, lane))

    @property
    def exist(self) -> bool:
        """Whether lanes may hold resources that somebody else wants."""
        return bool(self._lanes or self._workers)

    def work_of(self, worker: Worker, task: bytes) -> Work | None:
        """A call that came to this worker on a lane and is to be answered by the raylets."""
        home = home_of(task)
        if home not in self._served.get(worker, ()):
            return None
        is_call = worker.actor is not None
        return Work(
            task, home, 0, worker.template or b"", b"", [], actor=worker.actor or b"", method="?" if is_call else ""
        )

    def on_worker_gone(self, worker: Worker, error: bytes) -> None:
        """A worker died: with this error die the calls on its lanes."""
        self._served.pop(worker, None)
        for key in [key for key, serving in self._workers.items() if serving is worker]:
            del self._workers[key]
            self._wanted.discard(key)
            home, client, lane = key
            self._out.send(home, m.LaneLost(client, lane, error))
