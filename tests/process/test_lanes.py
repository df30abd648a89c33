"""Calls that a driver makes one at a time go to the worker by a socket of their own: nothing else may change by it.

Each test first calls until there is a lane, and where it matters says so (`has_lane`), since all would pass without one.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import threading
import time

import numpy as np
import pytest

from hpcray.client import require_client

pytestmark = [
    pytest.mark.usefixtures("ray_start"),
    pytest.mark.beyond_ray("lanes are hpcray's"),
]
ROUNDS = 60
"""Calls one at a time after which a lane is open, if the machine is not very slow."""


def has_lane() -> bool:
    return any(lane.sock is not None for lane in require_client()._lanes._lanes.values())


@pytest.fixture
def on_lane(hpcray):
    """``on_lane(call)`` makes calls one at a time until there is a lane."""

    def open_lane(call):
        end = time.monotonic() + 30
        while not has_lane():
            hpcray.get(call())
            assert time.monotonic() < end, "no lane in 30 s"

    return open_lane


@pytest.fixture(autouse=True)
def no_lanes_of_earlier_tests(wait_until):
    yield
    wait_until(lambda: not require_client()._lanes._lanes, on_timeout=lambda: state_of_lanes())


def state_of_lanes():
    return [
        (n, lane.sock, lane.flight, lane.is_wanted, lane.is_over) for n, lane in require_client()._lanes._lanes.items()
    ]


def test_calls_one_at_a_time_get_a_lane_and_one_worker(hpcray, on_lane):
    @hpcray.remote
    def where(number):
        return number, os.getpid()

    on_lane(lambda: where.remote(0))
    answers = [hpcray.get(where.remote(number)) for number in range(ROUNDS)]
    assert [number for number, _ in answers] == list(range(ROUNDS))
    assert len({pid for _, pid in answers[:10]}) <= 2


def test_an_idle_lane_gives_its_cpu_back(hpcray, on_lane, wait_until):
    @hpcray.remote
    def nothing():
        pass

    on_lane(nothing.remote)
    wait_until(lambda: not has_lane())
    wait_until(lambda: hpcray.available_resources().get("CPU") == 2)


def test_an_actor_s_idle_lane_is_given_up_and_comes_again(hpcray, on_lane, wait_until):
    log = hpcray.remote(_Log).remote()
    for _ in range(2):
        on_lane(log.all.remote)
        wait_until(lambda: not has_lane())


def test_a_lane_gives_way_to_tasks_that_need_its_cpu(hpcray, on_lane):
    @hpcray.remote
    def nothing():
        pass

    @hpcray.remote(num_cpus=2)
    def all_cpus():
        return "ran"

    on_lane(nothing.remote)
    wanted = all_cpus.remote()
    end = time.monotonic() + 20
    ready = []
    while not ready and time.monotonic() < end:
        hpcray.get(nothing.remote())
        ready, _ = hpcray.wait([wanted], timeout=0)
    assert ready
    assert hpcray.get(wanted) == "ran"


@pytest.mark.parametrize("size", [1, 200_000])
def test_a_return_may_be_used_in_any_way_whether_or_not_it_exists(hpcray, on_lane, size):
    @hpcray.remote
    def make(number):
        return np.full(size, number)

    @hpcray.remote
    def total(array, also=None):
        if also is not None:
            array = array + hpcray.get(also[0])
        return int(array.sum())

    def remade():
        if size == 1:
            on_lane(lambda: make.remote(3))
        return make.remote(3)

    for number in range(ROUNDS):
        hpcray.get(make.remote(number))
    assert hpcray.get(total.remote(make.remote(3))) == 3 * size
    assert hpcray.get(total.remote(make.remote(3), [make.remote(4)])) == 7 * size
    (inner,) = hpcray.get(hpcray.put([remade()]))
    assert hpcray.get(inner)[0] == 3
    ready, rest = hpcray.wait([remade()], timeout=20)
    assert len(ready) == 1
    assert not rest
    copy = pickle.loads(pickle.dumps(remade()))
    assert hpcray.get(copy)[0] == 3
    assert remade().future().result(timeout=20)[0] == 3

    async def awaited():
        return await remade()

    assert asyncio.run(awaited())[0] == 3
    answered = remade()
    hpcray.get(answered)
    assert hpcray.get(total.remote(answered)) == 3 * size


def test_results_with_references_inside_and_several_returns(hpcray, on_lane):
    @hpcray.remote
    def wraps(number):
        return [hpcray.put(number)] if number % 3 == 0 else number

    @hpcray.remote(num_returns=2)
    def two(number):
        return number, -number

    for number in range(ROUNDS):
        value = hpcray.get(wraps.remote(number))
        assert (hpcray.get(value[0]) if isinstance(value, list) else value) == number
        assert hpcray.get(two.remote(number)) == [number, -number]


def test_exceptions_and_retries_of_exceptions(hpcray, on_lane, counter):
    @hpcray.remote
    def fails(number):
        if number >= 0:
            raise KeyError(number)

    @hpcray.remote(retry_exceptions=True, max_retries=3)
    def fails_twice(is_to_fail):
        if is_to_fail and counter.add() <= 2:
            raise OSError
        return "done"

    on_lane(lambda: fails.remote(-1))
    for number in range(5):
        with pytest.raises(KeyError):
            hpcray.get(fails.remote(number))
    on_lane(lambda: fails_twice.remote(False))
    assert hpcray.get(fails_twice.remote(True)) == "done"
    assert counter.value() == 3


def test_a_task_whose_worker_dies_on_a_lane_is_retried(hpcray, on_lane, counter):
    @hpcray.remote
    def dies_twice(is_to_die):
        if is_to_die and counter.add() <= 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return "alive"

    on_lane(lambda: dies_twice.remote(False))
    assert hpcray.get(dies_twice.remote(True)) == "alive"
    assert counter.value() == 3


def test_without_retries_its_death_is_the_result(hpcray, on_lane, counter):
    @hpcray.remote(max_retries=0)
    def dies(is_to_die):
        if is_to_die:
            counter.add()
            print("last words", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    on_lane(lambda: dies.remote(False))
    with pytest.raises(hpcray.exceptions.WorkerCrashedError, match=r"(?s)dies died.*SIGKILL.*last words"):
        hpcray.get(dies.remote(True))
    assert counter.value() == 1
    hpcray.get(dies.remote(False))


def test_a_task_runs_though_its_reference_is_dropped_at_once(hpcray, on_lane, counter, wait_until):
    @hpcray.remote
    def count(is_to_die=False):
        if counter.add() == 1 and is_to_die:
            os.kill(os.getpid(), signal.SIGKILL)

    @hpcray.remote
    def nothing(is_to_die=False):
        pass

    on_lane(nothing.remote)
    count.remote(is_to_die=True)
    wait_until(lambda: counter.value() == 2)
    for _ in range(ROUNDS):
        hpcray.get(count.remote())
    before = counter.value()
    for _ in range(10):
        count.remote()
    wait_until(lambda: counter.value() == before + 10)


def test_workers_killed_all_the_time_lose_no_task_and_repeat_no_answered_one(hpcray, counter):
    @hpcray.remote(max_retries=-1)
    def count(number):
        counter.add()
        return number, os.getpid()

    done = threading.Event()
    pids: set[int] = set()

    def kill_now_and_then():
        while not done.wait(0.03):
            for pid in list(pids):
                pids.discard(pid)
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass

    killer = threading.Thread(target=kill_now_and_then)
    killer.start()
    try:
        killed = 0
        for number in range(1500):
            answer, pid = hpcray.get(count.remote(number), timeout=60)
            assert answer == number
            if number % 100 == 50:
                pids.add(pid)
                killed += 1
    finally:
        done.set()
        killer.join()
    assert 1500 <= counter.value() <= 1500 + killed


class _Log:
    def __init__(self):
        self.calls = []

    def add(self, value):
        self.calls.append(value)
        return len(self.calls)

    def all(self):
        return self.calls

    def slow(self, value):
        time.sleep(0.01)
        return self.add(value)

    def die(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def big(self):
        return np.zeros(200_000)


def test_calls_of_an_actor_keep_their_order_however_they_go(hpcray, on_lane):
    log = hpcray.remote(_Log).remote()
    on_lane(lambda: log.slow.remote(-1))
    expected = []
    for number in range(0, 400, 4):
        log.add.remote(number)  # by the lane, the rest behind it by the raylets
        log.slow.remote(hpcray.put(number + 1))
        log.add.options(num_returns=0).remote(number + 2)
        hpcray.get(log.add.remote(number + 3))
        expected += range(number, number + 4)
        for _ in range(3):
            hpcray.get(log.add.remote(number))
            expected.append(number)
    calls = hpcray.get(log.all.remote())
    assert [call for call in calls if call != -1] == expected
    assert hpcray.get(log.big.remote()).shape == (200_000,)
    assert hpcray.get(log.add.remote(0)) == len(calls) + 1


def test_an_actor_that_dies_on_a_lane_fails_the_call_and_later_ones(hpcray, on_lane):
    log = hpcray.remote(_Log).remote()
    on_lane(lambda: log.add.remote(0))
    with pytest.raises(hpcray.exceptions.ActorDiedError, match="SIGKILL"):
        hpcray.get(log.die.remote())
    for _ in range(20):
        with pytest.raises(hpcray.exceptions.ActorDiedError):
            hpcray.get(log.add.remote(0))


def test_an_actor_killed_between_two_calls_on_a_lane(hpcray, on_lane):
    log = hpcray.remote(_Log).remote()
    on_lane(lambda: log.add.remote(0))
    hpcray.kill(log)
    with pytest.raises(hpcray.exceptions.ActorDiedError):
        hpcray.get(log.add.remote(0))


def test_the_last_handle_may_go_while_a_call_is_under_way(hpcray, on_lane):
    log = hpcray.remote(_Log).remote()
    on_lane(log.all.remote)
    last = log.slow.remote("last")
    del log
    assert hpcray.get(last) == 1


def test_threads_share_lanes(hpcray):
    log = hpcray.remote(_Log).remote()

    @hpcray.remote
    def double(number):
        return 2 * number

    wrong = []

    def work(start):
        for number in range(start, start + 200):
            if hpcray.get(double.remote(number)) != 2 * number:
                wrong.append(number)
            hpcray.get(log.add.remote(number))

    threads = [threading.Thread(target=work, args=(1000 * index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert sorted(hpcray.get(log.all.remote())) == sorted(1000 * index + n for index in range(3) for n in range(200))


def test_a_task_on_a_lane_may_block(hpcray, on_lane):
    @hpcray.remote
    def inner(number):
        return number + 1

    @hpcray.remote
    def outer(number):
        return None if number is None else sum(hpcray.get([inner.remote(number) for _ in range(4)]))

    on_lane(lambda: outer.remote(None))
    assert [hpcray.get(outer.remote(number)) for number in range(30)] == [4 * (n + 1) for n in range(30)]


def test_what_the_last_task_printed_is_shown(run_script):
    finished = run_script(
        """
        import hpcray
        hpcray.init(num_cpus=1)

        @hpcray.remote
        def say(number):
            print("number", number)

        for number in range(200):
            hpcray.get(say.remote(number))
        """
    )
    assert finished.returncode == 0, finished.stderr
    assert all(f"number {number}\n" in finished.stdout + finished.stderr for number in range(200))


def test_a_timed_out_get_may_be_repeated(hpcray, on_lane):
    @hpcray.remote
    def wait(seconds):
        time.sleep(seconds)
        return seconds

    on_lane(lambda: wait.remote(0))
    ref = wait.remote(0.3)
    with pytest.raises(hpcray.exceptions.GetTimeoutError):
        hpcray.get(ref, timeout=0.05)
    assert hpcray.get(ref) == 0.3
