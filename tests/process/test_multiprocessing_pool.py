"""`multiprocessing.Pool` on the job: as in the standard library, and as in Ray where that differs."""

import importlib
import itertools
import os
import threading
import time

import pytest

pytestmark = pytest.mark.usefixtures("ray_start")


@pytest.fixture
def multiprocessing(hpcray):
    return importlib.import_module(f"{hpcray.__name__}.util.multiprocessing")


@pytest.fixture
def make(multiprocessing):
    pools = []

    def make(*args, **kwargs):
        pools.append(multiprocessing.Pool(*args, **kwargs))
        return pools[-1]

    yield make
    for pool in pools:
        pool.terminate()


@pytest.fixture
def pool(make):
    return make(2)


def square(x):
    if x == "bad":
        raise KeyError("as told")
    return x * x


def add(x, y=0):
    return x + y


# ------------------------------------------------------------------------------------------------------------------ calls
def test_map_gives_a_list_in_order(pool):
    assert pool.map(square, range(50)) == [x * x for x in range(50)]
    assert pool.map(square, (x for x in range(5)), chunksize=2) == [0, 1, 4, 9, 16]
    assert pool.map(square, []) == []
    assert pool.map(lambda x: x + 1, [1]) == [2]


def test_starmap_unpacks_arguments(pool):
    assert pool.starmap(add, [(1, 2), (3, 4), (5,)]) == [3, 7, 5]
    assert pool.starmap(add, zip([1, 2], [3, 4], strict=True), 1) == [4, 6]
    assert pool.starmap_async(add, [(1, 2)]).get(30) == [3]


def test_apply_calls_a_function(pool):
    assert pool.apply(add, (1,), {"y": 2}) == 3
    assert pool.apply(add, (1,)) == 1
    assert pool.apply_async(add, (1, 2)).get(30) == 3


def test_imap_gives_values_in_order(pool):
    assert list(pool.imap(square, range(10))) == [x * x for x in range(10)]
    assert list(pool.imap(square, iter(range(10)), chunksize=3)) == [x * x for x in range(10)]
    values = pool.imap(square, [1, 2])
    assert (values.next(), values.next(timeout=30)) == (1, 4)
    with pytest.raises(StopIteration):
        values.next()


def test_imap_unordered_gives_values_as_they_come(pool, gate):
    def task(x):
        if x == "slow":
            gate.wait()
        return x

    values = pool.imap_unordered(task, ["slow", "quick"])
    assert values.next(timeout=60) == "quick"
    gate.open()
    assert list(values) == ["slow"]
    assert sorted(pool.imap_unordered(square, range(10), chunksize=3)) == [x * x for x in range(10)]


def test_imap_reads_an_endless_iterable(pool):
    values = pool.imap(square, itertools.count())
    assert [next(values) for _ in range(20)] == [x * x for x in range(20)]


def test_work_is_done_by_as_many_processes_as_asked_for(make, gate):
    pool = make(2)

    def pid(_):
        gate.wait()
        return os.getpid()

    result = pool.map_async(pid, range(2), chunksize=1)
    gate.open()
    pids = result.get(60)
    assert len(set(pids)) == 2
    assert os.getpid() not in pids


def test_more_processes_than_cpus_and_none_are_refused(make):
    with pytest.raises(ValueError, match="only 2 CPUs"):
        make(3)
    with pytest.raises(ValueError, match="must be >0"):
        make(0)
    assert make().apply(os.getpid) != os.getpid()


# ---------------------------------------------------------------------------------------------------------------- results
def test_a_result_that_is_not_there_yet(pool, multiprocessing, gate):
    def task(x):
        gate.wait()
        return x

    result = pool.map_async(task, [1, 2])
    assert not result.ready()
    with pytest.raises(ValueError, match="not ready"):
        result.successful()
    result.wait(0.05)
    with pytest.raises(multiprocessing.TimeoutError):
        result.get(timeout=0.05)
    values = pool.imap(task, [1])
    with pytest.raises(multiprocessing.TimeoutError):
        values.next(timeout=0.05)
    gate.open()
    assert result.get() == [1, 2]
    assert result.ready()
    assert result.successful()
    assert values.next() == 1


def test_an_error_is_raised_as_itself(pool):
    for call in (
        lambda: pool.map(square, [1, "bad", 2]),
        lambda: pool.apply(square, ("bad",)),
        lambda: pool.apply_async(square, ("bad",)).get(30),
    ):
        with pytest.raises(KeyError, match="as told"):
            call()
    result = pool.map_async(square, ["bad"])
    result.wait()
    assert not result.successful()


@pytest.mark.beyond_ray("Ray's iterators return exceptions instead of raising them")
def test_an_iterator_goes_on_behind_an_error(pool):
    values = pool.imap(square, [1, "bad", 3])
    assert next(values) == 1
    with pytest.raises(KeyError, match="as told"):
        next(values)
    assert next(values) == 9


@pytest.mark.beyond_ray("Ray leaves the traceback out")
def test_an_error_tells_where_it_was_raised(pool):
    with pytest.raises(KeyError) as caught:
        pool.apply(square, ("bad",))
    assert 'raise KeyError("as told")' in str(caught.value.__cause__)


def test_callbacks_are_called_once(pool, wait_until):
    seen = []
    pool.map_async(square, [1, 2], callback=seen.append).get(30)
    pool.apply_async(square, (3,), callback=seen.append).get(30)
    wait_until(lambda: len(seen) == 2)
    assert seen == [[1, 4], 9]


@pytest.mark.beyond_ray("Ray gives its own PoolTaskError to it")
def test_an_error_callback_is_called_with_the_first_error(pool, wait_until):
    seen = []
    result = pool.map_async(square, ["bad", "bad"], 1, seen.append, seen.append)
    with pytest.raises(KeyError):
        result.get(30)
    wait_until(lambda: seen)
    assert [type(error) for error in seen] == [KeyError]


def test_a_callback_may_submit_more(pool, wait_until):
    seen = []
    pool.apply_async(square, (2,), callback=lambda x: seen.append(pool.apply(square, (bytes(300_000) and x,))))
    wait_until(lambda: seen == [16])


def test_a_process_that_dies_fails_its_work(hpcray, make):
    pool = make(1)
    result = pool.apply_async(os._exit, (1,))
    with pytest.raises(hpcray.exceptions.RayActorError):
        result.get(60)


# ------------------------------------------------------------------------------------------------------------- processes
def test_the_initializer_runs_in_each_process(make):
    def initialize(name, value):
        os.environ[name] = value

    pool = make(2, initialize, ("OF_THE_POOL", "5"))
    assert pool.map(lambda _: os.environ["OF_THE_POOL"], range(8), chunksize=1) == ["5"] * 8


def test_processes_are_replaced_after_so_many_chunks(make):
    pool = make(1, maxtasksperchild=2)
    pids = pool.map(lambda _: os.getpid(), range(6), chunksize=1)
    assert len(set(pids)) == 3
    assert pids[0] == pids[1]


def test_options_of_the_actors_may_be_given(make):
    pool = make(1, ray_remote_args={"num_cpus": 2})

    def cpus():
        import importlib

        context = importlib.import_module(implementation).get_runtime_context()
        return context.get_assigned_resources()["CPU"]

    implementation = type(pool).__module__.split(".")[0]
    assert pool.apply(cpus) == 2


# -------------------------------------------------------------------------------------------------------------------- end
def test_a_closed_pool_takes_no_work_but_ends_what_it_has(pool, gate):
    def task(x):
        gate.wait()
        return x

    result = pool.map_async(task, range(4))
    with pytest.raises(ValueError, match="still running"):
        pool.join()
    pool.close()
    for call in (pool.map, pool.imap, pool.imap_unordered, pool.apply_async, pool.starmap):
        with pytest.raises(ValueError, match="not running"):
            call(task, [])
    gate.open()
    pool.join()
    assert result.get() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="not running"), pool:
        pass


def test_a_terminated_pool_drops_what_it_has(hpcray, pool):
    result = pool.map_async(time.sleep, [60, 60])
    pool.terminate()
    with pytest.raises(hpcray.exceptions.RayActorError):
        result.get(60)
    pool.join()


def test_the_end_of_a_with_block_terminates(multiprocessing):
    with multiprocessing.Pool(1) as pool:
        assert pool.map(square, [3]) == [9]
    with pytest.raises(ValueError, match="not running"):
        pool.map(square, [3])


@pytest.mark.beyond_ray("Ray's divides by it")
def test_chunks_of_nothing_are_refused(pool):
    for call in (pool.map, pool.imap, pool.starmap):
        with pytest.raises(ValueError, match="Chunksize"):
            call(square, [(1,)], chunksize=-1)


@pytest.mark.beyond_ray("only those with callbacks need one here")
def test_results_need_no_threads(pool):
    before = threading.active_count()
    results = [pool.apply_async(square, (x,)) for x in range(20)]
    assert threading.active_count() == before
    assert [result.get() for result in results] == [x * x for x in range(20)]


@pytest.mark.beyond_ray("cloudpickle gives each function of __main__ globals of its own")
def test_a_script_finds_the_globals_that_its_initializer_set(run_script):
    finished = run_script(
        """
        import functools
        from hpcray.util.multiprocessing import Pool

        model = None

        def load(value):
            global model
            model = value

        def twice():
            return 2 * model

        def predict(x, y=0):
            return twice() + x + y

        if __name__ == "__main__":
            with Pool(2, initializer=load, initargs=(100,)) as pool:
                print(pool.map(predict, [1, 2]), pool.map(functools.partial(predict, y=10), [1]))
        """
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "[201, 202] [211]\n"
