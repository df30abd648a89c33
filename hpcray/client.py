"""A driver's or worker's connection to its raylet: what the public API stands on.

No thread of its own is needed: whoever waits reads the socket. Where several threads wait, one reads for all. Only a driver
(which must show log lines while its user computes) and a worker that awaits references have a reader thread, and that
sleeps while others read.

Rules:
  1. References are counted under `_lock`; `ObjectRef.__del__`, which may run anywhere, only appends to a deque.
  2. What the deques hold leaves ahead of the next message, so a release never overtakes the use that preceded it.
  3. Values of small objects are kept while a reference is held, so `get` twice costs one round trip.
"""

from __future__ import annotations

import array
import contextlib
import os
import platform
import select
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import msgspec

import hpcray
from hpcray import ids, payload, ray_alias
from hpcray.environments.wanted import Environments
from hpcray.exceptions import GetTimeoutError, RaySystemError
from hpcray.lanes import CallerLanes
from hpcray.object_ref import ObjectRef, adopt_for, counted
from hpcray.protocol import messages as m
from hpcray.protocol.codec import LENGTH_SIZE, decode_from_raylet, prefixed, split_stream, stream_frame
from hpcray.store.arena import Arena
from hpcray.worker.lanes import ServedLanes
from hpcray.worker.serialization import Serialized, deserialize, load_error

if TYPE_CHECKING:
    import concurrent.futures

RECEIVE_SIZE = 1 << 18
ANCILLARY_SIZE = socket.CMSG_SPACE(32 * array.array("i").itemsize)
"""Room for the arenas of 32 ranks that a raylet may hand over in one frame."""
RELEASES_KEPT = 32
"""So many dropped references wait for the next message before they are sent by themselves."""
READER_PAUSE = 0.05
"""Seconds that the reader thread leaves the socket to threads that wait for something."""

ForkError = RuntimeError


_generation = 0
"""Grows in each forked child: a connection of an earlier generation is the parent's."""


def _count_generation() -> None:
    global _generation
    _generation += 1
    adopt_for(None)  # the next one is refused, see `check_process`


os.register_at_fork(after_in_child=_count_generation)


class EnvironmentAsked(Exception):
    """In workers: the first work is of a runtime environment, to be entered before anything else is looked at."""

    def __init__(self, template: m.Template) -> None:
        super().__init__(template.name)
        self.template = template


class _Stored:
    """An object in an arena that the raylet keeps in place for us, until all views of it are dead."""

    __slots__ = ("id", "place", "views")

    def __init__(self, identifier: bytes, place: m.StoredObject | m.StoredValue) -> None:
        self.id = identifier
        self.place = place
        self.views = 0


class Client:
    """One process's connection to its raylet.

    Args:
        sock: Connected stream socket; owned from now on.
        is_driver: False in workers, which hand back tasks before they block.
    """

    def __init__(self, sock: socket.socket, *, is_driver: bool) -> None:
        sock.setblocking(True)
        self.is_driver = is_driver
        self.rank = 0
        self.host = ""
        self.job = b""
        self.job_definition = b""
        """Id of the definition that holds the job's configuration, part of every template made here."""
        self.namespace = ""
        self.inline_limit = 0
        self.prefix = b""
        self.environments = Environments()
        self.templates: dict[bytes, m.Template] = {}
        self.blobs: dict[bytes, bytes] = {}
        self.inbox: deque[m.Run] = deque()
        self.exit_asked = False
        self._gpus: m.AssignGpus | None = None
        self._tokens = -1
        """In workers: the right to start what was sent behind another task, see `raylet/pool.py`."""
        self.on_log: Callable[[m.LogLines], None] = lambda _lines: None
        self.on_gpus: Callable[[m.AssignGpus], None] = lambda _gpus: None
        self.on_cpus: Callable[[m.BindCpus], None] = lambda _cpus: None
        self.before_blocking: Callable[[], None] = lambda: None
        """In workers: hand back what was not started; called before and while user code waits."""
        self.is_closed = False
        self._sock = sock
        self._generation = _generation
        self._lock = threading.Lock()
        self._read_lock = threading.Lock()
        self._turn = threading.Condition()
        self._followers = 0
        self._busy = 0
        self._blocked = 0
        """Threads of user code that wait in `get` or `wait`."""
        self._reader: threading.Thread | None = None
        self._buffer = bytearray()
        self._received = memoryview(bytearray(RECEIVE_SIZE))
        self._descriptors: deque[int] = deque()
        self._poller = select.poll()
        """Of the thread that reads for all."""
        self._poller.register(sock.fileno(), select.POLLIN)
        self._watcher = select.epoll()
        """Of the reader thread: unlike a poll object it may be changed while a thread waits for it."""
        self._watcher.register(sock.fileno(), select.EPOLLIN)
        self._lanes = CallerLanes(_LanesOut(self))
        self.served = ServedLanes(self)
        """In workers: lanes of drivers."""
        self._has_lanes = False
        self._pings: dict[int, Callable[[], None]] = {}
        self._arrived: list[bytes] = []
        """Returns that came on lanes, and whose futures were not completed yet."""
        self._counter = 0
        self._counts: dict[bytes, int] = {}
        self.born: deque[bytes] = deque()
        """Unpickled references that are not counted yet. One goes in before its instance can go into `_dead`."""
        self._dead: deque[bytes] = deque()
        self._dead_views: deque[_Stored] = deque()
        self._pending: list[Any] = []
        self._values: dict[bytes, bytes | _Stored] = {}
        self._ready: set[bytes] = set()
        self._watched: set[bytes] = set()
        self._large: set[bytes] = set()
        self._coming: set[bytes] = set()
        """In drivers: returns of tasks that the raylet will send, or say `Exists` of, by itself."""
        self._existing: set[bytes] = set()
        """Returns that exist, and whose value must be asked for."""
        self._getting: dict[bytes, int] = {}
        """Coming returns that threads wait for in `get`: to be asked for if they turn out to be large."""
        self._fetching = 0
        """Threads that wait for copies on this node in `wait`."""
        self._reservations: dict[bytes, int | bytes | None] = {}
        """Objects for which memory was asked: None, then the offset, or the error that there is none."""
        self._answers: dict[int, m.Answer] = {}
        self._futures: dict[bytes, list[concurrent.futures.Future[Any]]] = {}
        self._defined: set[bytes] = set()
        self._arenas: dict[int, Arena] = {}
        self._refusal: str | None = None
        self._registered: m.Registered | None = None
        self._unread = b""
        """Frames that came after the one that had a runtime environment entered."""
        self._handlers: dict[type, Callable[[Any], None]] = {
            m.InlineObject: self._on_inline_object, m.StoredObject: self._on_stored_object, m.Run: self._on_run,
            m.Ready: self._on_ready, m.Reserved: self._on_reserved, m.ReserveFailed: self._on_reserve_failed,
            m.Answer: self._on_answer, m.Define: self._on_define, m.DefineTemplate: self._on_define_template,
            m.Registered: self._on_registered, m.Refused: self._on_refused, m.MapArena: self._on_map_arena,
            m.LogLines: lambda lines: self.on_log(lines), m.Exit: self._on_exit, m.Exists: self._on_exists,
            m.LaneOpened: self._on_lane_opened, m.LaneClosed: self._on_lane_closed, m.LaneWanted: self._on_lane_wanted,
            m.ServeLane: self._on_serve_lane, m.AssignGpus: self._on_assign_gpus,
            m.BindCpus: lambda message: self.on_cpus(message), m.Recalled: self._on_recalled,
        }  # fmt: skip

    def register(self, namespace: str, sys_path: list[str], *, log_to_driver: bool) -> None:
        """In drivers: say who this is. Blocks until the raylet has welcomed it.

        Raises:
            RuntimeError: The job runs another version of hpcray or Python.
        """
        python, cwd = platform.python_version(), str(Path.cwd())
        as_ray = ray_alias.is_installed()
        self.send(
            m.RegisterDriver(hpcray.__version__, python, os.getpid(), namespace, cwd, sys_path, as_ray, log_to_driver)
        )
        self.wait_until(lambda: bool(self.prefix), None)

    # -------------------------------------------------------------------------------------------------------- sending
    def send(self, message: Any) -> None:
        """Send one message, after the releases that came before it. May block while the raylet is busy.

        Raises:
            RuntimeError: This process was forked from the one that owns the connection.
            RaySystemError: The connection is gone.
        """
        with self._lock:
            self._send_locked(message)

    def _send_locked(self, message: Any | None, *, only_views: bool = False) -> None:
        self.check_process()
        batch = self._pending
        if self._dead or (self.born and not only_views):
            self._collect_references(batch)
        if self._dead_views:
            self._collect_views(batch)
        if message is not None:
            batch.append(message)
        if not batch:
            return
        if self._lanes.unregistered:
            self._lanes.register(batch)
        self._pending = []
        try:
            self._sock.sendall(stream_frame(batch))
        except OSError as error:
            raise self._connection_lost() from error

    def _collect_references(self, batch: list[Any]) -> None:
        counts, values = self._counts, self._values
        dying = len(self._dead)  # those that have been born for certain, should others unpickle meanwhile
        next_born, next_dead = self.born.popleft, self._dead.popleft
        born = [next_born() for _ in range(len(self.born))]
        dead = [next_dead() for _ in range(dying)]
        names = set(born)
        if len(names) == len(born) == dying and names == set(dead) and counts.keys().isdisjoint(names):
            return  # a list of references that was only looked at: the raylet has never heard of them
        added: dict[bytes, None] = {}
        for identifier in born:
            known = counts.get(identifier, 0)
            counts[identifier] = known + 1
            if not known:
                added[identifier] = None
        released: list[bytes] = []
        unpinned: list[bytes] = []
        for identifier in dead:
            left = counts[identifier] - 1
            if left:
                counts[identifier] = left
                continue
            del counts[identifier]
            if identifier in added:
                del added[identifier]  # the raylet has never heard of it
                continue
            if not (self.is_driver and self._lanes.on_dropped(identifier)):
                released.append(identifier)
            value = values.pop(identifier, None)
            if isinstance(value, _Stored) and value.views == 0:
                unpinned.append(identifier)
            self._ready.discard(identifier)
            self._watched.discard(identifier)
            self._large.discard(identifier)
            self._coming.discard(identifier)
            self._existing.discard(identifier)
        # The order matters: what a released object holds has been added before.
        for kind, identifiers in ((m.AddReferences, list(added)), (m.Unpin, unpinned), (m.Release, released)):
            if identifiers:
                batch.append(kind(identifiers))

    def _collect_views(self, batch: list[Any]) -> None:
        unpinned: list[bytes] = []
        while self._dead_views:
            stored = self._dead_views.popleft()
            stored.views -= 1
            if stored.views == 0:
                unpinned.append(stored.id)
                if self._values.get(stored.id) is stored:
                    del self._values[stored.id]
        if unpinned:
            batch.append(m.Unpin(unpinned))

    def check_process(self) -> None:
        """Refuse to serve a process that was forked from this connection's.

        Raises:
            RuntimeError: It was.
        """
        if self._generation != _generation:
            raise ForkError(
                "this process was forked from one that is connected to hpcray and cannot use its connection: run the code "
                "as a task or actor, or start the process with subprocess or the 'spawn' method"
            )

    def flush(self) -> None:
        """Send what was released since the last message."""
        if self.born or self._dead or self._dead_views or self._pending:
            with self._lock:
                self._send_locked(None)

    def _flush_soon(self, *, only_views: bool = False) -> None:
        # Called from __del__ and finalizers, maybe in the middle of another send of this very thread: never waits.
        if self._lock.acquire(blocking=False):
            try:
                with contextlib.suppress(Exception):
                    self._send_locked(None, only_views=only_views)
            finally:
                self._lock.release()

    # ------------------------------------------------------------------------------------------------------- counting
    def count_down(self, identifier: bytes) -> None:
        """An `ObjectRef` instance died. From any thread, at any point."""
        if self._generation != _generation or self.is_closed:
            return
        self._dead.append(identifier)
        # What was born and died between two messages is nobody's business: a list of references that was only looked at.
        if len(self._dead) - len(self.born) >= RELEASES_KEPT or identifier in self._large:
            self._flush_soon()

    def adopt(self, identifier: bytes) -> ObjectRef[Any]:
        """The reference that was just unpickled here."""
        self.born.append(identifier)
        return counted(identifier, self)

    def count_up(self, identifier: bytes) -> None:
        """One more `ObjectRef` instance of an object that may not have been held here before."""
        self.born.append(identifier)

    def release_at_once(self, identifier: bytes) -> None:
        """Have the raylet told as soon as the last reference is gone, not along with the next message."""
        self._large.add(identifier)

    def keep_forever(self, identifier: bytes) -> None:
        """The user pickled a reference: hpcray cannot see where it goes. Blocks until the raylet holds it."""
        self.send(m.KeepForever([identifier]))
        # What created the object may still lie in our socket when another process unpickles the reference and asks for it.
        self.query("ping", None)

    def new_task_id(self) -> bytes:
        """The id of a new task or put; its home is this client's raylet."""
        with self._lock:
            self._counter += 1
            return ids.task_id(self.prefix, self._counter)

    def submit(
        self, message: m.Submit | m.Call | m.CreateActor | m.AwaitPlacementGroup, returns: Sequence[bytes]
    ) -> list[ObjectRef[Any]]:
        """Send what makes objects; the references of these."""
        with self._lock:
            counts = self._counts
            for identifier in returns:
                counts[identifier] = 1
            if self.is_driver and not isinstance(message, m.CreateActor):
                self._coming.update(returns)
                if isinstance(message, m.AwaitPlacementGroup) or not self._lanes.take(message, returns):
                    self._send_locked(message)
            else:
                self._send_locked(message)
        return [counted(identifier, self) for identifier in returns]

    def kill(self, actor: bytes, *, no_restart: bool) -> None:
        """End an actor; later calls of this process find it ended."""
        with self._lock:
            self._lanes.on_kill(actor)
            self._send_locked(m.Kill(actor, no_restart))

    # ---------------------------------------------------------------------------------------------------- definitions
    def define(self, identifier: bytes, blob: bytes) -> None:
        """Make a function, class or job configuration known; sent once per process."""
        with self._lock:  # another thread that finds it defined may name it at once
            if identifier not in self._defined:
                self._defined.add(identifier)
                if not self.is_driver:
                    self.blobs[identifier] = blob  # the raylet will not send back what came from here
                self._send_locked(m.Define(identifier, blob))

    def define_template(self, identifier: bytes, template: m.Template) -> None:
        """Make a template known; what it names was defined before."""
        with self._lock:
            if identifier not in self._defined:
                self._defined.add(identifier)
                self.templates[identifier] = template
                self._send_locked(m.DefineTemplate(identifier, template))

    # -------------------------------------------------------------------------------------------------------- objects
    def put(self, value: Serialized) -> ObjectRef[Any]:
        """Store a value. Blocks while a full store makes room.

        Raises:
            ObjectStoreFullError: No room came in time.
        """
        identifier = ids.object_id(self.new_task_id(), 0)
        if value.size <= self.inline_limit:
            data = value.to_bytes()
            self._values[identifier] = data
            message: m.PutInline | m.Seal = m.PutInline(identifier, data, value.nested)
        else:
            self.write_to_arena(identifier, value)
            self._large.add(identifier)
            message = m.Seal(identifier, value.nested, *_call_site())
        with self._lock:
            self._counts[identifier] = 1
            self._send_locked(message)
        return counted(identifier, self)

    def write_to_arena(self, identifier: bytes, value: Serialized) -> None:
        """Reserve memory for a large object and copy it there; whoever calls this tells the raylet that it is written."""
        self._reservations[identifier] = None
        try:
            self.send(m.Reserve(identifier, value.size))
            self.wait_until(lambda: self._reservations[identifier] is not None, None)
            offset = self._reservations[identifier]
            if isinstance(offset, int):
                self._arenas[self.rank].write(offset, value.parts)
        except BaseException:
            # Ctrl-C, or the kernel has no page to give. The memory, come or still to come, would be kept for ever.
            self.send(m.Unreserve(identifier))
            raise
        finally:
            del self._reservations[identifier]
        if isinstance(offset, bytes):
            raise load_error(offset)

    def get(self, identifiers: Sequence[bytes], timeout: float | None) -> list[Any]:
        """The values of objects, in order; the first that is an error is raised.

        Raises:
            GetTimeoutError: Not all came in time.
        """
        try:
            self.fetch(identifiers, timeout)
            return [self._load(identifier) for identifier in identifiers]
        except BaseException:
            self._let_go(identifiers)
            raise

    def _let_go(self, identifiers: Sequence[bytes]) -> None:
        """After a failure: values that nobody looks at keep no memory, and what there was no room for is asked for anew."""
        if self._blocked or self._futures:
            return  # others of this process may be waiting for the same
        with self._lock:
            for identifier in identifiers:
                value = self._values.get(identifier)
                if isinstance(value, _Stored):
                    if value.views == 0:
                        del self._values[identifier]
                        self._pending.append(m.Unpin([identifier]))
                elif value is not None and _means_no_room(value):
                    del self._values[identifier]
        self._flush_soon()

    def fetch(self, identifiers: Sequence[bytes], timeout: float | None) -> None:
        """Block until the values of all these objects are at hand."""
        values = self._values
        missing = [identifier for identifier in dict.fromkeys(identifiers) if identifier not in values]
        if not missing:
            return
        self._check_job(missing)
        deadline = None if timeout is None else monotonic() + timeout

        def complete() -> bool:
            while missing and missing[-1] in values:
                missing.pop()
            return not missing

        self._enter_blocking()
        try:
            with self._lock:
                coming = [identifier for identifier in missing if identifier in self._coming]
                for identifier in coming:
                    self._getting[identifier] = self._getting.get(identifier, 0) + 1
                asked = missing if not coming else [i for i in missing if i not in self._coming and i not in values]
                if asked:
                    self._send_locked(m.Get(list(asked), not self.is_driver))
                elif self._dead and not self._lanes.unregistered:
                    self._send_locked(None)
            try:
                arrived = self.wait_until(complete, deadline)
                if not arrived:
                    self._settle()
                    arrived = complete()
            finally:
                self._stop_getting(coming)
            if not arrived:
                if self._blocked == 1 and not self._futures:
                    # It takes back all that was asked for, so not while others of this process wait for theirs.
                    self.send(m.StopGetting())
                raise GetTimeoutError(
                    f"get() timed out after {timeout} s: {len(missing)} of {len(identifiers)} objects are not ready, "
                    f"ObjectRef({missing[-1].hex()}) among them; they may still come, and get() may be called again"
                )
        finally:
            self._leave_blocking()

    def _stop_getting(self, identifiers: list[bytes]) -> None:
        with self._lock:
            for identifier in identifiers:
                left = self._getting[identifier] - 1
                if left:
                    self._getting[identifier] = left
                else:
                    del self._getting[identifier]

    def _enter_blocking(self) -> None:
        self.before_blocking()
        self._blocked += 1

    def _leave_blocking(self) -> None:
        self._blocked -= 1
        # While another thread waits, what the raylet would send to an unblocked worker would be handed back at once.
        if not self.is_driver and not self._blocked:
            self.send(m.Unblocked())

    def _check_job(self, identifiers: Sequence[bytes]) -> None:
        nonce = ids.nonce_of(self.prefix)
        for identifier in identifiers:
            if ids.nonce_of(identifier) != nonce:
                raise ValueError(
                    f"ObjectRef({identifier.hex()}) belongs to a job that has ended (hpcray was shut down and initialised "
                    "again since): its value is gone"
                )

    def _load(self, identifier: bytes) -> Any:
        while True:
            with self._lock:
                value = self._values.get(identifier)
                if isinstance(value, _Stored):
                    value.views += 1
            if isinstance(value, _Stored):
                return self._load_view(value)
            if value is not None:
                return deserialize(value)
            # Its last view died, in another thread, between our fetch and now.
            self.fetch([identifier], None)

    def load_argument(self, value: m.Value) -> Any:
        """The value of a task's argument; arrays in an arena are views that keep its memory pinned."""
        if isinstance(value, m.InlineValue):
            return deserialize(value.data)
        stored = _Stored(value.id, value)
        stored.views = 1
        return self._load_view(stored)

    def _load_view(self, stored: _Stored) -> Any:
        place = stored.place
        arena = self._arenas[place.rank]
        arena.warm(place.offset, place.size)
        return deserialize(arena.pinned_view(place.offset, place.size, lambda: self._view_died(stored)))

    def _view_died(self, stored: _Stored) -> None:
        if self._generation == _generation and not self.is_closed:
            self._dead_views.append(stored)
            self._flush_soon(only_views=True)

    def wait(self, identifiers: Sequence[bytes], num_returns: int, timeout: float | None, *, fetch: bool) -> list[int]:
        """Block until `num_returns` of the objects exist (with `fetch`: are on this node); where the first of them stand.

        Returns:
            Indices into `identifiers`, in order; at most `num_returns`.
        """
        ready, values, watched = self._ready, self._values, self._watched
        existing: set[bytes] = set() if fetch else self._existing
        deadline = None if timeout is None else monotonic() + timeout
        found: list[int] = []

        def enough() -> bool:
            found.clear()
            for index, identifier in enumerate(identifiers):
                if identifier in values or identifier in ready or identifier in existing:
                    found.append(index)
                    if len(found) == num_returns:
                        return True
            return False

        if not enough():
            self._check_job(identifiers)
            self._enter_blocking()
            try:
                with self._lock:
                    self._fetching += fetch
                    coming = self._coming
                    new = [i for i in identifiers if not (i in watched or i in ready or i in values or i in coming)]
                    watched.update(new)
                    if new or not self.is_driver:
                        self._send_locked(m.Watch(new, fetch))
                try:
                    if not self.wait_until(enough, deadline):
                        self._settle()
                        enough()
                finally:
                    with self._lock:
                        self._fetching -= fetch
            finally:
                self._leave_blocking()
        return found

    def _settle(self) -> None:
        # A time-out of zero still deserves what the raylet has at hand: its answers precede the one to this ping.
        self.query("ping", None)

    def query(self, topic: str, arguments: Any) -> Any:
        """Ask raylet or GCS a question; blocks for the round trip.

        Raises:
            Exception: The error that the GCS answered with.
        """
        with self._lock:
            self._counter += 1
            number = self._counter
            self._send_locked(m.Query(number, topic, msgspec.msgpack.encode(arguments)))
        self.wait_until(lambda: number in self._answers, None)
        answer = self._answers.pop(number)
        if not answer.ok:
            raise load_error(answer.payload)
        return msgspec.msgpack.decode(answer.payload) if answer.payload else None

    def future(self, ref: ObjectRef[Any]) -> concurrent.futures.Future[Any]:
        """A future that a reading thread completes."""
        import concurrent.futures  # slow to import, and seldom needed

        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        identifier = ref.binary()
        # The future keeps the reference, or the object might be freed under it.
        future.hpcray_ref = ref  # type: ignore[attr-defined]
        with self._lock:
            self._futures.setdefault(identifier, []).append(future)
        if identifier in self._values:
            self._complete_futures(identifier)
        else:
            self.start_reader()
            self.send(m.Get([identifier], blocks=False))
        return future

    def _complete_futures(self, identifier: bytes) -> None:
        with self._lock:
            futures = self._futures.pop(identifier, [])
        if not futures:
            return
        try:
            value = self._load(identifier)
        except BaseException as error:
            for future in futures:
                future.set_exception(error)
        else:
            for future in futures:
                future.set_result(value)

    # -------------------------------------------------------------------------------------------------------- reading
    def wait_until(self, done: Callable[[], bool], deadline: float | None) -> bool:
        """Read messages until `done()`; False if the deadline (of `time.monotonic`) came first."""
        if done():
            return True
        self._busy += 1
        try:
            while not done():
                left = None if deadline is None else deadline - monotonic()
                if left is not None and left <= 0:
                    return False
                if self._read_lock.acquire(blocking=False):
                    self._read_as_leader(done, left)
                else:
                    self._follow(left)
            return True
        finally:
            self._busy -= 1

    def _read_as_leader(self, done: Callable[[], bool], seconds: float | None) -> None:
        try:
            if not done():
                self._pump(seconds)
        finally:
            self._read_lock.release()
            if self._followers:
                with self._turn:
                    self._turn.notify_all()

    def _follow(self, seconds: float | None) -> None:
        with self._turn:
            self._followers += 1
            try:
                # The leader looks at `_followers` after it let go of the lock: still taken here means that it will notify.
                if self._read_lock.acquire(blocking=False):
                    self._read_lock.release()
                else:
                    self._turn.wait(1.0 if seconds is None else min(seconds, 1.0))
            finally:
                self._followers -= 1

    def _pump(self, seconds: float | None) -> None:
        if self._has_lanes:
            self._pump_all(seconds)
            return
        if seconds is not None and not self._poller.poll(max(0.0, seconds) * 1000):
            return
        self._receive()

    def _receive(self) -> None:
        try:
            size, ancillary, _, _ = self._sock.recvmsg_into((self._received,), ANCILLARY_SIZE)
        except OSError as error:
            raise self._connection_lost() from error
        if not size:
            raise self._connection_lost()
        if ancillary:
            self._take_descriptors(ancillary)
        data = self._received[:size]
        buffer = self._buffer
        if not buffer and int.from_bytes(data[:LENGTH_SIZE], "big") == size - LENGTH_SIZE:
            self._dispatch(data[LENGTH_SIZE:])
            return
        buffer += data
        self._dispatch_all(split_stream(buffer))

    def _pump_all(self, seconds: float | None) -> None:
        raylet = False
        for descriptor, _ in self._poller.poll(None if seconds is None else max(0.0, seconds) * 1000):
            if descriptor == self._sock.fileno():
                raylet = True
            elif self.is_driver:
                with self._lock:
                    self._lanes.read(descriptor)
            else:
                self.served.read(descriptor)
        self._complete_arrived()
        if raylet:
            self._receive()

    def _take_descriptors(self, ancillary: list[tuple[int, int, bytes]]) -> None:
        for _, kind, data in ancillary:
            if kind == socket.SCM_RIGHTS:
                descriptors = array.array("i")
                descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
                self._descriptors.extend(descriptors)

    def _dispatch(self, frame: bytes | memoryview) -> None:
        handlers = self._handlers
        messages = iter(decode_from_raylet(frame))
        try:
            for message in messages:
                handlers[type(message)](message)
        except EnvironmentAsked:
            self._unread = stream_frame(list(messages))
            raise

    def _dispatch_all(self, frames: list[bytes]) -> None:
        for index, frame in enumerate(frames):
            try:
                self._dispatch(frame)
            except EnvironmentAsked:
                self._unread += b"".join(map(prefixed, frames[index + 1 :]))
                raise

    def start_reader(self) -> None:
        """Have a thread read what comes while no other thread does."""
        if self._reader is None:
            self._reader = threading.Thread(target=self._read_in_background, name="hpcray-reader", daemon=True)
            self._reader.start()

    def _read_in_background(self) -> None:
        try:
            while not self.is_closed:
                self._watcher.poll()
                if self._busy:
                    # Whoever waits reads for itself; looking again at once would cost it the interpreter's lock.
                    threading.Event().wait(READER_PAUSE)
                    continue
                if self._read_lock.acquire(blocking=False):
                    self._read_as_leader(lambda: False, 0)
        except RaySystemError:
            self._fail_futures()
        except Exception:
            if not self.is_closed:
                self._fail_futures()
                raise  # a bug: better said than waited for

    def _fail_futures(self) -> None:
        with self._lock:
            futures = [future for group in self._futures.values() for future in group]
            self._futures.clear()
        for future in futures:
            future.set_exception(self._connection_lost())

    def _connection_lost(self) -> Exception:
        if self._refusal is not None:
            return RuntimeError(self._refusal)
        return RaySystemError("the connection to this process's raylet is gone: the job has ended or its rank died")

    # ------------------------------------------------------------------------------------------------------- messages
    def _on_run(self, message: m.Run) -> None:
        self.inbox.append(message)
        if self._blocked:
            self.before_blocking()

    def may_start(self, work: m.Run) -> bool:
        """In workers: take the right to start (or to hand back) a task. False: the raylet has taken it back."""
        if work.is_behind:
            try:
                os.eventfd_read(self._tokens)
            except BlockingIOError:
                return False
        return True

    def _on_recalled(self, message: m.Recalled) -> None:
        recalled = set(message.tasks)
        with contextlib.suppress(IndexError):  # others may be taking from it
            for _ in range(len(self.inbox)):
                work = self.inbox.popleft()
                if work.task not in recalled:
                    self.inbox.append(work)
        self.send(m.RecallDone())

    def _on_inline_object(self, message: m.InlineObject) -> None:
        if message.id in self._counts:
            self._values[message.id] = message.data
        self._coming.discard(message.id)
        if self.is_driver:
            with self._lock:
                self._lanes.on_answered(message.id)
        if self._futures:
            self._complete_futures(message.id)

    def _on_stored_object(self, message: m.StoredObject) -> None:
        with self._lock:
            if message.id in self._values:
                self._pending.append(m.Unpin([message.id]))
            else:
                self._values[message.id] = _Stored(message.id, message)
        self._large.add(message.id)
        if self._futures:
            self._complete_futures(message.id)

    def _on_exists(self, message: m.Exists) -> None:
        with self._lock:
            self._coming.difference_update(message.ids)
            self._existing.update(message.ids)
            self._large.update(message.ids)
            for identifier in message.ids:
                self._lanes.on_answered(identifier)
            if wanted := [identifier for identifier in message.ids if identifier in self._getting]:
                self._send_locked(m.Get(wanted, blocks=False))
            if self._fetching:
                self._watched.update(message.ids)
                self._send_locked(m.Watch(message.ids, fetch=True))

    def _on_ready(self, message: m.Ready) -> None:
        self._ready.update(message.ids)
        self._watched.difference_update(message.ids)

    def _on_reserved(self, message: m.Reserved) -> None:
        self._on_reservation(message.id, message.offset)

    def _on_reserve_failed(self, message: m.ReserveFailed) -> None:
        self._on_reservation(message.id, message.error)

    def _on_reservation(self, identifier: bytes, answer: int | bytes) -> None:
        if identifier in self._reservations:  # else it was given up meanwhile
            self._reservations[identifier] = answer

    def _on_answer(self, message: m.Answer) -> None:
        then = self._pings.pop(message.number, None)
        if then is not None:
            with self._lock:
                then()
            return
        self._answers[message.number] = message

    def _on_define(self, message: m.Define) -> None:
        self.blobs[message.id] = message.blob

    def _on_define_template(self, message: m.DefineTemplate) -> None:
        self.templates[message.id] = message.template
        if message.template.environment != self.environments.present.id:
            raise EnvironmentAsked(message.template)

    def _on_registered(self, message: m.Registered) -> None:
        self._registered = message
        self.rank = message.rank
        self.host = message.host
        self.prefix = message.prefix
        self.job = message.job
        self.job_definition = message.definition
        self.namespace = message.namespace
        self.inline_limit = message.inline_limit
        self._arenas[message.rank] = Arena.attach(self._descriptors.popleft())
        if not self.is_driver:
            self._tokens = self._descriptors.popleft()
            os.set_inheritable(self._tokens, False)

    def _on_assign_gpus(self, message: m.AssignGpus) -> None:
        self._gpus = message
        self.on_gpus(message)

    def _on_refused(self, message: m.Refused) -> None:
        self._refusal = message.reason

    def _on_map_arena(self, message: m.MapArena) -> None:
        self._arenas[message.rank] = Arena.attach(self._descriptors.popleft())

    # ---------------------------------------------------------------------------------------------------------- lanes
    def _on_lane_opened(self, message: m.LaneOpened) -> None:
        with self._lock:
            self._lanes.on_opened(message.lane, self._descriptors.popleft())

    def _on_lane_closed(self, message: m.LaneClosed) -> None:
        with self._lock:
            self._lanes.on_closed(message.lane, message.error)
        self._complete_arrived()

    def _on_lane_wanted(self, message: m.LaneWanted) -> None:
        with self._lock:
            self._lanes.on_wanted(message.lane)

    def _complete_arrived(self) -> None:
        if self._arrived:
            arrived, self._arrived = self._arrived, []
            for identifier in arrived:
                self._complete_futures(identifier)

    def _on_serve_lane(self, message: m.ServeLane) -> None:
        self.served.add(message, self._descriptors.popleft())

    def watch(self, descriptor: int) -> None:
        """Read a lane from now on."""
        self._poller.register(descriptor, select.POLLIN)
        self._watcher.register(descriptor, select.EPOLLIN)
        self._has_lanes = True

    def unwatch(self, descriptor: int) -> None:
        """Not any more."""
        self._poller.unregister(descriptor)
        self._watcher.unregister(descriptor)

    def readable(self) -> list[int]:
        """Descriptors, the raylet's among them, that can be read at once."""
        return [descriptor for descriptor, _ in self._poller.poll(0)]

    def _on_exit(self, message: m.Exit) -> None:
        self.exit_asked = True

    # ---------------------------------------------------------------------------------------- another interpreter's turn
    def hand_over(self, without: Collection[bytes]) -> tuple[bytes, list[int], int]:
        """In a worker that has run nothing yet: what the one that takes its place has to be told.

        Args:
            without: Definitions that it does not need.

        Returns:
            Frames, the descriptors that go with them, and the socket's. All stay open here.
        """
        assert self._registered is not None
        others = {rank: arena for rank, arena in self._arenas.items() if rank != self.rank}
        known = [
            self._registered,
            *([self._gpus] if self._gpus is not None else []),
            *(m.MapArena(rank, arena.size) for rank, arena in others.items()),
            *(m.Define(identifier, blob) for identifier, blob in self.blobs.items() if identifier not in without),
            *(m.DefineTemplate(identifier, template) for identifier, template in self.templates.items()),
        ]
        own = [self._arenas[self.rank].fd, self._tokens]
        descriptors = [*own, *(arena.fd for arena in others.values()), *self._descriptors]
        return stream_frame(known) + self._unread + bytes(self._buffer), descriptors, self._sock.fileno()

    def resume(self, frames: bytes, descriptors: Iterable[int]) -> None:
        """In the worker that takes another's place: the inverse of `hand_over`."""
        self._descriptors.extend(descriptors)
        self._buffer += frames
        self._dispatch_all(split_stream(self._buffer))

    # ------------------------------------------------------------------------------------------------------------ end
    def drain_logs(self) -> None:
        """Handle what the raylet has sent so far, the lines of tasks that have been got among it."""
        with contextlib.suppress(Exception):
            self.query("ping", None)

    def close(self) -> None:
        """Close the connection. Values that were got before stay readable; references mean nothing any more."""
        self.is_closed = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        if self._reader is not None and self._reader is not threading.current_thread():
            self._reader.join(timeout=5)
        self._lanes.close()
        self._watcher.close()
        self._sock.close()
        for arena in self._arenas.values():
            arena.close()


def _call_site() -> tuple[str, int]:
    """File and line of the user's code that called into hpcray."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("hpcray."):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def _means_no_room(value: bytes) -> bool:
    return value[0] == payload.SYSTEM_ERROR and payload.describe_system_error(value)[0] == "ObjectStoreFullError"


class _LanesOut:
    """What the lanes of a driver do to its client, whose lock they hold."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.watch = client.watch
        self.unwatch = client.unwatch

    def later(self, message: Any) -> None:
        self._client._pending.append(message)

    def flush(self) -> None:
        self._client._send_locked(None)

    def arrived(self, identifier: bytes, data: bytes) -> None:
        client = self._client
        if identifier in client._counts:
            client._values[identifier] = data
        client._coming.discard(identifier)
        if client._futures:
            client._arrived.append(identifier)

    def value_of(self, identifier: bytes) -> bytes:
        value = self._client._values[identifier]
        assert isinstance(value, bytes)
        return value

    def ping(self, then: Callable[[], None]) -> None:
        client = self._client
        client._counter += 1
        client._pings[client._counter] = then
        client._send_locked(m.Query(client._counter, "ping", b""))


_current: Client | None = None


def set_client(client: Client | None) -> None:
    """Make this the process's connection."""
    global _current
    _current = client
    adopt_for(client)


def current_client() -> Client | None:
    """The process's connection, if it has one."""
    return _current


def require_client() -> Client:
    """The process's connection; a driver without one is initialised, as in Ray.

    Raises:
        RuntimeError: The connection is that of the process which this one was forked from.
    """
    if _current is None:
        from hpcray.api import init

        init()
        assert _current is not None
    _current.check_process()
    return _current
