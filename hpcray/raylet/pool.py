"""The executing side of a raylet: which worker runs what, and when.

A *lease* ties a worker to one scheduling class (template) and holds that class's resources once, however many tasks flow
through it. Short tasks are pipelined: how many a worker is given at a time follows from how long they take. A worker that
blocks hands back what it has not started and gives its CPUs to others; one whose task turns out to be long is in no position
to do so, and what waits behind it is taken back.

Rules:
  1. Every piece of work is in exactly one place: waiting for arguments, ready, or with one worker.
  2. Each lease has a holding of the ledger, paused while its worker is blocked.
  3. A lease is refilled before a new one is opened only when no resources are free.
  4. A task that is sent to a worker behind another is worth a token. The worker takes one before it starts such a task, the
     raylet takes all that are left when it wants its tasks back: whoever has the token has the task, so none runs twice.
     Since both know the order, n tokens are the last n tasks. Tokens do not say which task they are for: until the worker
     has answered `Recalled`, it is sent nothing behind another task.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Protocol

from hpcray import payload
from hpcray.exceptions import InternalError
from hpcray.protocol import messages as m
from hpcray.raylet.binding import Binding
from hpcray.raylet.clients import Work, Worker
from hpcray.raylet.dependencies import Dependencies
from hpcray.raylet.ledger import Holding, Ledger
from hpcray.raylet.queues import ClassQueue
from hpcray.resources import IN_UNITS, UNIT, Units
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
LOOK_SECONDS = 0.02
"""How often workers that have several tasks are looked at: one that runs the same as the last time gives up the others."""
RETURN_SECONDS = 0.05
"""A class that has had too few workers for so long gives its work back to the homes, which may find other ranks for it."""


class PoolOut(Protocol):
    """The only way out of the pool."""

    def spawn_worker(self) -> Worker: ...
    def assign(self, worker: Worker, units: Units) -> None: ...
    def bind(self, worker: Worker, cpus: list[int]) -> None: ...
    def retire_worker(self, worker: Worker) -> None: ...
    def run(self, worker: Worker, work: Work, values: list[m.Value], *, is_behind: bool = False) -> None: ...
    def add_tokens(self, worker: Worker, count: int) -> None: ...
    def take_tokens(self, worker: Worker) -> int: ...
    def recalled(self, worker: Worker, works: list[Work]) -> None: ...
    def stored_value(self, worker: Worker, entry: Entry) -> m.StoredValue: ...
    def template(self, identifier: bytes) -> m.Template: ...
    def could_not_run(self, work: Work, error: bytes) -> None: ...
    def lost_its_bundle(self, work: Work) -> None: ...


class Pool:
    """The workers of one raylet and the work that is to run on them: a pure core."""

    def __init__(self, ledger: Ledger, table: ObjectTable, out: PoolOut, binding: Binding | None = None) -> None:
        self.ledger = ledger
        self._table = table
        self._out = out
        self._binding = binding
        self.now = 0.0
        self.ready: dict[bytes, ClassQueue[Work]] = {}
        self.leases: dict[bytes, list[Worker]] = {}
        self.idle: list[Worker] = []
        self.left_waiting: dict[bytes, bool] = {}
        """Classes that have no room and might have some if leases of others ended. True: workers wait for it."""
        self.look_due: float | None = None
        """When to `look_behind` long tasks: only set while a worker has several."""
        self.return_due: float | None = None
        """When to `take_overdue`: only set while work waits that could go elsewhere."""
        self._drained: list[Worker] = []
        self._seconds: dict[bytes, float] = {}
        self._served: dict[bytes, int] = {}
        """Per class and per job, when it was last given a worker: a serial number."""
        self._leases_opened = 0
        self._blocked = 0
        """Workers that wait for objects."""
        self._short_since: dict[bytes, float] = {}
        """Classes of which each turn since then has left something without a worker."""
        self._tokens: dict[Worker, int] = {}
        """Of this turn: to be added before the tasks are sent."""
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
        self._queue(work.template).push(work.task, work)

    def _push_first(self, work: Work) -> None:
        self._queue(work.template).push_first(work.task, work)

    def _queue(self, template: bytes) -> ClassQueue[Work]:
        queue = self.ready.get(template)
        if queue is None:
            queue = self.ready[template] = ClassQueue()
        return queue

    def hasten(self, task: bytes) -> None:
        """A worker waits for a task of another home: it goes first, should it be ready and waiting."""
        for queue in self.ready.values():
            if queue.hasten(task):
                return

    def hasten_own(self, work: Work) -> None:
        """A worker waits for this: it goes first, now or when it comes back from where it is."""
        work.is_awaited = True
        if (queue := self.ready.get(work.template)) is not None:
            queue.hasten(work.task)

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

    def _next_ready(self, queue: ClassQueue[Work]) -> Work | None:
        """Take the first of a queue whose arguments are (still) here; those whose are not wait for them."""
        while queue.awaited or queue.others:
            work = queue.pop()
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

    def room_for_awaited(self, template: bytes) -> int:
        """Likewise if somebody waits for them, so that they go before others that are ready."""
        return max(0, self._places(template, are_awaited=True))

    def _places(self, template: bytes, *, are_awaited: bool = False) -> int:
        """How many more could be handed over now than are ready, pipelining included."""
        if not template:
            return MOST_CALLS
        if self.ledger.is_overdrawn(self._out.template(template)):
            return 0
        depth = self.depth(template)
        room = 0
        for worker in self.leases.get(template, ()):
            if not worker.is_blocked and not worker.is_lent:
                room += max(0, (1 if worker.is_recalling else depth) - len(worker.tasks))
        room += self._slots(template) * depth
        if (queue := self.ready.get(template)) is None:
            return room
        return room - len(queue.awaited if are_awaited else queue)

    def _slots(self, template: bytes) -> int:
        spec = self._out.template(template)
        slots = self.ledger.slots(spec)
        if spec.resources or spec.actor is not None or not slots:
            return slots
        return max(0, FREE_WORKERS - sum(not worker.is_blocked for worker in self.leases.get(template, ())))

    def dispatch(self, now: float) -> None:
        """Give ready work to workers, as far as resources and depth allow, then bring what others lack. Once per loop turn."""
        self.now = now
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
        if len(self.ready) == 1 and self.left_waiting.keys() <= self.ready.keys():
            self._dispatch_class(next(iter(self.ready)), now, math.inf)  # nobody competes with it
            return
        shares = self._shares()
        claims = {template: self._claim(template, shares) for template in {*self.ready, *self.left_waiting}}
        for template in sorted(self.ready, key=claims.__getitem__):
            self._dispatch_class(template, now, self._lease_seconds(template, claims))

    def _shares(self) -> dict[tuple[bytes, str], int]:
        """How many workers that run tasks each job has, by resource, and each class."""
        shares: dict[tuple[bytes, str], int] = {}
        for template, workers in self.leases.items():
            spec = self._out.template(template)
            if spec.actor is None:
                count = shares[template, ""] = sum(not worker.is_blocked for worker in workers)
                for name in spec.resources:
                    shares[spec.job, name] = shares.get((spec.job, name), 0) + count
        return shares

    def _claim(self, template: bytes, shares: dict[tuple[bytes, str], int]) -> tuple[bool, int, int, int, int]:
        """How weak a class's claim to a worker is: nobody waits for it, its job has many, had one lately, the class has."""
        spec, served = self._out.template(template), self._served
        queue = self.ready.get(template)
        is_awaited = self.left_waiting.get(template, False) or (queue is not None and bool(queue.awaited))
        of_job = max((shares.get((spec.job, name), 0) for name in spec.resources), default=0)
        of_class = shares.get((template, ""), 0)
        return not is_awaited, of_job, served.get(spec.job, 0), of_class, served.get(template, 0)

    def _lease_seconds(self, template: bytes, claims: dict[bytes, tuple[bool, int, int, int, int]]) -> float:
        """After how long a lease of this class is not refilled: others that need the same may have a better claim."""
        names = self._out.template(template).resources.keys()
        own, limit = claims[template], math.inf
        for other, claim in claims.items():
            if other == template or names.isdisjoint(self._out.template(other).resources):
                continue
            if claim[0] < own[0]:
                return -math.inf
            if (claim[1], claim[3]) < (own[1], own[3]):
                limit = LEASE_SECONDS
        return limit

    def _dispatch_class(self, template: bytes, now: float, lease_seconds: float) -> None:
        queue = self.ready[template]
        spec = self._out.template(template)
        depth = self.depth(template)
        leases = self.leases.get(template, ())
        is_overdrawn = self.ledger.is_overdrawn(spec)
        while queue:
            if self._slots(template):
                if (work := self._next_ready(queue)) is not None:
                    self._give(self._open_lease(template, spec, now), work)
                continue
            room = 0
            for worker in leases:
                if is_overdrawn or worker.is_blocked or worker.is_lent or worker.actor is not None:
                    continue
                if now - worker.lease_since > lease_seconds:
                    continue
                if (room := (1 if worker.is_recalling else depth) - len(worker.tasks)) > 0:
                    break
            else:
                return
            for _ in range(max(1, room // 2)):
                if (work := self._next_ready(queue)) is None:
                    break
                self._give(worker, work)
        if not self.ready[template]:
            del self.ready[template]

    def _open_lease(self, template: bytes, spec: m.Template, now: float) -> Worker:
        # A process that has looked for GPUs once goes on with what it found then: only a new one can be given some.
        worker = self._idle_worker(spec, is_new=any(name in spec.resources for name in IN_UNITS))
        worker.holding = self.ledger.acquire(spec)
        worker.template = template
        worker.lease_since = now
        self._leases_opened += 1
        self._served[template] = self._served[spec.job] = self._leases_opened
        self.leases.setdefault(template, []).append(worker)
        if self.ledger.free_units:
            self._out.assign(worker, worker.holding.units)
        if self._binding is not None:
            self._out.bind(worker, self._binding.bind(worker.client.number, spec.resources.get("CPU", 0)))
        return worker

    def _idle_worker(self, spec: m.Template, *, is_new: bool) -> Worker:
        fresh = None
        for index in range(len(self.idle) - 1, -1, -1):
            worker = self.idle[index]
            if worker.job == spec.job and worker.environment == spec.environment and not is_new:
                return self.idle.pop(index)
            if not worker.job and fresh is None:
                fresh = index
        worker = self._out.spawn_worker() if fresh is None else self.idle.pop(fresh)
        worker.job, worker.environment = spec.job, spec.environment
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
        is_behind = bool(worker.tasks)
        worker.tasks[work.task] = work
        if work.actor:
            worker.actor = work.actor
        if is_behind:
            self._tokens[worker] = self._tokens.get(worker, 0) + 1
            if self.look_due is None:
                self.look_due = self.now + LOOK_SECONDS
                worker.seen = next(iter(worker.tasks))
        self._out.run(worker, work, values, is_behind=is_behind)
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
        if has_units:
            self._out.retire_worker(worker)
            return
        self.idle.append(worker)
        # Where many are blocked, tasks are nested, and as many will be needed again. A worker serves one job only, so each may
        # keep some, or jobs that take turns would start a process each time; rather those in the environment that was just used.
        of_job = [other for other in self.idle if other.job == worker.job]
        of_job.sort(key=lambda other: other.environment == worker.environment)
        for surplus in of_job[: max(0, len(of_job) - self.keep_idle - self._blocked)]:
            self.idle.remove(surplus)
            self._out.retire_worker(surplus)

    def _close_lease(self, worker: Worker) -> None:
        assert worker.template is not None
        assert worker.holding is not None
        self.ledger.release(worker.holding)
        worker.holding = None
        if self._binding is not None:
            self._binding.release(worker.client.number)
        leases = self.leases[worker.template]
        leases.remove(worker)
        if not leases:
            del self.leases[worker.template]
        worker.template = None
        self._blocked -= worker.is_blocked
        worker.is_blocked = worker.is_lent = False

    def release_arguments(self, work: Work) -> None:
        """The work will not run here, or has run: its arguments may go."""
        self.arguments.release(work)

    def withdraw(self, template: bytes, is_meant: Callable[[Work], bool]) -> list[Work]:
        """Forget work of a class that no worker has yet, and that is meant."""
        ready = self.ready.pop(template, ())
        withdrawn: list[Work] = []
        for work in ready:
            if is_meant(work):
                withdrawn.append(work)
            else:
                self._queue(template).push(work.task, work)
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

    # ---------------------------------------------------------------------------------------------------- taking back
    def add_tokens(self) -> None:
        """At the end of a turn, before what it has to say is sent."""
        for worker, count in self._tokens.items():
            self._out.add_tokens(worker, count)
        self._tokens.clear()

    def look_behind(self, now: float) -> None:
        """Take back what waits behind tasks that have been running since the last look."""
        self.now, self.look_due = now, None
        for worker in [worker for leases in self.leases.values() for worker in leases]:
            if len(worker.tasks) < 2:
                continue
            first = next(iter(worker.tasks))
            if worker.seen == first:
                self._recall(worker)
            else:
                worker.seen = first
                self.look_due = now + LOOK_SECONDS

    def _recall(self, worker: Worker) -> None:
        count = self._out.take_tokens(worker)
        if not count:
            return  # it has started them, or handed them back: its news is on its way
        works = list(worker.tasks.values())[-count:]
        for work in reversed(works):
            del worker.tasks[work.task]
            self._requeue(work)
        if not worker.tasks:
            self._drained.append(worker)
        template = works[0].template
        self._count_as_long(template)
        self._short_since[template] = -math.inf  # it has waited long enough
        worker.is_recalling = True
        self._out.recalled(worker, works)

    def _count_as_long(self, template: bytes) -> None:
        self._seconds[template] = max(self._seconds.get(template, 0.0), LOOK_SECONDS)

    def take_overdue(self, now: float) -> list[Work]:
        """After `dispatch`: take out what has waited for a worker so long that another rank may have one earlier. In order."""
        self.return_due = None
        overdue: list[Work] = []
        for template in [known for known in self._short_since if known not in self.ready]:
            del self._short_since[template]
        for template, queue in list(self.ready.items()):
            if not self._may_go(self._out.template(template)):
                continue
            due = self._short_since.setdefault(template, now) + RETURN_SECONDS
            if due > now:
                self.return_due = due if self.return_due is None else min(due, self.return_due)
                continue
            del self.ready[template], self._short_since[template]
            overdue.extend(queue)
        for work in overdue:
            self.release_arguments(work)
        return overdue

    @property
    def is_short(self) -> bool:
        """Whether `take_overdue` has something to do."""
        return bool(self.ready or self._short_since)

    @staticmethod
    def _may_go(spec: m.Template) -> bool:
        return spec.actor is None and (spec.node is None or spec.node_is_soft) and spec.bundle < 0

    # ------------------------------------------------------------------------------------------------ blocking and deaths
    def on_blocked(self, worker: Worker) -> None:
        """The worker waits for objects: its CPUs are free meanwhile."""
        if worker.holding is None or worker.is_blocked:
            return
        worker.is_blocked = True
        self.ledger.pause(worker.holding)
        if self._binding is not None:
            self._binding.pause(worker.client.number)
        self._blocked += 1
        if worker.template is not None:
            self._count_as_long(worker.template)  # others would have to be handed back, or be started before their turn

    def on_unblocked(self, worker: Worker) -> None:
        """The worker goes on, whether or not its CPUs are free."""
        if worker.holding is None or not worker.is_blocked:
            return
        worker.is_blocked = False
        self.ledger.resume(worker.holding)
        if self._binding is not None:
            self._binding.resume(worker.client.number)
        self._blocked -= 1

    def on_gone(self, worker: Worker) -> list[Work]:
        """The worker's process ended: what was running there (to be failed or retried by its home)."""
        if worker in self.idle:
            self.idle.remove(worker)
        lost: list[Work] = []
        works = list(worker.tasks.values())
        worker.tasks.clear()
        is_actor = worker.actor is not None
        self._tokens.pop(worker, None)
        if worker.template is not None:
            worker.actor = None
            self._close_lease(worker)
        for work in works if is_actor else works[:1]:
            self.release_arguments(work)
            lost.append(work)
        if not is_actor:
            for work in reversed(works[1:]):
                self._requeue(work)  # Never started: it costs no attempt.
        return lost

    def prestart(self, count: int) -> None:
        """Start workers ahead of demand."""
        for _ in range(count):
            self.idle.append(self._out.spawn_worker())

    def drop_job(self, is_of_job: Callable[[bytes], bool]) -> list[Work]:
        """Take out what belongs to an ended job and was not started; its workers are about to be killed."""
        dropped: list[Work] = []
        for template in self.classes_without_worker:
            if template and is_of_job(template) and self._out.template(template).actor is None:
                dropped += self.withdraw(template, lambda _: True)
        for template, workers in self.leases.items():
            if not is_of_job(template):
                continue
            for worker in workers:
                for task in list(worker.tasks)[1:] if worker.actor is None else ():
                    work = worker.tasks.pop(task)
                    self.release_arguments(work)
                    dropped.append(work)
        return dropped

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
        if self._blocked != sum(holding.is_paused for holding in holdings):
            raise InternalError(f"{self._blocked} workers are said to be blocked")
        if any(worker.tasks or worker.template is not None for worker in self.idle):
            raise InternalError("an idle worker has something to do")
