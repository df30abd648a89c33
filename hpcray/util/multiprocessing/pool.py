"""A pool of actors with the interface of `multiprocessing.pool.Pool`. Names and additions are Ray's.

Work goes to the actors in turn, in chunks, each a call whose result is a list of outcomes: values, or `Failure`s. No thread is
needed but for callbacks, of which each result with callbacks has one while it is awaited.
"""

from __future__ import annotations

import functools
import itertools
import os
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing import TimeoutError  # noqa: A004 - the one that callers of a Pool catch
from multiprocessing.pool import ExceptionWithTraceback  # type: ignore[attr-defined]
from time import monotonic
from types import TracebackType
from typing import Any

import hpcray
from hpcray.actors.actor_class import ActorClass
from hpcray.actors.handle import ActorHandle
from hpcray.exceptions import RayError
from hpcray.launcher.environment import DRIVER_SOCKET
from hpcray.launcher.roles import detect_launch
from hpcray.object_ref import ObjectRef

CHUNKS_PER_PROCESS = 4
"""Into how many chunks each process's share of a `map` is cut, as in multiprocessing."""
_MISSING = object()


class Failure:
    """The outcome of a call that raised."""

    def __init__(self, error: Exception) -> None:
        self.error = error


# ------------------------------------------------------------------------------------------------------------ in the actors
class PoolActor:
    """One process of a pool."""

    def __init__(self, initializer: Callable[..., Any] | None, initargs: Iterable[Any]) -> None:
        self._globals: dict[str, Any] = {}
        if initializer is not None:
            names: dict[str, Any] = getattr(initializer, "__globals__", {})
            before = dict(names)
            initializer(*initargs)
            self._globals = {name: value for name, value in names.items() if before.get(name, _MISSING) is not value}

    def ready(self) -> None:
        """Answers when the initializer is through."""

    def run(self, function: Callable[..., Any], calls: Sequence[tuple[Any, Any]]) -> list[Any]:
        """The outcomes of a chunk of calls."""
        self._share_globals(function)
        outcomes: list[Any] = []
        for arguments, options in calls:
            try:
                outcomes.append(function(*arguments, **options))
            except Exception as error:
                # Becomes the exception again when it is unpickled, with the traceback as its cause.
                outcomes.append(Failure(ExceptionWithTraceback(error, error.__traceback__)))
        return outcomes

    def _share_globals(self, function: Any) -> None:
        # Functions of `__main__` arrive with globals of their own each; a program that sets some in its initializer expects
        # to find them in the function, as it would in one process.
        while isinstance(function, functools.partial):
            function = function.func
        function = getattr(function, "__func__", function)
        if getattr(function, "__module__", None) == "__main__":
            getattr(function, "__globals__", {}).update(self._globals)


# --------------------------------------------------------------------------------------------------------------- results
class AsyncResult:
    """What `apply_async` and `map_async` return."""

    def __init__(
        self,
        refs: list[ObjectRef[Any]],
        callback: Callable[[Any], Any] | None,
        error_callback: Callable[[Exception], Any] | None,
        *,
        is_single: bool,
    ) -> None:
        self._refs = refs
        self._is_single = is_single
        self._thread: threading.Thread | None = None
        if callback is not None or error_callback is not None:
            self._thread = threading.Thread(
                target=self._call_back, args=(callback, error_callback), name="hpcray-pool-callback", daemon=True
            )
            self._thread.start()

    def wait(self, timeout: float | None = None) -> None:
        """Block until the result exists and callbacks have been called, or for `timeout` seconds."""
        if self._thread is not None:
            self._thread.join(timeout)
        elif self._refs:
            hpcray.wait(self._refs, num_returns=len(self._refs), timeout=None if timeout is None else max(0.0, timeout))

    def ready(self) -> bool:
        """Whether `get` would not wait."""
        if self._thread is not None:
            return not self._thread.is_alive()
        return not self._refs or not hpcray.wait(self._refs, num_returns=len(self._refs), timeout=0)[1]

    def get(self, timeout: float | None = None) -> Any:
        """The result. Blocks until it exists.

        Args:
            timeout: Seconds; None waits for ever.

        Raises:
            multiprocessing.TimeoutError: The time is over; nothing is lost.
            Exception: What the first of the calls that failed raised.
            RayActorError: A process of the pool died.
        """
        self.wait(timeout)
        if not self.ready():
            raise TimeoutError
        return self._value()

    def _value(self) -> Any:
        values = [_value_of(outcome) for chunk in hpcray.get(self._refs) for outcome in chunk]
        return values[0] if self._is_single else values

    def successful(self) -> bool:
        """Whether no call raised.

        Raises:
            ValueError: The result does not exist yet.
        """
        if not self.ready():
            raise ValueError(f"{self!r} not ready")
        try:
            self._value()
        except Exception:
            return False
        return True

    def _call_back(
        self, callback: Callable[[Any], Any] | None, error_callback: Callable[[Exception], Any] | None
    ) -> None:
        try:
            value = self._value()
        except Exception as error:
            if error_callback is not None:
                error_callback(error)
        else:
            if callback is not None:
                callback(value)


def _value_of(outcome: Any) -> Any:
    if isinstance(outcome, Failure):
        raise outcome.error
    return outcome


class IMapIterator:
    """What `imap` and `imap_unordered` return. Reads its iterable as results come: a chunk for each process is under way.

    Not for several threads at once.
    """

    def __init__(
        self, pool: Pool, function: Callable[..., Any], values: Iterable[Any], chunksize: int, *, is_ordered: bool
    ) -> None:
        self._pool = pool
        self._function = function
        self._chunks = _chunks(((value,) for value in values), chunksize)
        self._is_ordered = is_ordered
        self._order: deque[ObjectRef[Any]] = deque()
        """Chunks whose outcomes were not taken, in the order of submission."""
        self._under_way: dict[ObjectRef[Any], int] = {}
        """Those of them that are not done, and the process that each is at."""
        self._outcomes: deque[Any] = deque()
        for process in range(pool.processes):
            self._submit(process)

    def _submit(self, process: int) -> None:
        chunk = next(self._chunks, None)
        if chunk is not None:
            ref = self._pool.run_chunk(self._function, chunk, process)
            self._order.append(ref)
            self._under_way[ref] = process

    def __iter__(self) -> IMapIterator:
        return self

    def next(self, timeout: float | None = None) -> Any:
        """The next result. Blocks until it exists.

        Raises:
            StopIteration: There are no more.
            multiprocessing.TimeoutError: `timeout` seconds are over; nothing is lost.
            Exception: What the call raised; the iterator goes on behind it.
        """
        deadline = None if timeout is None else monotonic() + timeout
        while not self._outcomes:
            if not self._order:
                raise StopIteration
            self._take(None if deadline is None else max(0.0, deadline - monotonic()))
        return _value_of(self._outcomes.popleft())

    def __next__(self) -> Any:
        return self.next()

    def _take(self, seconds: float | None) -> None:
        done = self._order[0]
        if not self._is_ordered or done in self._under_way:
            ready, _ = hpcray.wait(list(self._under_way), num_returns=1, timeout=seconds)
            if not ready:
                raise TimeoutError
            self._submit(self._under_way.pop(ready[0]))
            if self._is_ordered and ready[0] != done:
                return
            done = ready[0]
        self._order.remove(done)
        self._outcomes.extend(_outcomes_of(done))


def _outcomes_of(ref: ObjectRef[Any]) -> list[Any]:
    try:
        outcomes: list[Any] = hpcray.get(ref)
    except RayError as error:
        return [Failure(error)]
    return outcomes


def _chunks(arguments: Iterable[Any], chunksize: int) -> Iterator[list[tuple[Any, Any]]]:
    remaining = iter(arguments)
    while chunk := list(itertools.islice(remaining, chunksize)):
        yield [(values, {}) for values in chunk]


# -------------------------------------------------------------------------------------------------------------- the pool
class Pool:
    """A pool of processes on all nodes of the job. Starts a job if there is none; blocks until all processes are there.

    Args:
        processes: How many; None: as many as the job has CPUs.
        initializer: Called in each process before any work. What it sets as globals of `__main__` is there for the work.
        initargs: Its arguments.
        maxtasksperchild: After so many chunks a process is replaced by a new one.
        context: Has no meaning here.
        ray_address: As `address` of `init`, where there is no job yet.
        ray_remote_args: Options of the actors, as for `hpcray.remote`. By default they are spread over the nodes.

    Raises:
        ValueError: No processes, or more than the job has CPUs.
        RayActorError: The initializer raised.
    """

    def __init__(
        self,
        processes: int | None = None,
        initializer: Callable[..., Any] | None = None,
        initargs: Iterable[Any] | None = None,
        maxtasksperchild: int | None = None,
        context: Any = None,
        ray_address: str | None = None,
        ray_remote_args: Mapping[str, Any] | None = None,
    ) -> None:
        if context is not None:
            warnings.warn("the context of a Pool has no meaning in hpcray", stacklevel=2)
        self.processes = _count(processes, ray_address)
        options = {"scheduling_strategy": "SPREAD", **(ray_remote_args or {})}
        self._actor_class: ActorClass = hpcray.remote(**options)(PoolActor)
        self._start_arguments = (initializer, list(initargs or ()))
        self._maxtasksperchild = maxtasksperchild
        self._is_running = True
        self._outstanding: dict[ObjectRef[Any], ActorHandle] = {}
        """Chunks that may not be done. The handle keeps an actor that was replaced until they are."""
        self._next = itertools.cycle(range(self.processes))
        self._actors = [self._start_actor() for _ in range(self.processes)]
        self._chunks_run = [0] * self.processes
        hpcray.get([actor.ready.remote() for actor in self._actors])

    def _start_actor(self) -> ActorHandle:
        return self._actor_class.remote(*self._start_arguments)

    def run_chunk(
        self, function: Callable[..., Any], calls: Sequence[tuple[Any, Any]], process: int | None = None
    ) -> ObjectRef[Any]:
        """Have a process make some calls; a reference to the list of outcomes. For the iterators of this module."""
        if process is None:
            process = next(self._next)
        actor = self._actors[process]
        ref: ObjectRef[Any] = actor.run.remote(function, calls)
        self._forget_done()
        self._outstanding[ref] = actor
        self._chunks_run[process] += 1
        if self._chunks_run[process] == self._maxtasksperchild:
            self._actors[process] = self._start_actor()
            self._chunks_run[process] = 0
        return ref

    def _forget_done(self) -> None:
        # Now and then, lest looking costs more than running.
        if len(self._outstanding) >= 64 and len(self._outstanding).bit_count() == 1:
            for ref in hpcray.wait(list(self._outstanding), num_returns=len(self._outstanding), timeout=0)[0]:
                del self._outstanding[ref]

    def _check_running(self) -> None:
        if not self._is_running:
            raise ValueError("Pool not running")

    # -------------------------------------------------------------------------------------------------------------- calls
    def apply(
        self, func: Callable[..., Any], args: Iterable[Any] | None = None, kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function in one of the processes; its value. Errors as for `AsyncResult.get`."""
        return self.apply_async(func, args, kwargs).get()

    def apply_async(
        self,
        func: Callable[..., Any],
        args: Iterable[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        callback: Callable[[Any], Any] | None = None,
        error_callback: Callable[[Exception], Any] | None = None,
    ) -> AsyncResult:
        """Call a function in one of the processes. Does not block.

        Args:
            func: A function.
            args: Its arguments.
            kwargs: Those by name.
            callback: Called, in a thread, with the value.
            error_callback: Called, in a thread, with what the call raised.

        Raises:
            ValueError: The pool was closed.
        """
        self._check_running()
        ref = self.run_chunk(func, [(tuple(args or ()), dict(kwargs or {}))])
        return AsyncResult([ref], callback, error_callback, is_single=True)

    def map(self, func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int | None = None) -> list[Any]:
        """Call a function with each element; the list of values. Errors as for `AsyncResult.get`."""
        return self._map(func, iterable, chunksize, None, None, unpacks=False).get()  # type: ignore[no-any-return]

    def map_async(
        self,
        func: Callable[[Any], Any],
        iterable: Iterable[Any],
        chunksize: int | None = None,
        callback: Callable[[list[Any]], Any] | None = None,
        error_callback: Callable[[Exception], Any] | None = None,
    ) -> AsyncResult:
        """As `map`, but does not block; `callback` is called once, with all values."""
        return self._map(func, iterable, chunksize, callback, error_callback, unpacks=False)

    def starmap(
        self, func: Callable[..., Any], iterable: Iterable[Iterable[Any]], chunksize: int | None = None
    ) -> list[Any]:
        """As `map`; each element is all arguments of a call."""
        return self._map(func, iterable, chunksize, None, None, unpacks=True).get()  # type: ignore[no-any-return]

    def starmap_async(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Iterable[Any]],
        chunksize: int | None = None,
        callback: Callable[[list[Any]], Any] | None = None,
        error_callback: Callable[[Exception], Any] | None = None,
    ) -> AsyncResult:
        """As `starmap`, but does not block; `callback` is called once, with all values."""
        return self._map(func, iterable, chunksize, callback, error_callback, unpacks=True)

    def _map(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Any],
        chunksize: int | None,
        callback: Callable[[list[Any]], Any] | None,
        error_callback: Callable[[Exception], Any] | None,
        *,
        unpacks: bool,
    ) -> AsyncResult:
        self._check_running()
        values = [tuple(value) for value in iterable] if unpacks else [(value,) for value in iterable]
        if chunksize is None:
            chunksize = max(1, -(-len(values) // (self.processes * CHUNKS_PER_PROCESS)))
        refs = [self.run_chunk(func, chunk) for chunk in _chunks(values, _checked(chunksize))]
        return AsyncResult(refs, callback, error_callback, is_single=False)

    def imap(self, func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int | None = 1) -> IMapIterator:
        """Call a function with each element; an iterator of the values in order.

        Args:
            func: A function of one argument.
            iterable: May be endless: it is read as results come.
            chunksize: How many elements a process gets at a time.

        Raises:
            ValueError: The pool was closed, or `chunksize` is less than 1.
        """
        self._check_running()
        return IMapIterator(self, func, iterable, _checked(chunksize or 1), is_ordered=True)

    def imap_unordered(
        self, func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int | None = 1
    ) -> IMapIterator:
        """As `imap`, with the values in the order in which they come."""
        self._check_running()
        return IMapIterator(self, func, iterable, _checked(chunksize or 1), is_ordered=False)

    # ---------------------------------------------------------------------------------------------------------------- end
    def close(self) -> None:
        """Take no more work. What was submitted is done; then the processes end."""
        self._is_running = False
        self._actors = []  # an actor ends when nobody has a handle and its calls are done

    def terminate(self) -> None:
        """Kill the processes; what they had not done fails. Does not block."""
        for actor in {*self._actors, *self._outstanding.values()}:
            hpcray.kill(actor)
        self.close()
        self._outstanding.clear()

    def join(self) -> None:
        """Block until all that was submitted is done, or has failed.

        Raises:
            ValueError: The pool was not closed.
        """
        if self._is_running:
            raise ValueError("Pool is still running")
        if self._outstanding:
            hpcray.wait(list(self._outstanding), num_returns=len(self._outstanding))
            self._outstanding.clear()

    def __enter__(self) -> Pool:  # noqa: PYI034 - Self is not in Python 3.10
        self._check_running()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.terminate()


def _checked(chunksize: int) -> int:
    if chunksize < 1:
        raise ValueError(f"Chunksize must be 1+, not {chunksize}")
    return chunksize


def _count(processes: int | None, address: str | None) -> int:
    if processes is not None and processes <= 0:
        raise ValueError("Processes in the pool must be >0.")
    if not hpcray.is_initialized():
        # A job that runs already offers what it offers; one of its own gets a CPU for each process, as in Ray.
        joins = address not in (None, "local") or DRIVER_SOCKET in os.environ or detect_launch(os.environ).is_mpi
        hpcray.init(address, num_cpus=None if joins else processes)
    cpus = int(hpcray.cluster_resources().get("CPU", 0))
    if processes is None:
        processes = cpus
    if processes > cpus:
        raise ValueError(
            f"Tried to start a pool with {processes} processes on an existing ray cluster, but there are only {cpus} CPUs in "
            "the ray cluster."
        )
    return processes
