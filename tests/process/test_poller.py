"""The event loop on real descriptors and threads."""

from __future__ import annotations

import os
import signal
import socket
import threading
from time import monotonic
from typing import TYPE_CHECKING

import pytest

from hpcray.transport.poller import EventLoop

if TYPE_CHECKING:
    from collections.abc import Iterator


class RecordingTransport:
    """Says what it is told to say, and records how the loop calls it."""

    def __init__(self, limits: list[float | None], busy_turns: int = 0) -> None:
        self.calls: list[str] = []
        self._limits = limits
        self._busy_turns = busy_turns

    def progress(self) -> bool:
        self.calls.append("progress")
        self._busy_turns -= 1
        return self._busy_turns >= 0

    def prepare_sleep(self) -> float | None:
        self.calls.append("prepare_sleep")
        return self._limits.pop(0)

    def woke(self) -> None:
        self.calls.append("woke")


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    loop = EventLoop()
    yield loop
    loop.close()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    yield ours, theirs
    ours.close()
    theirs.close()


def nothing() -> None:
    pass


def run(loop: EventLoop, *, at_most: float = 5.0) -> None:
    def fail() -> None:
        raise TimeoutError("the loop was not stopped")

    timer = loop.call_at(monotonic() + at_most, fail)
    try:
        loop.run(None, nothing)
    finally:
        timer.cancel()


def test_a_reader_is_called_when_there_is_something_to_read(
    loop: EventLoop, pair: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = pair
    got: list[bytes] = []

    def read() -> None:
        got.append(ours.recv(100))
        loop.stop()

    loop.add_reader(ours.fileno(), read)
    theirs.send(b"hello")
    run(loop)
    assert got == [b"hello"]


def test_a_reader_is_called_at_the_end_of_its_peer(loop: EventLoop, pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    loop.add_reader(ours.fileno(), loop.stop)
    theirs.close()
    run(loop)
    assert ours.recv(1) == b""


def test_both_directions_of_one_descriptor_come_and_go_independently(
    loop: EventLoop, pair: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = pair
    calls: list[str] = []

    def written() -> None:
        calls.append("writer")
        loop.set_writer(ours.fileno(), None)
        theirs.send(b"x")

    def read() -> None:
        calls.append("reader")
        ours.recv(1)
        loop.remove_reader(ours.fileno())
        loop.set_writer(ours.fileno(), written_again)

    def written_again() -> None:
        calls.append("writer again")
        loop.set_writer(ours.fileno(), None)
        loop.stop()

    loop.add_reader(ours.fileno(), read)
    loop.set_writer(ours.fileno(), written)
    run(loop)
    assert calls == ["writer", "reader", "writer again"]


def test_a_reader_may_be_replaced_and_removed_twice(loop: EventLoop, pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    loop.add_reader(ours.fileno(), lambda: pytest.fail("the old reader was called"))
    loop.add_reader(ours.fileno(), loop.stop)
    theirs.send(b"x")
    run(loop)
    loop.remove_reader(ours.fileno())
    loop.remove_reader(ours.fileno())
    loop.set_writer(ours.fileno(), None)


def test_a_reader_that_another_callback_removed_in_the_same_turn_is_not_called(loop: EventLoop) -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    calls: list[int] = []

    def reader(index: int) -> None:
        calls.append(index)
        loop.remove_reader(pairs[1 - index][0].fileno())
        loop.stop()

    for index, (ours, theirs) in enumerate(pairs):
        loop.add_reader(ours.fileno(), lambda index=index: reader(index))
        theirs.send(b"x")
    run(loop)
    assert len(calls) == 1
    for ours, theirs in pairs:
        ours.close()
        theirs.close()


def test_more_descriptors_than_one_turn_reports_are_all_served(loop: EventLoop) -> None:
    pairs = [socket.socketpair() for _ in range(150)]
    served: set[int] = set()

    def reader(index: int) -> None:
        served.add(index)
        if len(served) == len(pairs):
            loop.stop()

    for index, (ours, theirs) in enumerate(pairs):
        loop.add_reader(ours.fileno(), lambda index=index: reader(index))
        theirs.send(b"x")
    run(loop)
    for ours, theirs in pairs:
        ours.close()
        theirs.close()


def test_timers_run_in_the_order_of_their_times_and_not_before(loop: EventLoop) -> None:
    start = monotonic()
    ran: list[tuple[str, float]] = []

    def last() -> None:
        ran.append(("c", loop.now))
        loop.stop()

    loop.call_at(start + 0.02, last)
    loop.call_at(start + 0.01, lambda: ran.append(("b", loop.now)))
    loop.call_at(start - 1, lambda: ran.append(("a", loop.now)))
    run(loop)
    assert [name for name, _ in ran] == ["a", "b", "c"]
    assert ran[1][1] >= start + 0.01
    assert ran[2][1] >= start + 0.02


def test_a_timer_below_a_millisecond_is_not_rounded_up_to_one(loop: EventLoop) -> None:
    waits: list[float] = []
    for _ in range(20):
        when = monotonic() + 0.0003
        loop.call_at(when, loop.stop)
        run(loop)
        waits.append(monotonic() - when)
    assert min(waits) < 0.0007


def test_a_cancelled_timer_never_runs(loop: EventLoop) -> None:
    timer = loop.call_at(monotonic() + 0.01, lambda: pytest.fail("cancelled"))
    timer.cancel()
    timer.cancel()
    loop.call_at(monotonic() + 0.02, loop.stop)
    run(loop)


def test_cancelled_timers_do_not_pile_up(loop: EventLoop) -> None:
    for _ in range(10_000):
        loop.call_at(monotonic() + 3600, nothing).cancel()
    assert len(loop._timers) < 200


def test_a_timer_that_adds_a_due_timer_does_not_hold_up_the_turn(loop: EventLoop) -> None:
    turns = 0
    runs = 0

    def again() -> None:
        nonlocal runs
        runs += 1
        loop.call_at(0.0, again)

    def end_of_turn() -> None:
        nonlocal turns
        turns += 1
        if turns == 10:
            loop.stop()

    loop.call_at(0.0, again)
    loop.run(None, end_of_turn)
    assert runs == 10


def test_the_exception_of_a_callback_leaves_run_and_the_loop_can_go_on(loop: EventLoop) -> None:
    def fail() -> None:
        raise ValueError("from a timer")

    loop.call_at(0.0, fail)
    with pytest.raises(ValueError, match="from a timer"):
        run(loop)
    loop.call_at(0.0, loop.stop)
    run(loop)


def test_another_thread_wakes_the_loop(loop: EventLoop) -> None:
    ran_in: list[int] = []

    def callback() -> None:
        ran_in.append(threading.get_ident())
        if len(ran_in) == 100:
            loop.stop()

    def ask() -> None:
        for _ in range(100):
            loop.call_soon_threadsafe(callback)

    thread = threading.Thread(target=ask)
    thread.start()
    run(loop)
    thread.join()
    assert ran_in == [threading.get_ident()] * 100


def test_callbacks_behind_a_failing_one_of_another_thread_still_run(loop: EventLoop) -> None:
    def fail() -> None:
        raise ValueError("first")

    loop.call_soon_threadsafe(fail)
    loop.call_soon_threadsafe(loop.stop)
    with pytest.raises(ValueError, match="first"):
        run(loop)
    run(loop)


def test_a_signal_handler_wakes_the_loop(loop: EventLoop) -> None:
    previous = signal.signal(signal.SIGUSR1, lambda *_: loop.call_soon_threadsafe(loop.stop))
    killer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
    killer.start()
    try:
        run(loop)
    finally:
        killer.join()
        signal.signal(signal.SIGUSR1, previous)


def test_the_loop_asks_the_transport_before_it_sleeps_and_tells_it_afterwards(loop: EventLoop) -> None:
    transport = RecordingTransport(limits=[0, 0.0005, 0.002], busy_turns=1)
    turns = 0

    def end_of_turn() -> None:
        nonlocal turns
        turns += 1
        transport.calls.append("end")
        if turns == 5:
            loop.stop()

    loop.run(transport, end_of_turn)
    asleep = ["prepare_sleep", "woke", "progress", "end"]
    assert transport.calls == ["progress", "end"] * 2 + asleep * 3


def test_a_limit_of_none_sleeps_until_the_next_timer(loop: EventLoop) -> None:
    transport = RecordingTransport(limits=[None])
    loop.call_at(monotonic() + 0.02, loop.stop)
    loop.run(transport, nothing)
    assert transport.calls.count("prepare_sleep") == 1


def test_an_exception_during_the_sleep_leaves_the_transport_awake(loop: EventLoop) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    transport = RecordingTransport(limits=[None])
    previous = signal.signal(signal.SIGUSR1, interrupt)
    killer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
    killer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            loop.run(transport, nothing)
    finally:
        killer.join()
        signal.signal(signal.SIGUSR1, previous)
    assert transport.calls[-1] == "woke"
