"""Tasks that submit tasks: on one CPU, to any depth, nothing deadlocks."""

import contextlib
import threading

import psutil
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


def most_workers_during(call):
    """What it returns, and how many worker processes there were at most while it ran."""
    counts, is_over = [0], threading.Event()

    def count():
        while not is_over.wait(0.02):
            names = []
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    names.append(process.name())
            counts.append(sum(name == "hpcray:worker" for name in names))

    counter = threading.Thread(target=count)
    counter.start()
    try:
        return call(), max(counts)
    finally:
        is_over.set()
        counter.join()


@pytest.mark.beyond_ray("Ray starts other tasks while those that a worker waits for are queued")
def test_recursion_needs_as_many_processes_as_it_is_deep(hpcray):
    @hpcray.remote
    def fib(n):
        return n if n < 2 else sum(hpcray.get([fib.remote(n - 1), fib.remote(n - 2)]))

    value, most = most_workers_during(lambda: hpcray.get(fib.remote(10)))
    assert value == 55
    assert most <= 14


@pytest.mark.beyond_ray("Ray starts other tasks while those that a worker waits for are queued")
def test_many_parents_that_wait_for_a_child_need_few_processes(hpcray):
    @hpcray.remote
    def child(x):
        return x

    @hpcray.remote
    def parent(x):
        return hpcray.get(child.remote(x))

    values, most = most_workers_during(lambda: hpcray.get([parent.remote(x) for x in range(1000)]))
    assert values == list(range(1000))
    assert most <= 6


def test_recursion_sixty_deep_through_wait_on_one_cpu(hpcray):
    @hpcray.remote
    def descend(depth):
        if depth == 0:
            return 0
        (ready, _) = hpcray.wait([descend.remote(depth - 1)])
        return 1 + hpcray.get(ready[0])

    assert hpcray.get(descend.remote(60)) == 60


def test_tasks_and_actors_may_wait_for_each_other_in_turns(hpcray):
    @hpcray.remote(num_cpus=0)
    class Asker:
        def ask(self, depth):
            return 1 + hpcray.get(descend.remote(depth - 1))

    @hpcray.remote
    def descend(depth):
        return depth if depth <= 0 else 1 + hpcray.get(Asker.remote().ask.remote(depth - 1))

    assert hpcray.get(descend.remote(12)) == 12


def test_a_task_whose_argument_is_missing_holds_up_nobody(hpcray, gate):
    @hpcray.remote(num_cpus=0)
    def slow():
        gate.wait()
        return 1

    @hpcray.remote
    def add_one(x):
        return x + 1

    @hpcray.remote
    def other():
        return 0

    lacking = [add_one.remote(slow.remote()) for _ in range(3)]
    assert hpcray.get([add_one.remote(1), other.remote(), add_one.remote(2)], timeout=20) == [2, 0, 3]
    gate.open()
    assert hpcray.get(lacking) == [2, 2, 2]
