"""A `concurrent.futures.Executor` whose calls are tasks of the job."""

from __future__ import annotations

import functools
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, wait
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar

import hpcray
from hpcray.object_ref import ObjectRef

P = ParamSpec("P")
T = TypeVar("T")


class _Work:
    __slots__ = ("arguments", "function", "future", "options", "ref")

    def __init__(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any], future: Future[Any]
    ) -> None:
        self.function = function
        self.arguments = arguments
        self.options = options
        self.future = future
        self.ref: ObjectRef[Any] | None = None


class RayExecutor(Executor):
    """Runs calls as tasks on all nodes of the job; starts a job if there is none.

    One thread completes the futures, so what is added to them by `add_done_callback` may itself use hpcray. It must not wait
    for another future of the same executor.

    Args:
        max_workers: How many calls are under way at most. The others wait here, where they can still be cancelled. None: as
            many as there are; the job runs as many at a time as it has room for, and none can be cancelled.
        remote_options: Options of the tasks, as for `hpcray.remote`: `num_cpus=2`.

    Raises:
        ValueError: `max_workers` is less than 1, or an option is wrong.
    """

    def __init__(self, max_workers: int | None = None, **remote_options: Any) -> None:
        if max_workers is not None and max_workers <= 0:
            raise ValueError("max_workers must be greater than 0")
        task = hpcray.remote(_call)
        self._task = task.options(**remote_options) if remote_options else task
        self._max_workers = max_workers
        self._lock = threading.Lock()
        self._is_open = True
        self._waiting: deque[_Work] = deque()
        self._under_way: dict[int, _Work] = {}
        self._done: SimpleQueue[int | None] = SimpleQueue()
        """Work whose result exists, by the id of the future; None: look whether all is over."""
        self._thread: threading.Thread | None = None

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Have the job call `fn(*args, **kwargs)`. Blocks only to store large arguments.

        The future's `exception()` is what the call raised, as from `hpcray.get`.

        Raises:
            RuntimeError: The executor was shut down.
            TypeError: The function or an argument cannot be pickled.
        """
        future: Future[T] = Future()
        work = _Work(fn, args, kwargs, future)
        with self._lock:
            if not self._is_open:
                raise RuntimeError("cannot schedule new futures after shutdown")
            if self._thread is None:
                self._thread = threading.Thread(target=self._complete_all, name="hpcray-executor", daemon=True)
                self._thread.start()
            if self._max_workers is not None and len(self._under_way) >= self._max_workers:
                self._waiting.append(work)
                return future
            self._under_way[id(future)] = work
        try:
            self._start(work)
        except BaseException:
            with self._lock:
                del self._under_way[id(future)]
            raise
        return future

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        **more: Any,
    ) -> Iterator[T]:
        """As `Executor.map`; `chunksize` calls make one task.

        Raises:
            ValueError: `chunksize` is less than 1.
        """
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if chunksize == 1:
            return super().map(fn, *iterables, timeout=timeout, **more)
        chunks = _chunks(zip(*iterables, strict=False), chunksize)
        lists = super().map(functools.partial(_call_each, fn), chunks, timeout=timeout, **more)
        return itertools.chain.from_iterable(lists)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls. The job goes on.

        Args:
            wait: Block until all futures are done.
            cancel_futures: Cancel those whose calls wait here.
        """
        with self._lock:
            self._is_open = False
            while cancel_futures and self._waiting:
                future = self._waiting.popleft().future
                future.cancel()
                future.set_running_or_notify_cancel()
            futures = [work.future for work in (*self._waiting, *self._under_way.values())]
            thread = self._thread
        self._done.put(None)
        if wait:
            _wait(futures)
            if thread is not None and thread is not threading.current_thread():
                thread.join()

    def _start(self, work: _Work) -> bool:
        if not work.future.set_running_or_notify_cancel():
            return False
        work.ref = self._task.remote(work.function, *work.arguments, **work.options)
        number = id(work.future)
        # Completed by whichever thread reads the socket, which must not do more than this.
        work.ref.future().add_done_callback(lambda _: self._done.put(number))
        return True

    def _complete_all(self) -> None:
        while True:
            number = self._done.get()
            if number is not None:
                with self._lock:
                    work = self._under_way.pop(number)
                _complete(work.future, work.ref)
                del work  # or the last result would live as long as the executor
            self._start_waiting()
            with self._lock:
                if not (self._is_open or self._under_way or self._waiting):
                    return

    def _start_waiting(self) -> None:
        while True:
            with self._lock:
                if not self._waiting or len(self._under_way) >= (self._max_workers or 0):
                    return
                work = self._waiting.popleft()
                self._under_way[id(work.future)] = work
            try:
                is_started = self._start(work)
            except BaseException as error:  # an argument that cannot be pickled
                work.future.set_exception(error)
                is_started = False
            if not is_started:
                with self._lock:
                    del self._under_way[id(work.future)]


_wait = wait


def _complete(future: Future[Any], ref: ObjectRef[Any] | None) -> None:
    try:
        value = hpcray.get(ref)
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(value)


def _call(function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Any:
    return function(*arguments, **options)


def _call_each(function: Callable[..., T], chunk: list[tuple[Any, ...]]) -> list[T]:
    return [function(*arguments) for arguments in chunk]


def _chunks(values: Iterable[tuple[Any, ...]], size: int) -> Iterator[list[tuple[Any, ...]]]:
    remaining = iter(values)
    while chunk := list(itertools.islice(remaining, size)):
        yield chunk
