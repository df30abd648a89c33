"""Tasks that submit tasks: on one CPU, to any depth, nothing deadlocks."""

import pytest

INIT = {"num_cpus": 1}
pytestmark = pytest.mark.usefixtures("ray_start")


def test_tasks_fifty_deep_finish_on_one_cpu(hpcray):
    @hpcray.remote
    def descend(depth):
        return 0 if depth == 0 else 1 + hpcray.get(descend.remote(depth - 1))

    assert hpcray.get(descend.remote(50)) == 50


def test_a_recursive_function_calls_itself_by_its_own_name(hpcray):
    @hpcray.remote
    def fib(n):
        return n if n < 2 else sum(hpcray.get([fib.remote(n - 1), fib.remote(n - 2)]))

    assert hpcray.get(fib.remote(6)) == 8


def test_two_functions_may_call_each_other(hpcray):
    @hpcray.remote
    def is_even(n):
        return True if n == 0 else hpcray.get(is_odd.remote(n - 1))

    @hpcray.remote
    def is_odd(n):
        return False if n == 0 else hpcray.get(is_even.remote(n - 1))

    assert hpcray.get([is_even.remote(4), is_odd.remote(4)]) == [True, False]


def test_a_task_that_blocks_in_wait_lends_its_cpu(hpcray):
    @hpcray.remote
    def child(x):
        return x

    @hpcray.remote
    def parent():
        ready, pending = hpcray.wait([child.remote(x) for x in range(5)], num_returns=5)
        return len(ready), len(pending)

    assert hpcray.get(parent.remote()) == (5, 0)


def test_parents_wider_than_the_cpus_all_get_their_children(hpcray):
    @hpcray.remote
    def child(x):
        return x

    @hpcray.remote
    def parent(x):
        return sum(hpcray.get([child.remote(x) for _ in range(5)]))

    assert hpcray.get([parent.remote(x) for x in range(6)]) == [0, 5, 10, 15, 20, 25]


def test_a_task_need_not_wait_for_the_tasks_it_started(hpcray, counter, wait_until):
    @hpcray.remote
    def child():
        counter.add()

    @hpcray.remote
    def parent():
        for _ in range(5):
            child.remote()

    hpcray.get(parent.remote())
    wait_until(lambda: counter.value() == 5)


def test_a_task_may_create_an_actor_and_use_it(hpcray):
    @hpcray.remote
    class Keeper:
        def __init__(self):
            self.value = 0

        def add(self, amount):
            self.value += amount
            return self.value

    @hpcray.remote
    def use():
        keeper = Keeper.remote()
        return hpcray.get([keeper.add.remote(1) for _ in range(3)])

    assert hpcray.get(use.remote()) == [1, 2, 3]


def test_an_actor_may_submit_tasks_and_wait_for_them(hpcray):
    @hpcray.remote
    def double(x):
        return 2 * x

    @hpcray.remote
    class Submitter:
        def run(self, n):
            return sum(hpcray.get([double.remote(x) for x in range(n)]))

    assert hpcray.get(Submitter.remote().run.remote(4)) == 12
