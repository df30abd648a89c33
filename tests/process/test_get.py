"""`get`: one or many, in order, with a time-out, and never of something else."""

import threading

import pytest

pytestmark = pytest.mark.usefixtures("ray_start")


def test_get_of_one_ref_gives_its_value_and_of_a_list_the_values_in_order(hpcray):
    refs = [hpcray.put(number) for number in range(3)]
    assert hpcray.get(refs[1]) == 1
    assert hpcray.get([refs[2], refs[0], refs[2]]) == [2, 0, 2]
    assert hpcray.get([]) == []


@pytest.mark.parametrize("value", [5, None, "text", {}, ()], ids=repr)
def test_get_of_anything_but_a_ref_or_a_list_is_refused(hpcray, value):
    with pytest.raises(ValueError, match=type(value).__name__):
        hpcray.get(value)


def test_get_of_a_list_with_something_else_in_it_is_refused(hpcray):
    with pytest.raises(TypeError, match="5"):
        hpcray.get([hpcray.put(1), 5])


@pytest.mark.parametrize("timeout", [0, 0.05])
def test_get_of_what_is_not_there_in_time_is_a_timeout_error(hpcray, gate, timeout):
    @hpcray.remote
    def slow():
        gate.wait()
        return 1

    ref = slow.remote()
    with pytest.raises(hpcray.exceptions.GetTimeoutError) as caught:
        hpcray.get(ref, timeout=timeout)
    assert isinstance(caught.value, TimeoutError)
    gate.open()
    assert hpcray.get(ref, timeout=30) == 1, "a time-out leaves the task running"


def test_get_with_timeout_zero_gives_what_is_there(hpcray):
    assert hpcray.get(hpcray.put(1), timeout=0) == 1
    assert hpcray.get([hpcray.put(1), hpcray.put(2)], timeout=0) == [1, 2]


def test_get_of_many_times_out_if_one_of_them_is_missing(hpcray, gate):
    @hpcray.remote
    def slow():
        gate.wait()

    with pytest.raises(hpcray.exceptions.GetTimeoutError):
        hpcray.get([hpcray.put(1), slow.remote()], timeout=0.05)


def test_get_of_many_raises_the_error_of_one(hpcray):
    @hpcray.remote
    def fails():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        hpcray.get([hpcray.put(1), fails.remote(), hpcray.put(2)])


def test_a_value_is_a_copy_and_changing_it_changes_nothing_else(hpcray):
    ref = hpcray.put([1, 2])
    hpcray.get(ref).append(3)
    assert hpcray.get(ref) == [1, 2]


def test_several_threads_of_the_driver_may_get_at_once(hpcray, gate):
    @hpcray.remote
    def slow(x):
        gate.wait()
        return x

    refs = [slow.options(num_cpus=0).remote(x) for x in range(4)]
    results = {}

    def get_into_results(x):
        results[x] = hpcray.get(refs[x])

    threads = [threading.Thread(target=get_into_results, args=(x,)) for x in range(4)]
    for thread in threads:
        thread.start()
    gate.open()
    for thread in threads:
        thread.join(timeout=60)
    assert results == {x: x for x in range(4)}
