"""The hosting side of actors: the actors whose workers live on this raylet.

Rules:
  1. Calls reach the worker in the order in which each caller's raylet sent them, even if a later one's
     arguments came first.
  2. Every call that arrived is answered: by the worker, or with the reason of the actor's death.
  3. The end of an actor's worker is reported to the GCS once per incarnation, after its calls were answered.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

from hpcray import payload
from hpcray.ids import prefix_of
from hpcray.protocol import messages as m
from hpcray.raylet.clients import Work, Worker
from hpcray.raylet.pool import Pool


class HostOut(Protocol):
    """The only way out of the hosting side."""

    def to_gcs(self, message: m.PeerMessage) -> None: ...
    def template(self, identifier: bytes) -> m.Template: ...
    def run(self, worker: Worker, work: Work, values: list[m.Value]) -> None: ...
    def could_not_run(self, work: Work, error: bytes) -> None: ...
    def kill_worker(self, worker: Worker) -> None: ...
    def exit_worker(self, worker: Worker) -> None: ...


class HostedActor:
    """One incarnation of an actor here."""

    __slots__ = (
        "home",
        "id",
        "incarnation",
        "init_error",
        "is_alive",
        "queues",
        "template",
        "wanted_end",
        "worker",
    )

    def __init__(self, identifier: bytes, incarnation: int, template: bytes) -> None:
        self.id = identifier
        self.incarnation = incarnation
        self.template = template
        self.worker: Worker | None = None
        self.is_alive = False
        self.wanted_end = ""
        """Why it was asked to end, if it was."""
        self.init_error: bytes | None = None
        self.queues: dict[tuple[int, bytes], deque[Work]] = {}
        """Per caller, calls that wait for their arguments to arrive, and those behind them."""


class HostedActors:
    """All actors on one raylet: a pure core."""

    def __init__(self, pool: Pool, out: HostOut) -> None:
        self._pool = pool
        self._arguments = pool.arguments
        self._out = out
        self.actors: dict[bytes, HostedActor] = {}
        self._epitaphs: dict[bytes, bytes] = {}
        """Why actors that lived here died, for calls that come too late."""

    def on_start(self, message: m.StartActor, home: int) -> None:
        actor = HostedActor(message.actor, message.incarnation, message.template)
        self.actors[message.actor] = actor
        work = Work(
            message.actor,
            home,
            message.incarnation,
            message.template,
            message.arguments,
            message.dependencies,
            actor=message.actor,
        )

        self._pool.accept(work)

    def worker_of(self, identifier: bytes) -> Worker | None:
        """The worker of an actor that lives here and is not about to end."""
        actor = self.actors.get(identifier)
        return actor.worker if actor is not None and actor.is_alive and not actor.wanted_end else None

    def epitaph(self, identifier: bytes) -> bytes:
        """Why an actor that lived here died: an error's payload."""
        return self._epitaphs.get(identifier) or payload.actor_died(identifier, "", "it is gone.")

    def on_started(self, worker: Worker, message: m.ActorReady) -> None:
        """`__init__` returned, or raised."""
        actor = self.actors.get(message.actor)
        creation = worker.tasks.pop(message.actor, None)
        if actor is None or creation is None:
            return
        self._pool.release_arguments(creation)
        actor.worker = worker
        if message.error is not None:
            actor.init_error = message.error
            self._out.exit_worker(worker)
            return
        actor.is_alive = True
        self._out.to_gcs(m.ActorStarted(actor.id, actor.incarnation, None))

    def on_call(self, message: m.ExecuteCall, home: int) -> None:
        work = Work(
            message.task,
            home,
            message.incarnation,
            b"",
            message.arguments,
            message.dependencies,
            actor=message.actor,
            method=message.method,
            num_returns=message.num_returns,
        )
        actor = self.actors.get(message.actor)
        if actor is None or not actor.is_alive or actor.incarnation != message.incarnation:
            self._out.could_not_run(work, self.epitaph(message.actor))
            return
        caller = (home, prefix_of(message.task))
        is_here = self._arguments.add(work, lambda: self._pump(actor, caller))
        queue = actor.queues.get(caller)
        if queue is None and is_here:
            self._give(actor, work)
        else:
            actor.queues.setdefault(caller, deque()).append(work)

    def _pump(self, actor: HostedActor, caller: tuple[int, bytes]) -> None:
        queue = actor.queues.get(caller)
        while queue and self._arguments.take(queue[0], lambda: self._pump(actor, caller)):
            self._give(actor, queue.popleft())
        if not queue:
            actor.queues.pop(caller, None)

    def _give(self, actor: HostedActor, work: Work) -> None:
        worker = actor.worker
        if worker is None or not actor.is_alive:
            self._pool.release_arguments(work)
            self._out.could_not_run(work, self.epitaph(actor.id))
            return
        values = self._pool.values_for(worker, work)
        if isinstance(values, bytes):
            self._pool.release_arguments(work)
            self._out.could_not_run(work, values)
            return
        worker.tasks[work.task] = work
        self._out.run(worker, work, values)
        self._arguments.hand_over(work)

    def on_done(self, worker: Worker, task: bytes) -> Work | None:
        """The worker answered a call."""
        work = worker.tasks.pop(task, None)
        if work is not None and work.dependencies:
            self._pool.release_arguments(work)
        return work

    def on_stop(self, message: m.StopActor) -> None:
        """The GCS wants the actor's worker gone, now or after the calls it has."""
        actor = self.actors.get(message.actor)
        if actor is None:
            return
        actor.wanted_end = message.why
        if actor.worker is None:
            # Still being created: it ends as soon as its worker is known to run it.
            self._end_unborn(actor)
        elif message.drain:
            self._out.exit_worker(actor.worker)
        else:
            self._out.kill_worker(actor.worker)

    def _end_unborn(self, actor: HostedActor) -> None:
        for worker in [w for workers in self._pool.leases.values() for w in workers if w.actor == actor.id]:
            self._out.kill_worker(worker)
            return
        self._pool.withdraw(actor.template, lambda work: work.actor == actor.id)
        self._bury(actor, self._died(actor, f"{actor.wanted_end}, before it had started."))

    def on_worker_gone(self, identifier: bytes, lost: list[Work], why: str) -> None:
        """The actor's worker ended, with these calls unanswered."""
        actor = self.actors.get(identifier)
        if actor is None:
            return
        if actor.init_error is not None:
            error = actor.init_error
        else:
            error = self._died(actor, f"{actor.wanted_end}." if actor.wanted_end else why)
        for work in lost:
            if work.method:
                self._out.could_not_run(work, error)
        self._bury(actor, error)

    def could_not_start(self, work: Work, error: bytes) -> None:
        """An argument of the creation could not be had."""
        if (actor := self.actors.get(work.actor)) is not None:
            cls = self._out.template(actor.template).name
            inner = payload.dependency_error(f"{cls}.__init__", error)
            actor.init_error = payload.creation_error(actor.id, cls, inner)
            self._bury(actor, actor.init_error)

    def lost_its_bundle(self, work: Work) -> None:
        """It cannot be created here: its placement group was removed meanwhile."""
        if (actor := self.actors.get(work.actor)) is not None:
            self._bury(actor, self._died(actor, "its placement group was removed."))

    def _bury(self, actor: HostedActor, error: bytes) -> None:
        del self.actors[actor.id]
        self._epitaphs[actor.id] = error
        actor.is_alive = False
        queues, actor.queues = actor.queues, {}
        for queue in queues.values():
            for work in queue:
                self._pool.release_arguments(work)
                self._out.could_not_run(work, error)
        if actor.init_error is not None:
            self._out.to_gcs(m.ActorStarted(actor.id, actor.incarnation, error))
        else:
            self._out.to_gcs(m.ActorEnded(actor.id, actor.incarnation, error))

    def _died(self, actor: HostedActor, why: str) -> bytes:
        return payload.actor_died(actor.id, self._out.template(actor.template).name, why)
