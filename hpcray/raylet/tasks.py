"""The home side of tasks: from `Submit` to the moment its returns exist.

A task waits for its arguments, then in the queue of its scheduling class, then runs somewhere: on this raylet while its
pool has room, else on the rank that the GCS grants. Its home keeps the spec until the reply, so that a crash costs an
attempt and not the task.

Rules:
  1. A task is in exactly one place: waiting for arguments, in a queue, or running with an attempt number. A rank that had
     no worker for it gives it back unstarted: that makes a new attempt, and costs no retry.
  2. A reply with another attempt number than the task's present one is ignored, and what it brought is let go.
  3. References in arguments are held from `Submit` until the returns exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from hpcray import payload
from hpcray.gcs.patience import PATIENCE
from hpcray.ids import object_id, task_of
from hpcray.protocol import messages as m
from hpcray.raylet.clients import Work
from hpcray.raylet.pool import Pool
from hpcray.raylet.queues import HomeQueue
from hpcray.store.entry import HERE, INLINE, SPILLED
from hpcray.store.references import References
from hpcray.store.table import ObjectTable

NOWHERE = -1
NOTHING_ASKED: tuple[int, dict[int, int]] = (0, {})
WORTH_ASKING = 1 << 20
"""Bytes of arguments on another host for which a task waits for a place there, rather than run here at once."""


class TasksOut(Protocol):
    """The only way out of the home side."""

    rank: int
    is_alone: bool
    now: float

    def send(self, rank: int, message: m.PeerMessage) -> None: ...
    def to_gcs(self, message: m.PeerMessage) -> None: ...
    def push_definitions(self, rank: int, template: bytes) -> None: ...
    def template(self, identifier: bytes) -> m.Template: ...
    def share_host(self, rank: int, other: int) -> bool: ...
    def count_arrival(self, template: bytes) -> None: ...
    def suits(self, template: m.Template) -> bool: ...
    def why_never(self, template: m.Template) -> str: ...
    def warn_if_infeasible(self, template: m.Template) -> None: ...
    def has_group(self, group: bytes) -> bool: ...
    def watch_group(self, group: bytes) -> bool: ...


class Task:
    """A task whose home this raylet is."""

    __slots__ = (
        "arguments",
        "attempt",
        "dependencies",
        "id",
        "is_awaited",
        "is_dropped",
        "missing",
        "nested",
        "num_returns",
        "retries",
        "runs_on",
        "template",
        "work",
    )

    def __init__(self, message: m.Submit, template: m.Template) -> None:
        self.id = message.task
        self.template = message.template
        self.arguments = message.arguments
        self.dependencies = message.dependencies
        self.nested = message.nested
        self.num_returns = template.num_returns
        self.retries = template.max_retries
        self.attempt = 0
        self.missing = 0
        self.runs_on = NOWHERE
        self.work: Work | None = None
        """While it is with the pool of this rank."""
        self.is_awaited = False
        """A worker here waits for it."""
        self.is_dropped = False
        """Its job has ended."""


class Tasks:
    """All tasks homed at one raylet: a pure core."""

    def __init__(self, table: ObjectTable, pool: Pool, out: TasksOut) -> None:
        self._table = table
        self._references = table.references
        self._pool = pool
        self._out = out
        self.tasks: dict[bytes, Task] = {}
        self.queues: dict[bytes, HomeQueue[Task]] = {}
        self.ran_on: dict[bytes, int] = {}
        """Per class, the rank that was granted last."""
        self._looked_at: set[bytes] = set()
        """Classes whose demand was compared with what the job has."""
        self._asked: dict[bytes, tuple[int, dict[int, int]]] = {}
        """Per class, how many tasks the GCS believes to be waiting here, and for which ranks."""
        self._waits_since: dict[bytes, float] = {}
        """Per class with a queue, when last one of its tasks was given a place."""
        self._warned: set[bytes] = set()

    # ---------------------------------------------------------------------------------------------------------- submit
    def on_submit(self, message: m.Submit, runs_on: int | None = None) -> None:
        """A client's task; one that its driver sent to a worker itself runs on that rank already, and lacks nothing."""
        template = self._out.template(message.template)
        task = Task(message, template)
        self.tasks[task.id] = task
        for index in range(1, task.num_returns + 1):
            self._references.create(object_id(task.id, index)).maker = task.template
        if runs_on is not None:
            task.runs_on = runs_on
            return
        hold_all(self._references, task.nested)
        if task.dependencies:
            hold_all(self._references, task.dependencies)

            def exists() -> None:
                task.missing -= 1
                if task.missing == 0:
                    self._enqueue(task)

            for dependency in task.dependencies:
                if not self._table.when_exists(dependency, exists):
                    task.missing += 1
            if task.missing:
                return
        self._enqueue(task)

    def _enqueue(self, task: Task, *, first: bool = False) -> None:
        if (error := dependency_error(self._table, task.dependencies)) is not None:
            self._fail(task, payload.dependency_error(self._out.template(task.template).name, error))
            return
        task.runs_on = NOWHERE
        task.work = None
        queue = self.queues.get(task.template)
        if queue is None:
            template = self._out.template(task.template)
            if template.group and not self._out.watch_group(template.group):
                self._fail(task, payload.group_removed(template.group, template.name))
                return
            if why := self._out.why_never(template):
                self._fail(task, payload.system_error("TaskUnschedulableError", f"The task is not schedulable: {why}"))
                return
            queue = self.queues[task.template] = HomeQueue()
            self._waits_since[task.template] = self._out.now
            if task.template not in self._looked_at:
                self._looked_at.add(task.template)
                self._out.warn_if_infeasible(template)
        part = queue.part(self._better_place(task))
        if first or task.is_awaited:
            part.push_first(task.id, task)
        else:
            part.push(task.id, task)

    def _better_place(self, task: Task) -> int | None:
        """The rank of another host that has so much more of a task's arguments than this one that it is worth asking for."""
        if self._out.is_alone or not task.dependencies or task.is_awaited:
            return None
        template = self._out.template(task.template)
        if template.spread or template.node is not None or template.group:
            return None
        sizes: dict[int, int] = {}
        for dependency in describe_dependencies(self._table, task.dependencies):
            if isinstance(dependency, m.RemoteDependency):
                for rank in dependency.ranks:
                    sizes[rank] = sizes.get(rank, 0) + dependency.size
        if not sizes:
            return None
        here = max((size for rank, size in sizes.items() if self._out.share_host(rank, self._out.rank)), default=0)
        best = max(sizes, key=lambda rank: (sizes[rank], -rank))
        return best if sizes[best] - here >= WORTH_ASKING else None

    def hasten(self, objects: Iterable[bytes]) -> None:
        """A worker here waits for these: tasks that make them, and have not been started, go first, the first of all first."""
        waiting = [task_of(identifier) for identifier in objects]
        while waiting:
            identifier = waiting.pop()
            task = self.tasks.get(identifier)
            if task is None:
                self._pool.hasten(identifier)  # that of another home, unless it is no task at all
            elif not task.is_awaited:
                task.is_awaited = True
                if task.missing:
                    waiting.extend(task_of(dependency) for dependency in task.dependencies)
                elif task.work is not None:
                    self._pool.hasten_own(task.work)
                elif (queue := self.queues.get(task.template)) is not None:
                    queue.hasten(identifier)

    # --------------------------------------------------------------------------------------------------------- placing
    @property
    def has_work(self) -> bool:
        """Whether `place` has something to do."""
        return bool(self.queues or self._asked)

    def place(self) -> None:
        """Hand queued tasks to the pool while it has room; tell the GCS of the rest. Once per loop turn."""
        left_waiting = self._pool.left_waiting
        left_waiting.clear()
        for identifier in list(self.queues):
            queue = self.queues[identifier]
            template = self._out.template(identifier)
            if self.may_stay(template):
                count = queue.count_here
                if queue.awaited:
                    for _ in range(min(len(queue.awaited), self._pool.room_for_awaited(identifier))):
                        self._start_here(queue.pop())
                for _ in range(min(queue.count_here, self._pool.room(identifier))):
                    self._start_here(queue.pop())
                if queue.count_here < count:
                    self._waits_since[identifier] = self._out.now
                if queue.count_here and self._pool.ledger.could_fit(template):
                    left_waiting[identifier] = bool(queue.awaited)
            waiting = len(queue)
            if not waiting:
                self._drop_queue(identifier)
            near = queue.near()
            if not self._out.is_alone and (waiting, near) != self._asked.get(identifier, NOTHING_ASKED):
                self._out.push_definitions(0, identifier)
                self._out.to_gcs(m.Demand(identifier, waiting, near))
                if waiting:
                    self._asked[identifier] = waiting, near
                else:
                    del self._asked[identifier]
        for identifier in [known for known in self._asked if known not in self.queues]:
            del self._asked[identifier]
            self._out.to_gcs(m.Demand(identifier, 0))

    def may_stay(self, template: m.Template) -> bool:
        """Whether tasks of this class may run here without the GCS having been asked."""
        if template.group and not self._out.has_group(template.group):
            return False  # bundles that were set aside may have to be given back
        return (not template.spread or self._out.is_alone) and self._out.suits(template)

    def on_grant(self, grant: m.Grant) -> None:
        queue = self.queues.get(grant.template)
        count = min(grant.count, len(queue) if queue else 0)
        if count < grant.count:
            self._out.to_gcs(m.GrantReturned(grant.template, grant.rank, grant.count - count))
        if queue is None or not count:
            return
        self.ran_on[grant.template] = grant.rank
        # The GCS has taken the granted tasks off its count already.
        asked, near = self._asked.get(grant.template, NOTHING_ASKED)
        self._asked[grant.template] = asked - count, near
        self._waits_since[grant.template] = self._out.now
        for _ in range(count):
            task = queue.pop_for(grant.rank)
            if grant.rank == self._out.rank:
                self._out.count_arrival(task.template)
                self._start_here(task)
            else:
                task.runs_on = grant.rank
                self._out.push_definitions(grant.rank, task.template)
                dependencies = describe_dependencies(self._table, task.dependencies)
                self._out.send(
                    grant.rank, m.Execute(task.id, task.attempt, task.template, task.arguments, dependencies)
                )
        if not queue:
            self._drop_queue(grant.template)
            if asked == count:
                del self._asked[grant.template]

    def _drop_queue(self, template: bytes) -> HomeQueue[Task]:
        self._pool.left_waiting.pop(template, None)
        del self._waits_since[template]
        return self.queues.pop(template)

    # --------------------------------------------------------------------------------------------------------- patience
    @property
    def warning_due(self) -> float | None:
        """When the user may have to be told that a class finds no place."""
        since = min((s for template, s in self._waits_since.items() if template not in self._warned), default=None)
        return None if since is None else since + PATIENCE

    def warn_if_stuck(self, now: float) -> None:
        """Have the GCS tell drivers, once, of classes for which there has been no place for long, and that run nowhere."""
        for template, since in self._waits_since.items():
            if template in self._warned or since + PATIENCE > now:
                continue
            if any(task.template == template and task.runs_on != NOWHERE for task in self.tasks.values()):
                self._waits_since[template] = now  # there are just more of them than places
                continue
            self._warned.add(template)
            self._out.push_definitions(0, template)
            self._out.to_gcs(m.Stuck(template, len(self.queues[template])))

    def _start_here(self, task: Task) -> None:
        here = self._out.rank
        task.runs_on = here
        dependencies = describe_dependencies(self._table, task.dependencies) if task.dependencies else []
        work = task.work = Work(task.id, here, task.attempt, task.template, task.arguments, dependencies)
        work.is_awaited = task.is_awaited
        self._pool.accept(work)

    def on_returned(self, rank: int, message: m.Returned) -> None:
        """A rank, maybe this one, had no worker for a task that it was sent: it is the first of its class again."""
        task = self.tasks.get(message.task)
        if task is None or task.attempt != message.attempt or task.runs_on != rank:
            return
        task.attempt += 1
        if task.is_dropped:
            self._fail_dropped(task)
        else:
            self._enqueue(task, first=True)

    # --------------------------------------------------------------------------------------------------------- results
    def on_finished(self, message: m.Finished, executor: int) -> None:
        """The reply of another rank."""
        for result in message.results:
            for inner in result.nested:
                self._references.hold_counted(inner)
        task = self.tasks.get(message.task)
        if task is None or task.attempt != message.attempt or (message.failed and message.retry and self._retry(task)):
            discard_results(self._references, message, executor, self._out)
        else:
            del self.tasks[task.id]
            record_results(self._table, message, executor)
            self._release(task)

    def wants_retry(self, task_id: bytes, attempt: int) -> bool:
        """A local worker's task raised an exception that its options say to retry: True if it is queued again."""
        task = self.tasks.get(task_id)
        return task is not None and task.attempt == attempt and self._retry(task)

    def is_current(self, task_id: bytes, attempt: int) -> bool:
        """Whether a local result is still waited for."""
        task = self.tasks.get(task_id)
        return task is not None and task.attempt == attempt

    def on_finished_here(self, task_id: bytes) -> None:
        """The results of a task that ran on this raylet, or on a lane, are in the table."""
        self._release(self.tasks.pop(task_id))

    def on_crashed(self, task_id: bytes, attempt: int, error: bytes) -> None:
        """The worker died, or an argument could not be had there."""
        task = self.tasks.get(task_id)
        if task is None or task.attempt != attempt:
            return
        if not self._retry(task):
            self._fail(task, error)

    def end_job(self, is_of_job: Callable[[bytes], bool]) -> None:
        """Nobody waits for the tasks of an ended job: those in queues fail, those that run are not tried again."""
        for task in self.tasks.values():
            if is_of_job(task.template):
                task.retries = 0
                task.is_dropped = True
        for template in [known for known in self.queues if is_of_job(known)]:
            for task in self._drop_queue(template):
                self._fail_dropped(task)

    def _fail_dropped(self, task: Task) -> None:
        name = self._out.template(task.template).name
        self._fail(task, payload.system_error("WorkerCrashedError", f"the job of {name} has ended"))

    def fail_group(self, group: bytes) -> None:
        """A placement group was removed: what waits for it fails."""
        for identifier in list(self.queues):
            template = self._out.template(identifier)
            if template.group == group:
                for task in self._drop_queue(identifier):
                    self._fail(task, payload.group_removed(group, template.name))

    def _retry(self, task: Task) -> bool:
        if task.retries == 0:
            return False
        if task.retries > 0:
            task.retries -= 1
        task.attempt += 1
        self._enqueue(task)
        return True

    def _fail(self, task: Task, error: bytes) -> None:
        self.tasks.pop(task.id, None)
        for index in range(1, task.num_returns + 1):
            self._table.set_inline(object_id(task.id, index), error, [])
        self._release(task)

    def _release(self, task: Task) -> None:
        for identifier in task.dependencies:
            self._references.drop(identifier)
        for identifier in task.nested:
            self._references.drop(identifier)


# ------------------------------------------------------------------------------------------------- shared with actor calls
def hold_all(references: References, identifiers: Iterable[bytes]) -> None:
    """Hold references for as long as a task or call is under way."""
    for identifier in identifiers:
        references.hold(identifier)


def dependency_error(table: ObjectTable, dependencies: Iterable[bytes]) -> bytes | None:
    """The payload of the first argument that is an error, all of them existing."""
    for identifier in dependencies:
        entry = table.entries[identifier]
        if entry.state == INLINE and payload.is_error(entry.data):
            return entry.data
    return None


def describe_dependencies(table: ObjectTable, dependencies: Iterable[bytes]) -> list[m.Dependency]:
    """Existing arguments as they travel with a task: the small ones themselves, of the others where they are.

    One that has become an error since the task was queued, for instance as its disk failed, goes by name: whoever runs the
    task asks for it, finds the error, and does not take it for a value.
    """
    described: list[m.Dependency] = []
    for identifier in dependencies:
        entry = table.entries[identifier]
        if entry.state == INLINE and not payload.is_error(entry.data):
            described.append(m.InlineDependency(entry.data))
        else:
            ranks = set(entry.copies or ())
            if entry.state in (HERE, SPILLED):
                ranks.add(table.rank)
            elif entry.block is not None:
                ranks.add(entry.block.rank)
            described.append(m.RemoteDependency(identifier, entry.size, sorted(ranks)))
    return described


def record_results(table: ObjectTable, message: m.Finished, executor: int) -> None:
    """Returns of a task that ran on another rank come to exist; references in them are held already."""
    for index, result in enumerate(message.results, 1):
        identifier = object_id(message.task, index)
        if isinstance(result, m.InlineResult):
            table.set_inline(identifier, result.data, result.nested)
        else:
            table.set_away(identifier, executor, result.size, result.nested)


def discard_results(references: References, message: m.Finished, executor: int, out: TasksOut) -> None:
    """Returns that nobody waits for: give up what came with them."""
    for index, result in enumerate(message.results, 1):
        for inner in result.nested:
            references.drop(inner)
        if isinstance(result, m.StoredResult):
            out.send(executor, m.Free([object_id(message.task, index)]))
