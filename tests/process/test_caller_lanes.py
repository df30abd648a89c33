"""Which calls go by a lane, and what the raylet must hear of them."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest

from hpcray.ids import object_id
from hpcray.lanes import MOST_LANES, OPEN_AFTER, CallerLanes
from hpcray.protocol import messages as m
from hpcray.protocol.codec import decode_from_raylet, split_stream, stream_frame

ACTOR = b"%024d" % 0
VALUE = b"\2value"


class Driver:
    """A client that only has lanes, and the other end of the one that was opened."""

    def __init__(self) -> None:
        self.lanes = CallerLanes(self)
        self.sent: list[Any] = []
        self.values: dict[bytes, bytes] = {}
        self.pings: list[Callable[[], None]] = []
        self.worker: socket.socket | None = None
        self._later: list[Any] = []
        self._calls = 0
        self._descriptor = -1

    # LanesOut
    def later(self, message: Any) -> None:
        self._later.append(message)

    def flush(self) -> None:
        self.say()

    def arrived(self, identifier: bytes, data: bytes) -> None:
        self.values[identifier] = data

    def value_of(self, identifier: bytes) -> bytes:
        return self.values[identifier]

    def ping(self, then: Callable[[], None]) -> None:
        self.pings.append(then)
        self.say("ping")

    def watch(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def unwatch(self, descriptor: int) -> None:
        assert descriptor == self._descriptor

    # What a test does
    def say(self, *messages: Any) -> None:
        """Send messages to the raylet, as the client does."""
        batch, self._later = [*self._later, *messages], []
        if batch:
            self.lanes.register(batch)
            self.sent += batch

    def call(self, *, num_returns: int = 1, actor: bytes = ACTOR, **fields: Any) -> bytes:
        """Call; the id of the return. By the raylet if not on a lane."""
        self._calls += 1
        task = b"%024d" % self._calls
        values: dict[str, Any] = {"arguments": b"", "dependencies": [], "nested": [], **fields}
        message = m.Call(task, actor, "method", num_returns=num_returns, **values)
        returns = [object_id(task, index + 1) for index in range(num_returns)]
        if not self.lanes.take(message, returns):
            self.say(message)
        return object_id(task, 1)

    def call_and_wait(self, actor: bytes = ACTOR) -> None:
        self.lanes.on_answered(self.call(actor=actor))

    def open(self) -> None:
        while not any(isinstance(message, m.OpenLane) for message in self.sent):
            self.call_and_wait()
        self.worker, theirs = socket.socketpair()
        self.lanes.on_opened(1, theirs.detach())
        self.sent.clear()

    def runs(self) -> list[bytes]:
        """Tasks that came to the worker on the lane."""
        assert self.worker is not None
        self.worker.setblocking(False)
        try:
            data = bytearray(self.worker.recv(1 << 16))
        except BlockingIOError:
            return []
        return [message.task for frame in split_stream(data) for message in decode_from_raylet(frame)]

    def reply(self, identifier: bytes, data: bytes | None = VALUE) -> None:
        assert self.worker is not None
        self.worker.sendall(stream_frame([m.LaneReply(identifier[:24], data)]))
        self.lanes.read(self._descriptor)


@pytest.fixture
def driver() -> Iterator[Driver]:
    driver = Driver()
    yield driver
    driver.lanes.close()
    if driver.worker is not None:
        driver.worker.close()


@pytest.fixture
def opened(driver: Driver) -> Driver:
    driver.open()
    return driver


def test_a_lane_is_asked_for_after_some_calls_that_were_waited_for(driver):
    for _ in range(OPEN_AFTER - 1):
        driver.call_and_wait()
    assert not any(isinstance(message, m.OpenLane) for message in driver.sent)
    driver.call_and_wait()
    assert m.OpenLane(1, b"", ACTOR) in driver.sent


def test_calls_that_are_not_waited_for_open_none(driver):
    for _ in range(5 * OPEN_AFTER):
        driver.call()
    assert not any(isinstance(message, m.OpenLane) for message in driver.sent)


def test_most_calls_end_without_the_raylet_having_heard_of_them(opened):
    for _ in range(10):
        returned = opened.call()
        assert opened.runs() == [returned[:24]]
        opened.reply(returned)
        assert opened.values[returned] == VALUE
        assert opened.lanes.on_dropped(returned)
    opened.say(m.StopGetting())
    assert opened.sent == [m.StopGetting()]


@pytest.mark.parametrize(
    "fields", [{"dependencies": [b"x"]}, {"nested": [b"x"]}, {"num_returns": 2}, {"num_returns": 0}]
)
def test_some_calls_go_by_the_raylets_and_others_behind_them_too(opened, fields):
    returned = opened.call(**fields)
    behind = opened.call()
    assert opened.runs() == []
    assert [message.task for message in opened.sent] == [returned[:24], behind[:24]]
    opened.lanes.on_answered(behind)
    assert opened.runs() == []
    opened.call()
    assert len(opened.runs()) == 1


def test_behind_a_call_on_the_lane_the_others_go_by_the_raylets(opened):
    first, second = opened.call(), opened.call()
    assert opened.runs() == [first[:24]]
    assert [(message.task, message.lane) for message in opened.sent] == [(first[:24], 1), (second[:24], 0)]
    opened.reply(first)
    assert opened.sent[-1] == m.LaneDone(first[:24], VALUE)
    opened.call()
    assert opened.runs() == [], "the second one is under way"


def test_nothing_goes_by_the_lane_behind_a_call_whose_reference_died(opened):
    returned = opened.call(nested=[b"x"])
    assert not opened.lanes.on_dropped(returned)
    opened.call()
    assert opened.runs() == []


def test_nothing_goes_by_the_lane_behind_a_kill(opened):
    opened.lanes.on_kill(ACTOR)
    opened.call()
    assert opened.runs() == []


def test_what_is_said_to_the_raylet_follows_what_it_may_mention(opened):
    answered = opened.call()
    opened.reply(answered)
    under_way = opened.call()
    opened.say(m.Release([b"x"]))
    put, call, release = opened.sent
    assert put == m.PutInline(answered, VALUE, [])
    assert (call.task, call.lane) == (under_way[:24], 1)
    assert release == m.Release([b"x"])
    assert not opened.lanes.on_dropped(answered), "the raylet holds it: it must be released"


def test_a_reference_that_dies_under_way_is_released_if_the_raylet_ever_hears_of_it(opened):
    returned = opened.call()
    assert opened.lanes.on_dropped(returned)
    opened.say(m.StopGetting())
    assert [type(message) for message in opened.sent] == [m.Call, m.Release, m.StopGetting]
    opened.reply(returned)
    assert opened.sent[-1] == m.LaneDone(returned[:24], VALUE)


def test_a_large_result_goes_by_the_raylets_and_the_lane_is_given_up(opened):
    returned = opened.call()
    opened.runs()
    opened.reply(returned, None)
    call, ping = opened.sent
    assert (call.task, call.lane, ping) == (returned[:24], 1, "ping")
    assert opened.runs() == []
    opened.pings.pop()()
    assert opened.runs() == [returned[:24]]
    opened.reply(returned, None)
    assert opened.sent[-1] == m.CloseLane(1)
    opened.call()
    assert opened.sent[-1].lane == 0


def test_a_wanted_lane_is_closed_when_its_call_is_over(opened):
    returned = opened.call()
    opened.lanes.on_wanted(1)
    assert m.CloseLane(1) not in opened.sent
    opened.reply(returned)
    assert opened.sent == [m.PutInline(returned, VALUE, []), m.CloseLane(1)]


@pytest.mark.parametrize("value", [VALUE, VALUE * 15_000], ids=["small", "of several reads"])
def test_what_a_dead_worker_had_answered_counts(opened, value):
    returned = opened.call()
    assert opened.worker is not None
    opened.worker.sendall(stream_frame([m.LaneReply(returned[:24], value)]))
    opened.worker.close()
    opened.lanes.on_closed(1, b"error")
    assert opened.values[returned] == value
    assert opened.sent[-1] == m.CloseLane(1)


@pytest.mark.parametrize("has_call", [True, False])
def test_a_worker_that_dies_while_its_lane_is_closed_closes_it_no_second_time(opened, has_call):
    returned = opened.call() if has_call else b""
    opened.lanes.on_wanted(1)
    assert opened.worker is not None
    if has_call:
        opened.worker.sendall(stream_frame([m.LaneReply(returned[:24], VALUE)]))
    opened.worker.close()
    opened.lanes.on_closed(1, b"error")
    assert opened.sent.count(m.CloseLane(1)) == 1
    assert opened.values == ({returned: VALUE} if has_call else {})


def test_what_it_had_not_answered_is_the_raylet_s_to_judge(opened):
    returned = opened.call()
    assert opened.worker is not None
    opened.worker.close()
    opened.lanes.on_closed(1, b"error")
    call, close = opened.sent
    assert (call.task, call.lane, close) == (returned[:24], 1, m.CloseLane(1))
    behind = opened.call()
    assert opened.sent[-1].task == behind[:24]


def test_the_next_call_waits_for_a_lane_that_is_being_made(driver):
    while not isinstance(driver.sent[-1] if driver.sent else None, m.OpenLane):
        driver.call_and_wait()
    driver.sent.clear()
    returned = driver.call()
    assert driver.sent == []
    driver.worker, theirs = socket.socketpair()
    driver.lanes.on_opened(1, theirs.detach())
    assert driver.runs() == [returned[:24]]


@pytest.mark.parametrize("is_refused", [True, False])
def test_if_there_is_none_or_something_else_is_said_it_goes_by_the_raylets(driver, is_refused):
    while not isinstance(driver.sent[-1] if driver.sent else None, m.OpenLane):
        driver.call_and_wait()
    driver.sent.clear()
    returned = driver.call()
    if is_refused:
        driver.lanes.on_closed(1, None)
    else:
        driver.say(m.StopGetting())
    assert (driver.sent[0].task, driver.sent[0].lane) == (returned[:24], 0)
    assert not driver.lanes.on_dropped(returned)


def test_a_driver_has_so_many_lanes_and_no_more(driver):
    for number in range(MOST_LANES + 10):
        for _ in range(OPEN_AFTER):
            driver.call_and_wait(b"%024d" % number)
    assert sum(isinstance(message, m.OpenLane) for message in driver.sent) == MOST_LANES


def test_actors_whose_last_handle_is_gone_are_forgotten(driver):
    for _ in range(OPEN_AFTER - 1):
        driver.call_and_wait()
    assert not driver.lanes.on_dropped(object_id(ACTOR, 0)), "the raylet must hear of it"
    driver.call_and_wait()
    assert not any(isinstance(message, m.OpenLane) for message in driver.sent)


def test_useless_lanes_are_asked_for_ever_more_seldom(driver):
    asked = []
    for number in range(1, 400):
        driver.call_and_wait()
        if isinstance(driver.sent[-1], m.OpenLane):
            asked.append(number)
            driver.lanes.on_closed(len(asked), None)
    assert [later - earlier for earlier, later in pairwise(asked)] == [4 * OPEN_AFTER, 16 * OPEN_AFTER]
