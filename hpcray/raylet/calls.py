"""The caller's side of actors: creations and calls that clients of this raylet asked for.

Calls of one client to one actor form a queue. Its head is sent when the actor is alive and the head's
arguments exist; a head that waits holds up the ones behind it, so each caller's calls arrive in the order of
its calling.

Rules:
  1. A call is in exactly one place: queued, or sent. Each ends with results or an error, whatever dies.
  2. Sent calls are answered by the hosting raylet; queued ones fail here when the GCS says that the actor is
     dead.
  3. A call holds the actor's handle until it is answered, so an actor never ends with calls under way.
"""

from __future__ import annotations

from collections import deque

from hpcray import payload
from hpcray.ids import object_id, prefix_of
from hpcray.protocol import messages as m
from hpcray.raylet.tasks import (
    TasksOut,
    dependency_error,
    describe_dependencies,
    hold_all,
    record_results,
)
from hpcray.store.table import ObjectTable


class PendingCall:
    """A call that was not answered yet."""

    __slots__ = ("message", "missing")

    def __init__(self, message: m.Call) -> None:
        self.message = message
        self.missing = 0


class ActorView:
    """What this raylet knows of an actor that its clients call."""

    __slots__ = ("error", "incarnation", "queues", "rank", "state")

    def __init__(self) -> None:
        self.state = "pending"
        self.rank = -1
        self.incarnation = 0
        self.error = b""
        self.queues: dict[bytes, deque[PendingCall]] = {}


class Calls:
    """All actor creations and calls of one raylet's clients: a pure core."""

    def __init__(self, table: ObjectTable, out: TasksOut) -> None:
        self._table = table
        self._references = table.references
        self._out = out
        self.views: dict[bytes, ActorView] = {}
        self.sent: dict[bytes, PendingCall] = {}
        self.created: dict[bytes, m.CreateActor] = {}
        """Actors homed here that are not dead: their creation may have to be sent (again)."""
        self._unregistered: set[bytes] = set()
        """Those of which the GCS knows nothing yet, as arguments of their creation do not exist."""

    # ----------------------------------------------------------------------------------------------- creation
    def on_create(self, message: m.CreateActor) -> None:
        actor = message.actor
        self.created[actor] = message
        self._unregistered.add(actor)
        self.views[actor] = ActorView()
        handle = self._references.create(object_id(actor, 0))
        handle.maker = message.template
        self._table.set_inline(handle.id, payload.NONE, [])
        if not message.detached:
            handle.on_free = lambda: self._unreferenced(actor)
        hold_all(self._references, message.nested)
        hold_all(self._references, message.dependencies)
        missing = 0

        def exists() -> None:
            nonlocal missing
            missing -= 1
            if missing == 0:
                self._register(message)

        for dependency in message.dependencies:
            if not self._table.when_exists(dependency, exists):
                missing += 1
        if missing == 0:
            self._register(message)

    def unregistered(self) -> list[m.CreateActor]:
        """Actors that wait for arguments of their creation."""
        return [self.created[actor] for actor in self._unregistered]

    def _unreferenced(self, actor: bytes) -> None:
        if actor in self._unregistered:
            name = self._out.template(self.created[actor].template).name
            why = "its last handle went out of scope, before it had started."
            self._register(self.created[actor], payload.actor_died(actor, name, why))
        elif actor in self.created:
            self._out.to_gcs(m.ActorUnreferenced(actor))

    def _register(self, message: m.CreateActor, reason: bytes | None = None) -> None:
        if message.actor not in self._unregistered:
            return
        self._unregistered.discard(message.actor)
        self._out.push_definitions(0, message.template)
        if reason is None and (error := dependency_error(self._table, message.dependencies)) is not None:
            cls = self._out.template(message.template).name
            reason = payload.creation_error(message.actor, cls, payload.dependency_error(f"{cls}.__init__", error))
        template = self._out.template(message.template)
        if reason is None and (why := self._out.why_never(template)):
            reason = payload.system_error("ActorUnschedulableError", f"The actor is not schedulable: {why}")
        if reason is None:
            self._out.warn_if_infeasible(template)
        self._out.to_gcs(
            m.RegisterActor(message.actor, message.template, message.name, message.namespace, message.detached, reason)
        )

    def on_place(self, message: m.PlaceActor) -> None:
        creation = self.created.get(message.actor)
        if creation is None:
            return
        self._out.push_definitions(message.rank, creation.template)
        dependencies = describe_dependencies(self._table, creation.dependencies)
        self._out.send(
            message.rank,
            m.StartActor(message.actor, message.incarnation, creation.template, creation.arguments, dependencies),
        )

    # -------------------------------------------------------------------------------------------------- calls
    def rank_of(self, actor: bytes) -> int | None:
        """Where an actor that clients here have called lives, if it does."""
        view = self.views.get(actor)
        return view.rank if view is not None and view.state == "alive" else None

    def on_call(self, message: m.Call) -> None:
        """A client's call; one on a lane runs already, and lacks nothing."""
        for index in range(1, message.num_returns + 1):
            self._references.create(object_id(message.task, index)).maker = message.method
        self._references.hold(object_id(message.actor, 0))
        if message.lane:
            self.sent[message.task] = PendingCall(message)
            return
        hold_all(self._references, message.nested)
        hold_all(self._references, message.dependencies)
        view = self.views.get(message.actor)
        if view is None:
            view = self.views[message.actor] = ActorView()
            self._out.to_gcs(m.WatchActor(message.actor))
        call = PendingCall(message)
        caller = prefix_of(message.task)

        def exists() -> None:
            call.missing -= 1
            if call.missing == 0:
                self._pump(view, caller)

        for dependency in message.dependencies:
            if not self._table.when_exists(dependency, exists):
                call.missing += 1
        view.queues.setdefault(caller, deque()).append(call)
        self._pump(view, caller)

    def _pump(self, view: ActorView, caller: bytes) -> None:
        queue = view.queues.get(caller)
        while queue and not queue[0].missing and view.state != "pending":
            call = queue.popleft()
            if view.state == "dead":
                self._fail(call, view.error)
            elif (error := dependency_error(self._table, call.message.dependencies)) is not None:
                self._fail(call, payload.dependency_error(call.message.method, error))
            else:
                self._send(view, call)
        if not queue:
            view.queues.pop(caller, None)

    def _send(self, view: ActorView, call: PendingCall) -> None:
        message = call.message
        self.sent[message.task] = call
        dependencies = describe_dependencies(self._table, message.dependencies) if message.dependencies else []
        self._out.send(
            view.rank,
            m.ExecuteCall(
                message.task,
                message.actor,
                view.incarnation,
                message.method,
                message.arguments,
                dependencies,
                message.num_returns,
            ),
        )

    def on_kill(self, message: m.Kill) -> None:
        """Later calls wait until the GCS tells what has become of the actor."""
        view = self.views.get(message.actor)
        if view is not None and view.state == "alive":
            view.state = "pending"
        self._out.to_gcs(m.KillActor(message.actor, message.no_restart))

    # --------------------------------------------------------------------------------------------------- news
    def on_changed(self, message: m.ActorChanged) -> None:
        view = self.views.get(message.actor)
        if view is None:
            return
        view.state = message.state
        view.rank = message.rank
        view.incarnation = message.incarnation
        view.error = message.error
        if message.state == "dead":
            creation = self.created.pop(message.actor, None)
            if creation is not None:
                for identifier in (*creation.dependencies, *creation.nested):
                    self._references.drop(identifier)
        for caller in list(view.queues):
            self._pump(view, caller)
        if message.state == "dead" and not view.queues:
            # A later call asks the GCS again, so views of dead actors do not pile up.
            del self.views[message.actor]

    def on_finished(self, message: m.Finished, executor: int) -> bool:
        """Whether this was the reply to a call; its results exist then."""
        call = self.sent.pop(message.task, None)
        if call is None:
            return False
        for result in message.results:
            for inner in result.nested:
                self._references.hold_counted(inner)
        record_results(self._table, message, executor)
        self._release(call.message)
        return True

    def on_finished_here(self, task: bytes) -> bool:
        """As `on_finished`, when its results are in the table: the actor runs on this raylet, or the call on a lane."""
        call = self.sent.pop(task, None)
        if call is None:
            return False
        self._release(call.message)
        return True

    def on_crashed(self, task: bytes, error: bytes) -> bool:
        """Whether this was the reply to a call; it has failed then."""
        call = self.sent.pop(task, None)
        if call is None:
            return False
        self._fail(call, error)
        return True

    def _fail(self, call: PendingCall, error: bytes) -> None:
        message = call.message
        for index in range(1, message.num_returns + 1):
            self._table.set_inline(object_id(message.task, index), error, [])
        self._release(message)

    def _release(self, message: m.Call) -> None:
        self._references.drop(object_id(message.actor, 0))
        for identifier in (*message.dependencies, *message.nested):
            self._references.drop(identifier)
