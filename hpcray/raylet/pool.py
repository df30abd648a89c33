"""The executing side of a raylet: which worker runs what, and when.

A *lease* ties a worker to one scheduling class (template) and holds that class's resources once, however many tasks flow
through it. Short tasks are pipelined: how many a worker is given at a time follows from how long they take. A worker that
blocks hands back what it has not started and gives its CPUs to others.

Rules:
  1. Every piece of work is in exactly one place: waiting for arguments, ready, or with one worker.
  2. Each lease has a holding of the ledger, paused while its worker is blocked.
  3. A lease is refilled before a new one is opened only when no resources are free.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Protocol

from hpcray import payload
from hpcray.exceptions import InternalError
from hpcray.protocol import messages as m
from hpcray.raylet.clients import Work, Worker
from hpcray.raylet.dependencies import Dependencies
from hpcray.raylet.ledger import Holding, Ledger
from hpcray.resources import UNIT, Units
from hpcray.store.entry import HERE, INLINE, MAPPED, Entry
from hpcray.store.table import ObjectTable

QUEUED_SECONDS = 0.002
"""How much work, by measured duration, may lie at a worker behind what it runs."""
MAX_DEPTH = 64
LEASE_SECONDS = 0.01
"""After so long a lease is not refilled while another class waits for resources."""
MOST_CALLS = 1 << 30
"""Calls that actors may have at a time: they run in turn, whatever else does."""
FREE_WORKERS = 64
"""Workers that a class which asks for no resources may have at a time, blocked ones aside: nothing else bounds them."""


class PoolOut(Protocol):
    """The only way out of the pool."""

    def spawn_worker(self) -> Worker: ...
    def assign(self, worker: Worker, units: Units) -> None: ...
    def retire_worker(self, worker: Worker) -> None: ...
    def run(self, worker: Worker, work: Work, values: list[m.Value]) -> None: ...
    def stored_value(self, worker: Worker, entry: Entry) -> m.StoredValue: ...
    def template(self, identifier: bytes) -> m.Template: ...
    def could_not_run(self, work: Work, error: bytes) -> None: ...
    def lost_its_bundle(self, work: Work) -> None: ...


class Pool:
    """The workers of one raylet and the work that is to run on them: a pure core."""

    def __init__(self, ledger: Ledger, table: ObjectTable, out: PoolOut) -> None:
        self.ledger = ledger
        self._table = table
        self._out = out
        self.ready: dict[bytes, deque[Work]] = {}
        self.leases: dict[bytes, list[Worker]] = {}
        self.idle: list[Worker] = []
        self.left_waiting: set[bytes] = set()
        """Classes for which there was no room at all and that might have some if leases of others ended."""
        self._drained: list[Worker] = []
        self._seconds: dict[bytes, float] = {}
        self.arguments = Dependencies(table, self._runs_anything)
        self.keep_idle = max(1, ledger.total.get("CPU", 0) // UNIT)

    # ------------------------------------------------------------------------------------------------------------ work
    def accept(self, work: Work) -> None:
        """Take over a piece of work: have its arguments brought, then queue it."""
        if self.has_no_bundle(work.template):
            self._out.lost_its_bundle(work)
            return
        if work.dependencies and not self.arguments.add(work, partial(self._push_first, work)):
            return
        self.push(work)

    def push(self, work: Work) -> None:
        """Queue work whose arguments are here."""
        queue = self.ready.get(work.template)
        if queue is None:
            queue = self.ready[work.template] = deque()
        queue.append(work)

    def _push_first(self, work: Work) -> None:
        self.ready.setdefault(work.template, deque()).appendleft(work)

    def has_no_bundle(self, template: bytes) -> bool:
        """Whether a class belongs into bundles that are not here, or no more: they were here when it was sent."""
        spec = self._out.template(template) if template else None
        return spec is not None and bool(spec.group) and not self.ledger.could_fit(spec)

    def _requeue(self, work: Work) -> None:
        """Put work that a worker had and did not start before all other of its class."""
        if self.has_no_bundle(work.template):
            self.release_arguments(work)
            self._out.lost_its_bundle(work)
        else:
            self._push_first(work)

    def _next_ready(self, queue: deque[Work]) -> Work | None:
        """Take the first of a queue whose arguments are (still) here; those whose are not wait for them."""
        while queue:
            work = queue.popleft()
            if not work.dependencies or self.arguments.take(work, partial(self._push_first, work)):
                return work
        return None

    def depth(self, template: bytes) -> int:
        """How many tasks of this class a worker may have: the one that runs and those behind it."""
        seconds = self._seconds.get(template)
        if seconds is None or seconds >= QUEUED_SECONDS:
            return 1
        return min(MAX_DEPTH, int(QUEUED_SECONDS / max(seconds, 1e-6)))

    def room(self, template: bytes) -> int:
        """How many more tasks of this class would find a place here now, those counted that wait for arguments."""
        return max(0, self._places(template) - self.arguments.count_missing(template))

    def _places(self, template: bytes) -> int:
        """How many more could be handed over now than are ready, pipelining included."""
        if not template:
            return MOST_CALLS
        if self.ledger.is_overdrawn(self._out.template(template)):
            return 0
        depth = self.depth(template)
        room = 0
        for worker in self.leases.get(template, ()):
            if not worker.is_blocked and not worker.is_lent:
                room += depth - len(worker.tasks)
        room += self._slots(template) * depth
        queue = self.ready.get(template)
        return room - (len(queue) if queue else 0)

    def _slots(self, template: bytes) -> int:
        spec = self._out.template(template)
        slots = self.ledger.slots(spec)
        if spec.resources or spec.actor is not None or not slots:
            return slots
        return max(0, FREE_WORKERS - sum(not worker.is_blocked for worker in self.leases.get(template, ())))

    def dispatch(self, now: float) -> None:
        """Give ready work to workers, as far as resources and depth allow, then bring what others lack. Once per loop turn."""
        self._dispatch(now)
        while self.arguments.is_waiting:
            count = len(self.ready)
            self.arguments.activate(self._places)
            if len(self.ready) == count:
                return
            self._dispatch(now)  # what they lacked is on this node already, or cannot be had at all

    @property
    def has_work(self) -> bool:
        """Whether `dispatch` has something to do."""
        return bool(self.ready) or self.arguments.is_waiting

    def _dispatch(self, now: float) -> None:
        starving: set[bytes] = set()
        for template, queue in list(self.ready.items()):
            count = len(queue)
            if not self._dispatch_class(template, now, others_starve=bool(starving)):
                starving.add(template)
                if len(queue) < count:
                    # It was given something: next time, those that were not are looked at first.
                    self.ready[template] = self.ready.pop(template)

    def _dispatch_class(self, template: bytes, now: float, *, others_starve: bool) -> bool:
        queue = self.ready[template]
        spec = self._out.template(template)
        depth = self.depth(template)
        leases = self.leases.get(template, ())
        others_wait = len(self.ready) > 1 or bool(self.left_waiting - {template})
        is_overdrawn = self.ledger.is_overdrawn(spec)
        while queue:
            if self._slots(template):
                if (work := self._next_ready(queue)) is not None:
                    self._give(self._open_lease(template, spec, now), work)
                continue
            worker_with_room = None
            for worker in leases:
                if is_overdrawn or worker.is_blocked or len(worker.tasks) >= depth or worker.actor is not None:
                    continue
                if worker.is_lent:
                    continue
                if (others_starve or others_wait) and now - worker.lease_since > LEASE_SECONDS:
                    continue
                worker_with_room = worker
                break
            if worker_with_room is None:
                return False
            for _ in range(max(1, (depth - len(worker_with_room.tasks)) // 2)):
                if (work := self._next_ready(queue)) is None:
                    break
                self._give(worker_with_room, work)
        if not self.ready[template]:
            del self.ready[template]
        return True

    def _open_lease(self, template: bytes, spec: m.Template, now: float) -> Worker:
        worker = self._idle_worker(spec.job)
        worker.holding = self.ledger.acquire(spec)
        worker.template = template
        worker.lease_since = now
        self.leases.setdefault(template, []).append(worker)
        if self.ledger.free_units:
            self._out.assign(worker, worker.holding.units)
        return worker

    def _idle_worker(self, job: bytes) -> Worker:
        for index in range(len(self.idle) - 1, -1, -1):
            if self.idle[index].job in (b"", job):
                worker = self.idle.pop(index)
                break
        else:
            worker = self._out.spawn_worker()
        worker.job = job
        return worker

    def has_slot(self, template: bytes) -> bool:
        """Whether a lease of this class could be opened now, with nothing else waiting."""
        return not self.ready and self._slots(template) > 0

    def lend(self, template: bytes, now: float) -> Worker | None:
        """A worker with a lease of this class for a driver that sends it tasks itself, until `take_back`."""
        if not self.has_slot(template):
            return None
        worker = self._open_lease(template, self._out.template(template), now)
        worker.is_lent = True
        return worker

    def take_back(self, worker: Worker) -> None:
        """The driver has done with the worker."""
        worker.is_lent = False
        self._drained.append(worker)

    def _give(self, worker: Worker, work: Work) -> None:
        values = self.values_for(worker, work)
        if isinstance(values, bytes):
            self.release_arguments(work)
            self._out.could_not_run(work, values)
            self._drained.append(worker)
            return
        worker.tasks[work.task] = work
        if work.actor:
            worker.actor = work.actor
        self._out.run(worker, work, values)
        self.arguments.hand_over(work)

    def values_for(self, worker: Worker, work: Work) -> list[m.Value] | bytes:
        """The arguments as the worker gets them, memory pinned for it; or the error of one that could not be had."""
        if work.error is not None:
            return work.error
        for dependency in work.dependencies:
            if isinstance(dependency, m.RemoteDependency):
                entry = self._table.entries[dependency.id]
                if entry.state == INLINE and payload.is_error(entry.data):
                    return entry.data
        values: list[m.Value] = []
        for dependency in work.dependencies:
            if isinstance(dependency, m.InlineDependency):
                values.append(m.InlineValue(dependency.data))
                continue
            entry = self._table.entries[dependency.id]
            if entry.state == INLINE:
                values.append(m.InlineValue(entry.data))
            elif entry.state in (HERE, MAPPED):
                values.append(self._out.stored_value(worker, entry))
            else:
                raise InternalError(f"argument {dependency.id.hex()} of {work.task.hex()} left before the task ran")
        return values

    # ---------------------------------------------------------------------------------------------------------- events
    def on_done(self, worker: Worker, task: bytes, seconds: float) -> Work | None:
        """The worker finished a task (None: one that it no longer has)."""
        work = worker.tasks.pop(task, None)
        if work is None:
            return None
        if work.dependencies:
            self.release_arguments(work)
        template = work.template
        known = self._seconds.get(template)
        # Rise at once, fall slowly: a class that was slow just now is not queued deeply.
        self._seconds[template] = seconds if known is None or seconds > known else known + (seconds - known) * 0.2
        if not worker.tasks:
            self._drained.append(worker)
        return work

    def end_idle_leases(self) -> bool:
        """After `dispatch`: leases without work give their resources back. True if there were any."""
        if not self._drained:
            return False
        for worker in self._drained:
            self._end_lease_if_done(worker)
        self._drained.clear()
        return True

    def _end_lease_if_done(self, worker: Worker) -> None:
        if worker.tasks or worker.template is None or worker.actor is not None or worker.is_lent:
            return
        # A program that has used a GPU keeps memory on it.
        has_units = bool(worker.holding and worker.holding.units)
        self._close_lease(worker)
        if len(self.idle) < self.keep_idle and not has_units:
            self.idle.append(worker)
        else:
            self._out.retire_worker(worker)

    def _close_lease(self, worker: Worker) -> None:
        assert worker.template is not None
        assert worker.holding is not None
        self.ledger.release(worker.holding)
        worker.holding = None
        leases = self.leases[worker.template]
        leases.remove(worker)
        if not leases:
            del self.leases[worker.template]
        worker.template = None
        worker.is_blocked = worker.is_lent = False

    def release_arguments(self, work: Work) -> None:
        """The work will not run here, or has run: its arguments may go."""
        self.arguments.release(work)

    def withdraw(self, template: bytes, is_meant: Callable[[Work], bool]) -> list[Work]:
        """Forget work of a class that no worker has yet, and that is meant."""
        ready = self.ready.pop(template, ())
        kept = deque(work for work in ready if not is_meant(work))
        if kept:
            self.ready[template] = kept
        withdrawn = [work for work in ready if is_meant(work)]
        withdrawn += self.arguments.missing(lambda work: work.template == template and is_meant(work))
        for work in withdrawn:
            self.release_arguments(work)
        return withdrawn

    @property
    def classes_without_worker(self) -> set[bytes]:
        """The classes of work that no worker has yet."""
        return {*self.ready, *(work.template for work in self.arguments.missing(lambda _: True))}

    def _runs_anything(self) -> bool:
        workers = [worker for leases in self.leases.values() for worker in leases]
        return any(worker.tasks and not worker.is_blocked for worker in workers)

    def on_handed_back(self, worker: Worker, tasks: Iterable[bytes]) -> None:
        """A worker that blocks returned tasks which it had not started: they go first."""
        for task in reversed(list(tasks)):
            if (work := worker.tasks.pop(task, None)) is not None:
                self._requeue(work)

    def on_blocked(self, worker: Worker) -> None:
        """The worker waits for objects: its CPUs are free meanwhile."""
        if worker.holding is None or worker.is_blocked:
            return
        worker.is_blocked = True
        self.ledger.pause(worker.holding)

    def on_unblocked(self, worker: Worker) -> None:
        """The worker goes on, whether or not its CPUs are free."""
        if worker.holding is None or not worker.is_blocked:
            return
        worker.is_blocked = False
        self.ledger.resume(worker.holding)

    def on_gone(self, worker: Worker) -> list[Work]:
        """The worker's process ended: what was running there (to be failed or retried by its home)."""
        if worker in self.idle:
            self.idle.remove(worker)
        lost: list[Work] = []
        works = list(worker.tasks.values())
        worker.tasks.clear()
        is_actor = worker.actor is not None
        if worker.template is not None:
            worker.actor = None
            self._close_lease(worker)
        for index, work in enumerate(works):
            if index == 0 or is_actor:
                self.release_arguments(work)
                lost.append(work)
            else:
                # Never started: it costs no attempt.
                self._requeue(work)
        return lost

    def prestart(self, count: int) -> None:
        """Start workers ahead of demand."""
        for _ in range(count):
            self.idle.append(self._out.spawn_worker())

    def drop_job(self, is_of_job: Callable[[bytes], bool]) -> None:
        """Forget what waits for workers and belongs to an ended job."""
        for template in self.classes_without_worker:
            if template and is_of_job(template) and self._out.template(template).actor is None:
                self.withdraw(template, lambda _: True)

    def check(self) -> None:
        """Raise InternalError if leases, workers and ledger disagree. Slow: tests and HPCRAY_CHECK=1."""
        self.arguments.check()
        holdings: list[Holding] = []
        for template, workers in self.leases.items():
            for worker in workers:
                if worker.template != template or worker in self.idle or worker.holding is None:
                    raise InternalError(f"worker {worker.client.number} is leased to a class and does not know it")
                if worker.holding.is_paused != worker.is_blocked:
                    raise InternalError(
                        f"worker {worker.client.number} is blocked, and its CPUs are not, or the reverse"
                    )
                holdings.append(worker.holding)
        self.ledger.check(holdings)
        if any(worker.tasks or worker.template is not None for worker in self.idle):
            raise InternalError("an idle worker has something to do")
