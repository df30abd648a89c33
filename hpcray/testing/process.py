"""A fake driver or worker: speaks to its raylet as `hpcray.client` does, and does only what a test tells it to."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import msgspec

from hpcray import ids, payload
from hpcray.protocol import messages as m
from hpcray.raylet.clients import Client
from hpcray.resources import Shape


class ProcessOut(Protocol):
    """What a fake process needs of its surroundings."""

    def read(self, rank: int, offset: int, size: int) -> bytes: ...
    def write(self, offset: int, data: bytes) -> None: ...
    def send_up(self, number: int, message: m.ClientMessage) -> None: ...
    def end(self, number: int) -> None: ...
    def take_token(self, number: int) -> bool: ...


def make_value(identifier: bytes, nested: Sequence[bytes] = (), size: int = 0) -> bytes:
    """The payload of an object that knows its own id, holds references, and is at least `size` bytes."""
    return bytes([payload.PICKLE]) + msgspec.msgpack.encode([identifier, list(nested), bytes(size)])


def open_value(data: bytes) -> tuple[bytes, list[bytes]]:
    """Inverse of `make_value`: the id and the references."""
    identifier, nested, _ = msgspec.msgpack.decode(data[1:], type=tuple[bytes, list[bytes], bytes])
    return identifier, nested


class View:
    """Memory of an object that this process looks at, and what must stay there meanwhile."""

    def __init__(self, identifier: bytes, place: m.StoredObject | m.StoredValue, data: bytes) -> None:
        self.id = identifier
        self.place = place
        self.data = data


class Process:
    """One fake process. `held` are its references; `values` what its gets have brought; `errors` those that are errors.

    A worker takes up what it is sent by itself and then waits for `finish`. As the real one, it hands back what it has
    not started before it blocks in `get`, and counts as blocked until all has come.
    """

    def __init__(self, client: Client, rank: int, out: ProcessOut) -> None:
        self.client = client
        self.number = client.number
        self.is_driver = client.is_driver
        self.job = b""
        self.rank = rank
        self.prefix = b""
        self.held: set[bytes] = set()
        self.values: dict[bytes, bytes] = {}
        self.views: list[View] = []
        self.errors: dict[bytes, bytes] = {}
        self.wanted: set[bytes] = set()
        self.ready: set[bytes] = set()
        self.answers: dict[int, m.Answer] = {}
        self.inbox: deque[m.Run] = deque()
        self.running: m.Run | None = None
        self.actor = b""
        self.ran: list[bytes] = []
        """Tasks taken up, in order."""
        self.called: list[bytes] = []
        """Calls taken up, in order."""
        self.exit_asked = False
        self.is_gone = False
        self.store_errors = 0
        self._writing: dict[bytes, Callable[[int | None], None]] = {}
        self._written: list[bytes] = []
        """References in values that are being written: they live until the raylet was told of them."""
        self._results: list[m.Result] | None = None
        self._argument_views: list[View] = []
        self._templates: dict[bytes, m.Template] = {}
        self._counter = 0
        self._defined: set[bytes] = set()
        self._out = out

    # ------------------------------------------------------------------------------------------------------- what it asks
    def send(self, message: m.ClientMessage) -> None:
        """Send one message to the raylet."""
        self._out.send_up(self.number, message)

    @property
    def is_blocked(self) -> bool:
        """Whether it waits for objects, or for room to write one."""
        return not self.is_driver and bool(self._writing or self.wanted)

    @property
    def is_writing(self) -> bool:
        """Whether it waits for room to write an object."""
        return bool(self._writing)

    def new_id(self) -> bytes:
        """The id of a new task, put or actor."""
        self._counter += 1
        return ids.task_id(self.prefix, self._counter)

    def define(self, identifier: bytes, template: m.Template) -> bytes:
        """Make a template known; returns its id."""
        if identifier not in self._defined:
            self._defined.add(identifier)
            self._templates[identifier] = template
            self.send(m.Define(template.function, b"a pickled function"))
            self.send(m.DefineTemplate(identifier, template))
        return identifier

    def put(self, nested: Sequence[bytes] = (), size: int = 0, *, large: bool = False) -> bytes:
        """Store an object; the id. A large one exists when the raylet has given room, unless it refuses."""
        identifier = ids.object_id(self.new_id(), 0)
        data = make_value(identifier, nested, size)
        if not large:
            self.send(m.PutInline(identifier, data, list(nested)))
            self.held.add(identifier)
            return identifier

        self._written.extend(nested)

        def written(offset: int | None) -> None:
            for inner in nested:
                self._written.remove(inner)
            if offset is not None:
                self.send(m.Seal(identifier, list(nested)))
                self.held.add(identifier)

        self._write(identifier, data, written)
        return identifier

    def _write(self, identifier: bytes, data: bytes, then: Callable[[int | None], None]) -> None:
        def reserved(offset: int | None) -> None:
            if offset is not None:
                self._out.write(offset, data)
            then(offset)

        self._writing[identifier] = reserved
        self.send(m.Reserve(identifier, len(data)))

    def stop_writing(self) -> None:
        """An interrupt comes while it waits for room."""
        writing, self._writing = self._writing, {}
        for identifier, then in writing.items():
            self.send(m.Unreserve(identifier))
            then(None)

    def submit(
        self, template: bytes, dependencies: Sequence[bytes] = (), nested: Sequence[bytes] = (), num_returns: int = 1
    ) -> list[bytes]:
        """Submit a task; the ids of its returns."""
        task = self.new_id()
        self.send(m.Submit(task, template, make_value(task, nested), list(dependencies), list(nested)))
        return self._hold_returns(task, num_returns)

    def create_actor(
        self,
        template: bytes,
        dependencies: Sequence[bytes] = (),
        nested: Sequence[bytes] = (),
        *,
        detached: bool = False,
    ) -> bytes:
        """Create an actor; its id. The handle is `object_id(actor, 0)`."""
        actor = self.new_id()
        arguments = make_value(actor, nested)
        self.send(m.CreateActor(actor, template, arguments, list(dependencies), list(nested), "", "", detached))
        self.held.add(ids.object_id(actor, 0))
        return actor

    def call(
        self, actor: bytes, dependencies: Sequence[bytes] = (), nested: Sequence[bytes] = (), num_returns: int = 1
    ) -> list[bytes]:
        """Call the actor; the ids of the returns."""
        task = self.new_id()
        arguments = make_value(task, nested)
        self.send(m.Call(task, actor, "method", arguments, list(dependencies), list(nested), num_returns))
        return self._hold_returns(task, num_returns)

    def create_group(self, bundles: Sequence[Shape], strategy: str = "PACK", *, detached: bool = False) -> bytes:
        """Ask for a placement group; its id."""
        group = self.new_id()
        self.send(m.CreatePlacementGroup(group, self.job, "", "", strategy, list(bundles), detached, []))
        return group

    def await_group(self, group: bytes) -> bytes:
        """The id of an object that comes to exist when all bundles are set aside."""
        identifier = ids.object_id(self.new_id(), 0)
        self.send(m.AwaitPlacementGroup(identifier, group, make_value(identifier)))
        self.held.add(identifier)
        return identifier

    def remove_group(self, group: bytes) -> None:
        """Give the bundles back."""
        self.send(m.RemovePlacementGroup(group))

    def _hold_returns(self, task: bytes, count: int) -> list[bytes]:
        returns: list[bytes] = [ids.object_id(task, index) for index in range(1, count + 1)]
        self.held.update(returns)
        return returns

    def get(self, identifiers: Iterable[bytes]) -> None:
        """Ask for values; a worker is blocked until all have come."""
        missing = [i for i in dict.fromkeys(identifiers) if i not in self.values and i not in self.wanted]
        if missing:
            self._hand_back()
            self.wanted.update(missing)
            self.send(m.Get(missing, not self.is_driver))

    def watch(self, identifiers: Iterable[bytes]) -> None:
        """Ask to be told when these exist; does not count as blocked."""
        self.send(m.Watch(list(identifiers), fetch=False))

    def stop_getting(self) -> None:
        """The time of its `get` is over."""
        self.wanted.clear()
        self.send(m.StopGetting())
        if not self.is_driver:
            self.send(m.Unblocked())

    def pickle(self, identifiers: Iterable[bytes]) -> int:
        """The user pickles references; they are out of hpcray's sight when the question of this number is answered."""
        self._counter += 1
        self.send(m.KeepForever(list(identifiers)))
        self.send(m.Query(self._counter, "ping", b""))
        return self._counter

    def release(self, identifiers: Iterable[bytes]) -> None:
        """Let go of references, and of what was looked at through them."""
        gone = [i for i in dict.fromkeys(identifiers) if i in self.held and i not in self._written]
        for identifier in gone:
            self.held.discard(identifier)
            self.values.pop(identifier, None)
            self.errors.pop(identifier, None)
        kept: list[View] = []
        for view in self.views:
            if view.id in gone:
                self.send(m.Unpin([view.id]))
            else:
                kept.append(view)
        self.views = kept
        if gone:
            self.send(m.Release(gone))

    def finish(
        self,
        nested: Sequence[bytes] = (),
        *,
        size: int = 0,
        large: bool = False,
        seconds: float = 0.01,
        failed: bool = False,
        retry: bool = False,
        keep: bool = False,
    ) -> None:
        """End what it runs: every return holds the `nested` references. Unless `keep`, all its references die then."""
        work = self.running
        assert work is not None
        assert not self.is_blocked
        if work.actor and not work.method:
            error = payload.system_error("ActorDiedError", "its __init__ raised", "") if failed else None
            self._end(m.ActorReady(work.actor, error), keep=True)
            return
        if failed:
            error_result = m.InlineResult(bytes([payload.TASK_ERROR]) + b"an exception", [])
            results: list[m.Result] = [error_result] * work.num_returns
            self._end(m.TaskDone(work.task, results, True, retry, seconds), keep=keep)
            return
        results = []
        returns = [ids.object_id(work.task, index) for index in range(1, work.num_returns + 1)]
        datas = [make_value(identifier, nested, size) for identifier in returns]
        done = m.TaskDone(work.task, results, False, False, seconds)
        if not large or not returns:
            results.extend(m.InlineResult(data, list(nested)) for data in datas)
            self._end(done, keep=keep)
            return

        self._written.extend(nested)

        def write_next() -> None:
            index = len(results)
            if index == len(returns):
                self._written.clear()
                self._end(done, keep=keep)
            else:
                self._write(returns[index], datas[index], written)

        def written(offset: int | None) -> None:
            if offset is None:
                error = payload.system_error("ObjectStoreFullError", "no room for a result")
                results[:] = [m.InlineResult(error, []) for _ in returns]
                done.failed = True
                self._written.clear()
                self._end(done, keep=keep)
            else:
                results.append(m.StoredResult(len(datas[len(results)]), list(nested)))
                write_next()

        write_next()

    def _end(self, message: m.TaskDone | m.ActorReady, *, keep: bool) -> None:
        self.running = None
        self.send(message)
        for view in self._argument_views:
            self.send(m.Unpin([view.id]))
        self._argument_views.clear()
        if not keep:
            self.release(list(self.held))
        self._next()

    # --------------------------------------------------------------------------------------------------- what it is told
    def on_message(self, message: m.RayletToClient) -> None:
        """A message of the raylet."""
        if (handler := getattr(self, f"_on_{type(message).__name__}", None)) is not None:
            handler(message)

    def _on_Registered(self, message: m.Registered) -> None:  # noqa: N802
        self.prefix = message.prefix
        self.job = message.definition

    def _on_InlineObject(self, message: m.InlineObject) -> None:  # noqa: N802
        self._arrived(message.id, message.data)

    def _on_StoredObject(self, message: m.StoredObject) -> None:  # noqa: N802
        data = self._out.read(message.rank, message.offset, message.size)
        if message.id in self.held:
            self.views.append(View(message.id, message, data))
        else:
            self.send(m.Unpin([message.id]))
        self._arrived(message.id, data)

    def _arrived(self, identifier: bytes, data: bytes) -> None:
        if identifier in self.held:
            self.values[identifier] = data
            if payload.is_error(data):
                self.errors[identifier] = data
            else:
                self._open(identifier, data)
        if identifier in self.wanted:
            self.wanted.discard(identifier)
            if not self.wanted and not self.is_driver:
                self.send(m.Unblocked())

    def _open(self, identifier: bytes, data: bytes) -> None:
        name, nested = open_value(data)
        if name != identifier:
            raise AssertionError(f"the memory of object {identifier.hex()} holds {name.hex()}")
        self.adopt(nested)

    def adopt(self, identifiers: Iterable[bytes]) -> None:
        """Unpickle references."""
        new = [i for i in dict.fromkeys(identifiers) if i not in self.held]
        if new:
            self.held.update(new)
            self.send(m.AddReferences(new))

    def _on_Ready(self, message: m.Ready) -> None:  # noqa: N802
        self.ready.update(message.ids)

    def _on_Answer(self, message: m.Answer) -> None:  # noqa: N802
        self.answers[message.number] = message

    def _on_Reserved(self, message: m.Reserved) -> None:  # noqa: N802
        if (then := self._writing.pop(message.id, None)) is not None:
            then(message.offset)

    def _on_ReserveFailed(self, message: m.ReserveFailed) -> None:  # noqa: N802
        if (then := self._writing.pop(message.id, None)) is not None:
            self.store_errors += 1
            then(None)

    def _on_Run(self, message: m.Run) -> None:  # noqa: N802
        self.inbox.append(message)
        if self.wanted:
            self._hand_back()
        else:
            self._next()

    def _on_Exit(self, message: m.Exit) -> None:  # noqa: N802
        self.exit_asked = True
        self._next()

    def _hand_back(self) -> None:
        tasks = [work.task for work in self.inbox if not work.actor and self._may_start(work)]
        self.inbox = deque(work for work in self.inbox if work.actor)
        if tasks:
            self.send(m.HandBack(tasks))

    def _may_start(self, work: m.Run) -> bool:
        return not work.is_behind or self._out.take_token(self.number)

    def _on_Recalled(self, message: m.Recalled) -> None:  # noqa: N802
        self.inbox = deque(work for work in self.inbox if work.task not in message.tasks)
        self.send(m.RecallDone())

    def _next(self) -> None:
        while self.running is None and self.inbox:
            work = self.inbox.popleft()
            if self._may_start(work):
                self._take_up(work)
        if self.running is None and self.exit_asked:
            self._out.end(self.number)

    def _take_up(self, work: m.Run) -> None:
        self.running = work
        (self.called if work.method else self.ran).append(work.task)
        if work.actor:
            self.actor = work.actor
        else:
            work.num_returns = self._templates[work.template].num_returns
        if work.template:
            self.job = self._templates[work.template].job
        for value in work.values:
            if isinstance(value, m.InlineValue):
                self.adopt(open_value(value.data)[1])
            else:
                data = self._out.read(value.rank, value.offset, value.size)
                self._argument_views.append(View(value.id, value, data))
                self._open(value.id, data)
        task, nested = open_value(work.arguments)
        if task != (work.task if work.method or not work.actor else work.actor):
            raise AssertionError(f"{work.task.hex()} was sent with the arguments of {task.hex()}")
        self.adopt(nested)

    def _on_DefineTemplate(self, message: m.DefineTemplate) -> None:  # noqa: N802
        self._templates[message.id] = message.template

    def check(self) -> None:
        """Raise AssertionError if memory that this process looks at has changed."""
        for view in (*self.views, *self._argument_views):
            if self._out.read(view.place.rank, view.place.offset, view.place.size) != view.data:
                raise AssertionError(f"object {view.id.hex()} changed while it was looked at")
