"""The event loop of a rank process: sockets, timers and a polled transport, in one thread.

Rules:
  1. One turn: ready descriptors, transport, due timers, `end_of_turn`. Each does a bounded amount of work.
  2. The loop never sleeps without asking the transport, and the transport tests for traffic after it has
     announced the sleep, so no wake-up is lost between the test and the sleep.
  3. An exception of a callback leaves `run()`; the loop may be run again.
"""

from __future__ import annotations

import heapq
import os
import select
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpcray.transport import Transport

Callback = Callable[[], None]

# epoll.poll() allocates its result array at every call, so a small one is faster; the rest comes next turn.
_EVENTS_PER_TURN = 64
# epoll_wait counts whole milliseconds; shorter waits go through select(), which counts microseconds.
_EPOLL_RESOLUTION = 0.001
# Cancelled timers stay in the heap until due, unless there are more of them than this and than live ones.
_CANCELLED_TIMERS_KEPT = 64

_READABLE = select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR | select.EPOLLRDHUP
_WRITABLE = select.EPOLLOUT | select.EPOLLHUP | select.EPOLLERR


class Timer:
    """A callback that the loop will run once, unless it is cancelled before."""

    __slots__ = ("_callback", "_loop", "when")

    def __init__(self, loop: EventLoop, when: float, callback: Callback) -> None:
        self._loop = loop
        self._callback: Callback | None = callback
        self.when = when

    def cancel(self) -> None:
        """Never run the callback. Does nothing if it has run or was cancelled."""
        if self._callback is not None:
            self._callback = None
            self._loop._timer_cancelled()

    def _take(self) -> Callback | None:
        callback, self._callback = self._callback, None
        return callback


class EventLoop:
    """Runs callbacks when descriptors are ready, when timers are due, or when another thread asks.

    Descriptors are level-triggered and must be non-blocking: a callback may be called once too often when a
    descriptor's number is reused within one turn. A signal handler that wants the loop's attention uses
    `call_soon_threadsafe`, since Python resumes an interrupted wait.
    """

    def __init__(self) -> None:
        self.now = monotonic()
        self.longest_turn = 0.0
        """Seconds, sleep aside: for so long did a message have to wait. Whoever looks may set it back."""
        self._epoll = select.epoll()
        self._readers: dict[int, Callback] = {}
        self._writers: dict[int, Callback] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._timers_made = 0
        self._timers_cancelled = 0
        self._stopping = False
        self._soon: deque[Callback] = deque()
        self._wakeup_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.add_reader(self._wakeup_fd, self._run_soon)

    def add_reader(self, fd: int, callback: Callback) -> None:
        """Call `callback` while `fd` is readable, closed by its peer or in error. Replaces an earlier one."""
        known = fd in self._readers or fd in self._writers
        self._readers[fd] = callback
        self._update(fd, known=known)

    def remove_reader(self, fd: int) -> None:
        """Stop reading `fd`; do it before closing the descriptor. Does nothing if there was no reader."""
        if self._readers.pop(fd, None) is not None:
            self._update(fd, known=True)

    def set_writer(self, fd: int, callback: Callback | None) -> None:
        """Call `callback` while `fd` can be written; None to stop. Independent of the reader."""
        if callback is not None:
            known = fd in self._readers or fd in self._writers
            self._writers[fd] = callback
            self._update(fd, known=known)
        elif self._writers.pop(fd, None) is not None:
            self._update(fd, known=True)

    def _update(self, fd: int, *, known: bool) -> None:
        mask = (select.EPOLLIN if fd in self._readers else 0) | (select.EPOLLOUT if fd in self._writers else 0)
        if not mask:
            self._epoll.unregister(fd)
        elif known:
            self._epoll.modify(fd, mask)
        else:
            self._epoll.register(fd, mask)

    def call_at(self, when: float, callback: Callback) -> Timer:
        """Run `callback` at `when` seconds of `time.monotonic`, or in the next turn if that is past."""
        timer = Timer(self, when, callback)
        self._timers_made += 1
        heapq.heappush(self._timers, (when, self._timers_made, timer))
        return timer

    def _timer_cancelled(self) -> None:
        self._timers_cancelled += 1
        if self._timers_cancelled > max(_CANCELLED_TIMERS_KEPT, len(self._timers) // 2):
            self._timers = [entry for entry in self._timers if entry[2]._callback is not None]
            heapq.heapify(self._timers)
            self._timers_cancelled = 0

    def call_soon_threadsafe(self, callback: Callback) -> None:
        """Run `callback` in the loop's thread soon. From any thread, or from a signal handler."""
        self._soon.append(callback)
        os.eventfd_write(self._wakeup_fd, 1)

    def _run_soon(self) -> None:
        os.eventfd_read(self._wakeup_fd)
        try:
            for _ in range(len(self._soon)):
                self._soon.popleft()()
        except BaseException:
            os.eventfd_write(self._wakeup_fd, 1)  # for those behind the one that failed
            raise

    def stop(self) -> None:
        """Let `run()` return at the end of this turn, `end_of_turn` included."""
        self._stopping = True

    def close(self) -> None:
        """Free the loop's own descriptors. Those that were added stay open."""
        self._epoll.close()
        os.close(self._wakeup_fd)

    def run(self, transport: Transport | None, end_of_turn: Callback) -> None:
        """Block, turning until `stop()`. `end_of_turn` runs last in each turn: send what the turn produced.

        Raises:
            Exception: Whatever a callback raised; `end_of_turn` has not run then.
        """
        poll = self._epoll.poll
        readers = self._readers
        writers = self._writers
        busy = True
        self._stopping = False
        while not self._stopping:
            if busy:
                events = poll(0, _EVENTS_PER_TURN)
            elif transport is None:
                events = self._wait(None)
            else:
                limit = transport.prepare_sleep()
                try:
                    events = poll(0, _EVENTS_PER_TURN) if limit == 0 else self._wait(limit)
                finally:
                    transport.woke()
            self.now = monotonic()
            for fd, mask in events:
                if mask & _READABLE and (reader := readers.get(fd)) is not None:
                    reader()
                if mask & _WRITABLE and (writer := writers.get(fd)) is not None:
                    writer()
            busy = transport is not None and transport.progress()
            if self._timers and self._timers[0][0] <= self.now:
                self._run_due_timers()
            end_of_turn()
            turn = monotonic() - self.now
            if turn > self.longest_turn:
                self.longest_turn = turn

    def _wait(self, limit: float | None) -> list[tuple[int, int]]:
        if self._timers:
            until_timer = max(0.0, self._timers[0][0] - monotonic())
            limit = until_timer if limit is None else min(limit, until_timer)
        if limit is None or limit >= _EPOLL_RESOLUTION or limit <= 0:
            return self._epoll.poll(limit, _EVENTS_PER_TURN)
        select.select((self._epoll.fileno(),), (), (), limit)
        return self._epoll.poll(0, _EVENTS_PER_TURN)

    def _run_due_timers(self) -> None:
        newest = self._timers_made  # those that the callbacks add have to wait for the next turn
        while self._timers and self._timers[0][0] <= self.now and self._timers[0][1] <= newest:
            callback = heapq.heappop(self._timers)[2]._take()
            if callback is None:
                self._timers_cancelled -= 1
            else:
                callback()
