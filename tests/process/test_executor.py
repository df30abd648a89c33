"""`hpcray.util.executor.RayExecutor`, a `concurrent.futures.Executor`. Ray 2.60 has none."""

import concurrent.futures
import threading

import numpy as np
import pytest

module = pytest.importorskip("hpcray")
RayExecutor = pytest.importorskip("hpcray.util.executor").RayExecutor
pytestmark = [pytest.mark.usefixtures("ray_start"), pytest.mark.beyond_ray("Ray 2.60 has no executor")]


def square(x):
    if x == "bad":
        raise KeyError("as told")
    return x * x


def add(x, y=0):
    return x + y


def test_submit_gives_futures_that_complete():
    with RayExecutor() as executor:
        futures = [executor.submit(square, x) for x in range(20)]
        assert [future.result(30) for future in futures] == [x * x for x in range(20)]
        assert executor.submit(add, 1, y=2).result() == 3
        assert executor.submit(lambda: np.ones(300_000)).result().sum() == 300_000
        assert executor.submit(add, module.put(1), y=module.put(2)).result() == 3
        done = list(concurrent.futures.as_completed(futures, timeout=30))
        assert len(done) == 20


def test_map_is_in_order_with_and_without_chunks():
    with RayExecutor() as executor:
        assert list(executor.map(square, range(10))) == [x * x for x in range(10)]
        assert list(executor.map(add, [1, 2, 3], [4, 5, 6, 7], chunksize=2)) == [5, 7, 9]
        with pytest.raises(KeyError):
            list(executor.map(square, [1, "bad"]))
        with pytest.raises(ValueError, match="chunksize"):
            executor.map(square, [1], chunksize=0)


def test_errors_are_the_users():
    with RayExecutor() as executor:
        future = executor.submit(square, "bad")
        with pytest.raises(KeyError, match="as told"):
            future.result(30)
        assert isinstance(future.exception(), module.exceptions.RayTaskError)
        with pytest.raises(TypeError, match="lock"):
            executor.submit(square, threading.Lock())
        assert executor.submit(square, 3).result(30) == 9


def test_a_result_may_take_too_long(gate):
    with RayExecutor() as executor:
        future = executor.submit(gate.wait)
        with pytest.raises(concurrent.futures.TimeoutError):
            future.result(timeout=0.05)
        assert future.running()
        gate.open()
        future.result(30)


def test_no_more_than_max_workers_are_under_way_and_the_others_can_be_cancelled(gate, counter):
    def task():
        counter.add()
        gate.wait()

    with RayExecutor(max_workers=1) as executor:
        futures = [executor.submit(task) for _ in range(4)]
        unpicklable = executor.submit(square, threading.Lock())
        assert futures[0].running()
        assert not futures[0].cancel()
        assert futures[1].cancel()
        gate.open()
        concurrent.futures.wait(futures, timeout=30)
        assert [future.cancelled() for future in futures] == [False, True, False, False]
        with pytest.raises(TypeError, match="lock"):
            unpicklable.result(30)
    assert counter.value() == 3


def test_shutdown_may_cancel_what_waits(gate):
    executor = RayExecutor(max_workers=1)
    futures = [executor.submit(gate.wait) for _ in range(3)]
    executor.shutdown(wait=False, cancel_futures=True)
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(square, 1)
    assert [future.cancelled() for future in futures] == [False, True, True]
    gate.open()
    executor.shutdown()
    assert futures[0].result() is None


def test_the_end_of_a_with_block_waits():
    with RayExecutor(max_workers=2) as executor:
        futures = [executor.submit(square, x) for x in range(10)]
    assert all(future.done() for future in futures)


def test_a_callback_may_use_the_job():
    results = []
    finished = threading.Event()
    with RayExecutor() as executor:

        def more(future):
            results.append(module.get(module.put(np.full(100_000, future.result()))).sum())
            again = executor.submit(add, np.ones(100_000), 1)
            again.add_done_callback(lambda _: finished.set())

        executor.submit(square, 2).add_done_callback(more)
        assert finished.wait(30)
    assert results == [400_000]


def test_options_are_those_of_tasks():
    def cpus():
        return module.get_runtime_context().get_assigned_resources()["CPU"]

    with RayExecutor(num_cpus=2) as executor:
        assert executor.submit(cpus).result(30) == 2
    with pytest.raises(ValueError, match="colour"):
        RayExecutor(colour="red")
    with pytest.raises(ValueError, match="max_workers"):
        RayExecutor(max_workers=0)


def test_it_works_within_a_task():
    @module.remote
    def outer():
        with RayExecutor() as executor:
            return list(executor.map(square, range(4)))

    assert module.get(outer.remote()) == [0, 1, 4, 9]
