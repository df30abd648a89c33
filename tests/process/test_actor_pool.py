"""ActorPool: Ray's class of that name."""

import pytest

pytestmark = pytest.mark.usefixtures("ray_start")


@pytest.fixture
def worker_class(hpcray):
    @hpcray.remote(num_cpus=0)
    class Worker:
        def double(self, x):
            return 2 * x

        def wait(self, gate, x):
            gate.wait()
            return x

        def fail(self, x):
            raise ValueError(f"no {x}")

        def die(self):
            import os

            os._exit(1)

        def two(self, x):
            return x, x + 1

    return Worker


@pytest.fixture
def pool_of(hpcray, worker_class):
    return lambda count: hpcray.util.ActorPool([worker_class.remote() for _ in range(count)])


def double(actor, value):
    return actor.double.remote(value)


def test_map_gives_results_in_order(pool_of):
    assert list(pool_of(2).map(double, range(10))) == [2 * x for x in range(10)]


def test_map_unordered_gives_all_results(pool_of):
    assert sorted(pool_of(2).map_unordered(double, range(10))) == [2 * x for x in range(10)]


def test_map_may_be_used_again_and_drops_what_was_not_fetched(pool_of):
    pool = pool_of(2)
    assert list(pool.map(double, [1, 2])) == [2, 4]
    pool.submit(double, 100)
    assert list(pool.map(double, [3])) == [6]
    pool.submit(double, 100)
    assert list(pool.map_unordered(double, [4])) == [8]


def test_get_next_is_in_the_order_of_submission(pool_of, gate):
    pool = pool_of(2)
    pool.submit(lambda actor, value: actor.wait.remote(gate, value), "slow")
    pool.submit(double, 1)
    assert not pool.has_free()
    with pytest.raises(TimeoutError, match="Timed out waiting for result"):
        pool.get_next(timeout=0.1)
    gate.open()
    assert pool.get_next() == "slow"
    assert pool.get_next(timeout=30) == 2
    assert not pool.has_next()
    with pytest.raises(StopIteration):
        pool.get_next()


def test_get_next_unordered_is_in_the_order_of_completion(pool_of, gate):
    pool = pool_of(2)
    pool.submit(lambda actor, value: actor.wait.remote(gate, value), "slow")
    pool.submit(double, 1)
    assert pool.get_next_unordered() == 2
    with pytest.raises(TimeoutError):
        pool.get_next_unordered(timeout=0.1)
    with pytest.raises(ValueError, match=r"not allowed to call get_next\(\) after get_next_unordered"):
        pool.get_next()
    gate.open()
    assert pool.get_next_unordered(timeout=30) == "slow"
    with pytest.raises(StopIteration):
        pool.get_next_unordered()


def test_a_result_that_takes_too_long_may_be_given_up(pool_of, gate):
    pool = pool_of(1)
    pool.submit(lambda actor, value: actor.wait.remote(gate, value), "slow")
    pool.submit(double, 1)
    with pytest.raises(TimeoutError, match="has been ignored"):
        pool.get_next(timeout=0.1, ignore_if_timedout=True)
    gate.open()
    assert pool.get_next() == 2


def test_what_finds_no_idle_actor_waits_for_one(pool_of):
    pool = pool_of(1)
    for value in range(4):
        pool.submit(double, value)
    assert [pool.get_next() for _ in range(4)] == [0, 2, 4, 6]
    assert pool.has_free()


def test_an_error_is_raised_where_its_result_is_asked_for(pool_of):
    pool = pool_of(1)
    pool.submit(lambda actor, value: actor.fail.remote(value), 1)
    pool.submit(double, 2)
    with pytest.raises(ValueError, match="no 1"):
        pool.get_next()
    assert pool.get_next() == 4


def test_an_actor_that_died_leaves_the_pool(hpcray, pool_of):
    pool = pool_of(2)
    pool.submit(lambda actor, _: actor.die.remote(), None)
    for value in range(3):
        pool.submit(double, value)
    with pytest.raises(hpcray.exceptions.RayActorError):
        pool.get_next()
    assert [pool.get_next() for _ in range(3)] == [0, 2, 4]
    assert pool.pop_idle() is not None
    assert pool.pop_idle() is None


def test_actors_may_be_taken_out_and_put_in(hpcray, pool_of, worker_class):
    pool = pool_of(1)
    pool.submit(double, 1)
    assert pool.pop_idle() is None
    assert pool.get_next() == 2
    actor = pool.pop_idle()
    assert actor is not None
    assert not pool.has_free()
    pool.submit(double, 5)
    assert not pool.has_next()
    pool.push(actor)
    with pytest.raises(ValueError, match="already belongs"):
        pool.push(actor)
    assert pool.get_next() == 10
    pool.push(worker_class.remote())
    assert pool.has_free()


def test_a_function_may_return_several_references(hpcray, pool_of):
    pool = pool_of(1)
    pool.submit(lambda actor, value: actor.two.options(num_returns=2).remote(value), 7)
    assert pool.get_next() == [7, 8]
