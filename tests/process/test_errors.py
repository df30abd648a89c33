"""Exceptions in tasks: they arrive as the user's own type, with the remote traceback, through every path."""

import builtins
import sys
import threading
import traceback

import pytest

pytestmark = pytest.mark.usefixtures("ray_start")


@pytest.fixture
def divide(hpcray):
    @hpcray.remote
    def divide(a, b):
        return a / b

    return divide


def test_an_error_is_the_users_own_type_and_a_task_error(hpcray, divide):
    with pytest.raises(ZeroDivisionError) as caught:
        hpcray.get(divide.remote(1, 0))
    error = caught.value
    assert isinstance(error, hpcray.exceptions.RayTaskError)
    assert isinstance(error, hpcray.exceptions.RayError)
    assert type(error.cause) is ZeroDivisionError
    assert error.cause.args == ("division by zero",)


def test_the_text_has_the_remote_traceback(hpcray, divide):
    with pytest.raises(ZeroDivisionError) as caught:
        hpcray.get(divide.remote(1, 0))
    text = str(caught.value)
    assert "divide" in text.splitlines()[0]
    assert "pid=" in text.splitlines()[0]
    assert "test_errors.py" in text
    assert "return a / b" in text
    assert text.rstrip().endswith("ZeroDivisionError: division by zero")
    assert "return a / b" in "".join(traceback.format_exception(caught.value))


def test_an_exception_class_of_the_user_keeps_its_fields(hpcray):
    class ConvergenceError(Exception):
        def __init__(self, steps, residual):
            super().__init__(steps, residual)
            self.steps = steps
            self.residual = residual

    @hpcray.remote
    def solve():
        raise ConvergenceError(100, 0.5)

    with pytest.raises(ConvergenceError) as caught:
        hpcray.get(solve.remote())
    assert isinstance(caught.value, hpcray.exceptions.RayTaskError)
    assert (caught.value.steps, caught.value.cause.residual) == (100, 0.5)


def test_every_get_of_a_failed_ref_raises_anew(hpcray, divide):
    ref = divide.remote(1, 0)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            hpcray.get(ref)


def test_a_task_can_catch_the_error_of_a_task_it_started(hpcray, divide):
    @hpcray.remote
    def careful():
        try:
            return hpcray.get(divide.remote(1, 0))
        except ZeroDivisionError:
            return "caught"

    assert hpcray.get(careful.remote()) == "caught"


def test_an_error_passes_through_the_tasks_above_it_and_the_text_has_them_all(hpcray, divide):
    @hpcray.remote
    def outer():
        return hpcray.get(divide.remote(1, 0))

    with pytest.raises(ZeroDivisionError) as caught:
        hpcray.get(outer.remote())
    assert "outer" in str(caught.value)
    assert "return a / b" in str(caught.value)


def test_a_task_whose_argument_failed_fails_with_its_error_and_does_not_run(hpcray, divide, counter):
    @hpcray.remote
    def use(x, y=None):
        counter.add()

    for failing in (use.remote(divide.remote(1, 0)), use.remote(1, y=divide.remote(1, 0))):
        with pytest.raises(ZeroDivisionError) as caught:
            hpcray.get(failing)
        assert "use" in str(caught.value)
        assert "return a / b" in str(caught.value)
    assert counter.value() == 0


def test_a_failed_ref_inside_a_container_fails_only_where_it_is_read(hpcray, divide):
    @hpcray.remote
    def count(refs):
        return len(refs)

    assert hpcray.get(count.remote([divide.remote(1, 0)])) == 1


def test_an_error_fails_each_of_several_results(hpcray):
    @hpcray.remote(num_returns=2)
    def fails():
        raise KeyError("both")

    for ref in fails.remote():
        with pytest.raises(KeyError, match="both"):
            hpcray.get(ref)


def test_an_exception_that_cannot_be_pickled_arrives_as_a_task_error_with_its_text(hpcray):
    class HoldsLockError(Exception):
        def __init__(self):
            super().__init__("held")
            self.lock = threading.Lock()

    @hpcray.remote
    def fails():
        raise HoldsLockError

    with pytest.raises(hpcray.exceptions.RayTaskError, match="HoldsLockError"):
        hpcray.get(fails.remote())


def test_an_exception_that_cannot_be_unpickled_arrives_as_an_error_with_its_text(hpcray):
    class TwoArgumentsError(Exception):
        def __init__(self, a, b):
            super().__init__("only one argument is kept")

    @hpcray.remote
    def fails():
        raise TwoArgumentsError(1, 2)

    with pytest.raises(hpcray.exceptions.RayError, match="TwoArgumentsError"):
        hpcray.get(fails.remote())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exception groups came with Python 3.11")
def test_an_exception_group_arrives_as_one(hpcray):
    group = builtins.ExceptionGroup

    @hpcray.remote
    def fails():
        raise group("several", [ValueError("a"), KeyError("b")])

    with pytest.raises(group) as caught:
        hpcray.get(fails.remote())
    assert [type(error) for error in caught.value.exceptions] == [ValueError, KeyError]


def test_an_error_with_a_cause_shows_both(hpcray):
    @hpcray.remote
    def fails():
        try:
            raise KeyError("first")
        except KeyError as error:
            raise ValueError("second") from error

    with pytest.raises(ValueError, match="second") as caught:
        hpcray.get(fails.remote())
    assert "first" in str(caught.value)


def test_an_argument_that_cannot_be_pickled_is_refused_at_the_call_and_named(hpcray):
    @hpcray.remote
    def use(value):
        return value

    with pytest.raises(TypeError, match=r"lock(.|\n)*use|use(.|\n)*lock"):
        use.remote(threading.Lock())


def test_a_value_that_cannot_be_pickled_is_refused_by_put_and_named(hpcray):
    with pytest.raises(TypeError, match="lock"):
        hpcray.put({"inside": threading.Lock()})


def test_a_function_that_captured_what_cannot_be_pickled_is_refused_at_the_call_and_named(hpcray):
    captured_by_mistake = threading.Lock()

    @hpcray.remote
    def use():
        return captured_by_mistake

    with pytest.raises(TypeError, match=r"use(.|\n)*captured_by_mistake"):
        use.remote()


def test_a_result_that_cannot_be_pickled_fails_the_task_and_names_it(hpcray):
    @hpcray.remote
    def make():
        return threading.Lock()

    with pytest.raises(TypeError, match=r"make(.|\n)*lock") as caught:
        hpcray.get(make.remote())
    assert isinstance(caught.value, hpcray.exceptions.RayTaskError)


def test_after_an_error_the_worker_serves_on(hpcray, divide):
    failing = [divide.remote(1, 0) for _ in range(20)]
    assert hpcray.get([divide.remote(x, 1) for x in range(20)]) == list(range(20))
    for ref in failing:
        with pytest.raises(ZeroDivisionError):
            hpcray.get(ref)


def test_an_error_of_the_application_is_not_retried_by_default(hpcray, counter):
    @hpcray.remote(max_retries=3)
    def fails():
        counter.add()
        raise ValueError

    with pytest.raises(ValueError):
        hpcray.get(fails.remote())
    assert counter.value() == 1


@pytest.mark.parametrize("retry_exceptions", [True, [ValueError]], ids=["all", "listed"])
def test_an_error_is_retried_if_the_task_asks_for_it(hpcray, counter, retry_exceptions):
    @hpcray.remote(max_retries=3, retry_exceptions=retry_exceptions)
    def fails_twice():
        if counter.add() < 3:
            raise ValueError
        return "third time"

    assert hpcray.get(fails_twice.remote()) == "third time"


def test_an_error_that_is_not_in_the_list_is_not_retried(hpcray, counter):
    @hpcray.remote(max_retries=3, retry_exceptions=[KeyError])
    def fails():
        counter.add()
        raise ValueError

    with pytest.raises(ValueError):
        hpcray.get(fails.remote())
    assert counter.value() == 1
