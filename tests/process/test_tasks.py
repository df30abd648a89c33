"""Tasks: what may be passed and returned, which functions may be remote, where they run."""

import collections
import dataclasses
import datetime as dt
import decimal
import functools
import os
import pathlib

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("ray_start")


@pytest.fixture
def echo(hpcray):
    @hpcray.remote
    def echo(value):
        return value

    return echo


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        -(2**100),
        1.5,
        2 + 3j,
        "späť ☃",
        b"\x00\xff",
        "",
        (),
        [],
        {},
        [1, [2, [3]]],
        {"a": {"b": (1, 2)}},
        {1, 2},
        frozenset({1}),
        range(5),
        slice(1, 2),
        Ellipsis,
        NotImplemented,
        int,
        dt.date(2024, 2, 29),
        decimal.Decimal("1.10"),
        pathlib.Path("/a/b"),
        collections.Counter("abca"),
        collections.OrderedDict(a=1),
        collections.deque([1, 2], maxlen=3),
        np.float32(1.5),
        os.path.join,
    ],
    ids=repr,
)
def test_a_value_of_any_picklable_kind_goes_and_comes_back_equal(hpcray, echo, value):
    result = hpcray.get(echo.remote(value))
    assert result == value
    assert type(result) is type(value)


def test_a_local_dataclass_comes_back_as_an_instance_of_the_same_class(hpcray, echo):
    @dataclasses.dataclass
    class Point:
        x: int
        y: list

    result = hpcray.get(echo.remote(Point(1, [2])))
    assert result == Point(1, [2])
    assert isinstance(result, Point)


def test_a_lambda_and_a_partial_are_values_too(hpcray, echo):
    assert hpcray.get(echo.remote(lambda x: x + 1))(1) == 2
    assert hpcray.get(echo.remote(functools.partial(int, base=2)))("101") == 5


def test_an_exception_may_be_a_value_and_is_not_raised(hpcray, echo):
    result = hpcray.get(echo.remote(ValueError("only a value")))
    assert type(result) is ValueError
    assert result.args == ("only a value",)


@pytest.mark.parametrize("size", [0, 1, 99_000, 101_000, 5_000_000])
def test_arguments_and_results_of_every_size_arrive(hpcray, echo, size):
    data = os.urandom(size)
    assert hpcray.get(echo.remote(data)) == data


def test_positional_keyword_default_and_variadic_arguments_arrive_as_in_a_plain_call(hpcray):
    def describe(a, b=2, *rest, c, d=4, **others):
        return a, b, rest, c, d, others

    remote = hpcray.remote(describe)
    assert hpcray.get(remote.remote(1, c=3)) == describe(1, c=3)
    assert hpcray.get(remote.remote(1, 5, 6, 7, c=8, d=9, e=10)) == describe(1, 5, 6, 7, c=8, d=9, e=10)


def test_a_ref_as_an_argument_arrives_as_its_value_in_every_position(hpcray):
    @hpcray.remote
    def describe(a, *rest, b, **others):
        return a, rest, b, others

    refs = [hpcray.put(number) for number in range(5)]
    result = hpcray.get(describe.remote(refs[0], refs[1], refs[2], b=refs[3], c=refs[4]))
    assert result == (0, (1, 2), 3, {"c": 4})


def test_a_ref_inside_a_container_arrives_as_a_ref(hpcray):
    @dataclasses.dataclass
    class Holder:
        ref: object

    @hpcray.remote
    def resolve(in_list, in_dict, in_object):
        refs = [in_list[0], in_dict["key"][0], in_object.ref]
        assert all(isinstance(ref, hpcray.ObjectRef) for ref in refs)
        return hpcray.get(refs)

    refs = [hpcray.put(number) for number in range(3)]
    assert hpcray.get(resolve.remote([refs[0]], {"key": (refs[1],)}, Holder(refs[2]))) == [0, 1, 2]


def test_a_ref_as_the_default_of_a_parameter_arrives_as_a_ref(hpcray):
    default = hpcray.put(7)

    @hpcray.remote
    def resolve(ref=default):
        assert isinstance(ref, hpcray.ObjectRef)
        return hpcray.get(ref)

    assert hpcray.get(resolve.remote()) == 7


def test_a_ref_captured_by_the_function_can_be_used_inside(hpcray):
    captured = hpcray.put(7)
    assert hpcray.get(hpcray.remote(lambda: hpcray.get(captured)).remote()) == 7


def test_a_task_starts_when_the_tasks_it_depends_on_are_done(hpcray, gate):
    @hpcray.remote
    def slow():
        gate.wait()
        return 20

    @hpcray.remote
    def add(a, b):
        return a + b

    total = add.remote(slow.remote(), add.remote(slow.remote(), 2))
    assert hpcray.wait([total], timeout=0)[0] == []
    gate.open()
    assert hpcray.get(total) == 42


def test_a_chain_of_a_hundred_dependent_tasks_gives_its_end(hpcray):
    @hpcray.remote
    def increment(x):
        return x + 1

    ref = hpcray.put(0)
    for _ in range(100):
        ref = increment.remote(ref)
    assert hpcray.get(ref) == 100


def test_a_task_that_returns_a_ref_gives_a_ref(hpcray):
    @hpcray.remote
    def inner():
        return 5

    @hpcray.remote
    def outer():
        return inner.remote()

    ref = hpcray.get(outer.remote())
    assert isinstance(ref, hpcray.ObjectRef)
    assert hpcray.get(ref) == 5


def test_a_task_may_return_refs_to_what_it_put_and_they_outlive_it(hpcray):
    @hpcray.remote
    def produce():
        return [hpcray.put(np.full(300_000, number)) for number in range(3)]

    refs = hpcray.get(produce.remote())
    assert [int(array.sum()) for array in hpcray.get(refs)] == [0, 300_000, 600_000]


@pytest.mark.parametrize("container", [tuple, list], ids=["tuple", "list"])
def test_num_returns_gives_one_ref_per_value(hpcray, container):
    @hpcray.remote(num_returns=3)
    def three():
        return container([1, "two", None])

    refs = three.remote()
    assert isinstance(refs, list)
    assert len(set(refs)) == 3
    assert hpcray.get(refs) == [1, "two", None]


def test_one_of_several_results_can_be_passed_on_alone(hpcray, echo):
    @hpcray.remote(num_returns=2)
    def pair():
        return "small", np.ones(300_000)

    _, large = pair.remote()
    assert hpcray.get(echo.remote(large)).sum() == 300_000


def test_num_returns_zero_gives_none_and_the_task_runs_all_the_same(hpcray, counter, wait_until):
    @hpcray.remote(num_returns=0)
    def run():
        counter.add()

    assert run.remote() is None
    wait_until(lambda: counter.value() == 1)


@pytest.mark.parametrize("returned", [1, 3])
def test_a_wrong_number_of_values_fails_each_ref_with_both_numbers(hpcray, returned):
    @hpcray.remote(num_returns=2)
    def values():
        return tuple(range(returned))

    for ref in values.remote():
        with pytest.raises(ValueError, match=rf"{returned}.*2") as caught:
            hpcray.get(ref)
        assert isinstance(caught.value, hpcray.exceptions.RayTaskError)


def test_a_single_value_where_several_were_promised_is_a_type_error(hpcray):
    @hpcray.remote(num_returns=2)
    def five():
        return 5

    with pytest.raises(TypeError) as caught:
        hpcray.get(five.remote()[1])
    assert isinstance(caught.value, hpcray.exceptions.RayTaskError)


def test_a_closure_takes_the_values_around_it_along(hpcray):
    def make_adder(amount):
        extra = {"one": 1}

        def helper(x):
            return x + amount

        @hpcray.remote
        def add(x):
            return helper(x) + extra["one"]

        return add

    assert hpcray.get([make_adder(10).remote(1), make_adder(20).remote(1)]) == [12, 22]


def test_a_function_of_the_standard_library_may_be_remote(hpcray):
    assert hpcray.get(hpcray.remote(os.path.join).remote("a", "b")) == "a/b"


def test_two_functions_of_one_name_stay_two(hpcray):
    def make(number):
        @hpcray.remote
        def same_name():
            return number

        return same_name

    first, second = make(1), make(2)
    assert hpcray.get([first.remote(), second.remote(), first.remote()]) == [1, 2, 1]


def test_a_function_is_exported_once_however_often_it_is_called(hpcray):
    pickled = []

    class Captured:
        def __reduce__(self):
            pickled.append(1)
            return str, ("captured",)

    captured = Captured()

    @hpcray.remote
    def read():
        return captured

    assert set(hpcray.get([read.remote() for _ in range(50)])) == {"captured"}
    assert hpcray.get(read.options(num_cpus=0.5).remote()) == "captured"
    assert len(pickled) == 1


def test_tasks_run_in_other_processes_and_two_at_a_time_on_two_cpus(hpcray, gate, wait_until):
    @hpcray.remote
    def pid():
        gate.wait()
        return os.getpid()

    refs = [pid.remote() for _ in range(2)]
    wait_until(lambda: gate.arrived() == 2)
    gate.open()
    assert len({os.getpid(), *hpcray.get(refs)}) == 3


def test_a_worker_runs_in_the_drivers_folder(hpcray):
    @hpcray.remote
    def folder():
        return pathlib.Path.cwd()

    assert hpcray.get(folder.remote()) == pathlib.Path.cwd()


def test_the_threads_of_numerical_libraries_follow_the_cpus_of_the_task(hpcray):
    @hpcray.remote
    def threads():
        return os.environ["OMP_NUM_THREADS"]

    calls = [threads, threads.options(num_cpus=2), threads.options(num_cpus=0.5)]
    assert hpcray.get([call.remote() for call in calls]) == ["1", "2", "1"]


def test_a_thousand_tasks_give_their_results_in_the_order_of_their_refs(hpcray, echo):
    assert hpcray.get([echo.remote(number) for number in range(1000)]) == list(range(1000))
