"""A simulated job of many nodes: the real cores of GCS and raylets, workers that only take time, and a clock that jumps.

What it is for: how scheduling behaves at sizes that no test machine has. A rank is as slow here as its cores are: the time
that Python took for a turn passes in the simulation too, so that a GCS which cannot follow shows as a longer makespan.
Costs of the shells (sockets, MPI, the codec) are not in it.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from time import perf_counter
from typing import Any

from hpcray import payload
from hpcray.gcs.actors import ActorRecord
from hpcray.gcs.core import GcsCore
from hpcray.ids import task_id
from hpcray.observe.findings import Finding
from hpcray.protocol import messages as m
from hpcray.raylet.clients import Client
from hpcray.raylet.core import NodeInfo, RayletCore
from hpcray.raylet.lanes import Key
from hpcray.resources import UNIT

NONCE = b"a nonce!"
LATENCY = 20e-6
"""Seconds that a frame is on its way."""
START_SECONDS = 0.01
"""How long a worker takes to start."""
NONE_RESULT: list[m.Result] = [m.InlineResult(payload.NONE, [])]


class _Worker:
    """A worker process: what it is sent takes its time, one thing after the other."""

    __slots__ = ("client", "free_at")

    def __init__(self, client: Client, free_at: float) -> None:
        self.client = client
        self.free_at = free_at


class _Rank:
    """One rank's cores, and the shell around them."""

    def __init__(self, simulation: Simulation, rank: int) -> None:
        self.rank = rank
        self.inbox: list[Callable[[], None]] = []
        self.busy_until = 0.0
        self.seconds = 0.0
        """What its cores took of a CPU."""
        self._turn_at: float | None = None
        self._outboxes: dict[int, list[m.PeerMessage]] = {}
        self._workers: dict[int, _Worker] = {}
        self._simulation = simulation
        self.core = RayletCore(
            rank, simulation.nodes, NONCE, arena_start=4096, inline_limit=100_000, store_timeout=1e9, out=self
        )
        if rank == 0:
            self.core.gcs = simulation.gcs = _TimedGcs(
                GcsCore(simulation.nodes, NONCE, self.core.template, _GcsOut(self))
            )

    def post(self, action: Callable[[], None]) -> None:
        """Something arrived: it is handled in the next turn."""
        self.inbox.append(action)
        self.wake(self._simulation.now)

    def wake(self, at: float) -> None:
        """Have a turn as soon as the rank is free, not before `at`."""
        at = max(at, self.busy_until)
        if self._turn_at is None or at < self._turn_at:
            self._turn_at = at
            self._simulation.at(at, lambda: self._turn(at))

    def _turn(self, at: float) -> None:
        if self._turn_at != at:
            return  # an earlier one was made instead
        self._turn_at = None
        start = perf_counter()
        inbox, self.inbox = self.inbox, []
        for action in inbox:
            action()
        self.core.end_turn(at)
        took = perf_counter() - start
        self.seconds += took
        self.busy_until = at + took
        for rank, messages in self._outboxes.items():
            self._simulation.deliver(self.rank, rank, messages, self.busy_until + LATENCY)
        self._outboxes = {}
        if (due := self.core.next_due) is not None:
            self.wake(due)

    def on_frame(self, source: int, messages: Iterable[m.PeerMessage]) -> None:
        for message in messages:
            if not self.core.on_peer_message(source, message):
                self._simulation.gcs.on_message(source, message)

    # --------------------------------------------------------------------------------------------------------- RayletOut
    def send(self, rank: int, message: m.PeerMessage) -> None:
        self._simulation.sent[type(message).__name__] += 1
        self._outboxes.setdefault(rank, []).append(message)

    def start_worker(self, client: Client) -> None:
        self._workers[client.number] = _Worker(client, self._simulation.now + START_SECONDS)

    def to_client(self, client: Client, message: m.RayletToClient) -> None:
        simulation = self._simulation
        if isinstance(message, m.Run):
            worker = self._workers[client.number]
            seconds = simulation.seconds_of(message.task)
            worker.free_at = max(worker.free_at, simulation.now) + seconds
            done = m.TaskDone(message.task, NONE_RESULT, False, False, seconds)
            simulation.at(worker.free_at, lambda: self.post(lambda: self.core.on_client_message(client, done)))
        elif isinstance(message, m.InlineObject) and client.is_driver:
            simulation.on_result()
        elif isinstance(message, m.Exit):
            del self._workers[client.number]

    def add_tokens(self, worker: Client, count: int) -> None: ...

    def take_tokens(self, worker: Client) -> int:
        return 0  # as if the worker had started all that it was sent

    def show(self, lines: m.LogLines) -> None: ...

    def kill_client(self, client: Client) -> None: ...

    def send_arena(self, client: Client, rank: int) -> None: ...

    def join(self, worker: Client, key: Key, *, is_leased: bool) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"simulated tasks have small arguments and results: nothing calls {name}")


class _GcsOut:
    def __init__(self, rank: _Rank) -> None:
        self._rank = rank

    def send(self, rank: int, message: m.PeerMessage) -> None:
        if rank == 0:
            self._rank.core.deliver_here(message)
        else:
            self._rank.send(rank, message)


class _TimedGcs:
    """The GCS, and what it takes of a CPU."""

    def __init__(self, core: GcsCore) -> None:
        self.core = core
        self.seconds = 0.0
        self.granted = 0

    @property
    def is_waiting_for_room(self) -> bool:
        return self.core.is_waiting_for_room

    @property
    def next_due(self) -> float | None:
        return self.core.next_due

    def explain(self, asked: str) -> list[Finding]:
        return self.core.explain(asked)

    def living_actors(self) -> list[ActorRecord]:
        return self.core.living_actors()

    def on_message(self, rank: int, message: m.PeerMessage) -> None:
        start = perf_counter()
        self.core.on_message(rank, message)
        self.seconds += perf_counter() - start

    def end_turn(self, now: float) -> None:
        start = perf_counter()
        self.core.end_turn(now)
        self.seconds += perf_counter() - start


class Simulation:
    """A job of many nodes and one driver.

    Args:
        nodes: How many ranks offer CPUs; the driver's, rank 0, comes on top and offers none.
        cpus: How many each offers.
        seconds_of: How long a task takes, by its number from 0 on.
    """

    def __init__(self, nodes: int, cpus: int, seconds_of: Callable[[int], float]) -> None:
        self.now = 0.0
        self.nodes = [
            NodeInfo(rank, f"host{rank}", f"machine{rank}", rank, {"CPU": cpus * UNIT} if rank else {}, 1 << 20)
            for rank in range(nodes + 1)
        ]
        self.gcs: _TimedGcs
        self.sent: Counter[str] = Counter()
        """Messages between ranks, by kind."""
        self.results = 0
        self._seconds_of = seconds_of
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self.ranks = [_Rank(self, rank) for rank in range(nodes + 1)]
        head = self.ranks[0].core
        self.driver = head.add_client(is_driver=True)
        self.driver.job = b"job"
        head.define(m.Define(b"job", b""))
        head.define(m.Define(b"function", b""))
        head.welcome(self.driver, b"job")
        self._submitted = 0

    def define(self, name: bytes, **fields: Any) -> None:
        """A class of tasks; without more words, of 1 CPU."""
        values: dict[str, Any] = {"num_returns": 1, "resources": {"CPU": UNIT}, "max_retries": 0, **fields}
        template = m.Template(job=b"job", function=b"function", name=name.decode(), **values)
        self.ranks[0].core.define(m.DefineTemplate(name, template))

    def submit(self, names: Iterable[bytes]) -> None:
        """The driver submits tasks of these classes at once, in one frame."""
        head = self.ranks[0].core
        for name in names:
            task = task_id(self.driver.prefix, self._submitted)
            self._submitted += 1
            head.on_client_message(self.driver, m.Submit(task, name, b"", [], []))
        self.ranks[0].wake(self.now)

    def seconds_of(self, task: bytes) -> float:
        return self._seconds_of(int.from_bytes(task[-10:], "big"))

    def on_result(self) -> None:
        self.results += 1

    def at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), action))

    def deliver(self, source: int, target: int, messages: list[m.PeerMessage], when: float) -> None:
        rank = self.ranks[target]
        self.at(when, lambda: rank.post(lambda: rank.on_frame(source, messages)))

    def run(self) -> float:
        """Until all tasks have their results, and nothing is under way; seconds of the job's time.

        Raises:
            RuntimeError: Nothing happens any more, and tasks wait.
        """
        makespan = 0.0
        while self._events:
            self.now, _, action = heapq.heappop(self._events)
            before = self.results
            action()
            if self.results > before:
                makespan = self.now
        if self.results < self._submitted:
            raise RuntimeError(f"{self._submitted - self.results} of {self._submitted} tasks wait for ever")
        return makespan
