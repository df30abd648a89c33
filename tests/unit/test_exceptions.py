"""What users catch: Ray's names, their fields, and their way through pickles."""

import copy
import inspect
import pickle

import pytest

from hpcray import exceptions, payload
from hpcray.exceptions import ActorDiedError, RayActorError, RayError, RayTaskError
from hpcray.worker.serialization import dump_error, load_error

CLASSES = [
    cls for _, cls in inspect.getmembers(exceptions, inspect.isclass) if issubclass(cls, Exception)
]  # fmt: skip


class SlotsError(Exception):
    __slots__ = ("code",)

    def __init__(self, code):
        super().__init__(code)
        self.code = code


class NeedsTwoError(Exception):
    def __init__(self, a, b):
        super().__init__("one")


def task_error(cause, name="f"):
    return RayTaskError(name, f"Traceback:\n{cause!r}", cause, 12, "node1")


def raised_by_get(cause):
    return load_error(dump_error(task_error(cause)))


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_each_exception_survives_pickling_with_its_text_and_its_fields(cls):
    error = task_error(KeyError("x")) if cls is RayTaskError else cls("what happened")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert str(again) == str(error)
    assert vars(again).keys() == vars(error).keys()


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_each_exception_is_a_ray_error(cls):
    assert issubclass(cls, RayError)


@pytest.mark.parametrize(
    "copied", [lambda e: e, lambda e: pickle.loads(pickle.dumps(e)), copy.copy], ids=["", "p", "c"]
)
def test_a_task_error_is_of_the_users_class_too_and_has_its_attributes(copied):
    cause = FileNotFoundError(2, "no such file", "data.csv")
    cause.step = 7
    error = copied(raised_by_get(cause))
    assert isinstance(error, RayTaskError)
    assert isinstance(error, FileNotFoundError)
    assert type(error).__name__ == type(error).__qualname__ == "RayTaskError(FileNotFoundError)"
    assert (error.errno, error.filename, error.step) == (2, "data.csv", 7)
    assert error.args == (error.cause,)
    assert error.__cause__ is None
    assert str(error).startswith("hpcray::f() (pid=12, ip=node1)\n")
    assert not hasattr(error, "nothing_of_the_kind")


def test_attributes_in_slots_arrive():
    assert raised_by_get(SlotsError(3)).code == 3


def test_an_error_of_rays_own_classes_is_of_that_class_too():
    error = raised_by_get(exceptions.GetTimeoutError("late"))
    assert isinstance(error, exceptions.GetTimeoutError)
    assert isinstance(error, RayTaskError)


def test_a_cause_that_cannot_be_pickled_is_described_by_a_ray_error():
    class LocalError(Exception):
        def __reduce__(self):
            raise TypeError("not me")

    error = raised_by_get(LocalError())
    assert type(error) is RayTaskError
    assert type(error.cause) is RayError
    assert "LocalError" in str(error.cause)


def test_a_cause_that_cannot_be_unpickled_is_described():
    error = raised_by_get(NeedsTwoError(1, 2))
    assert type(error) is exceptions.UnserializableException
    assert "NeedsTwoError" in str(error)


def test_a_class_that_admits_no_second_base_gives_the_bare_task_error():
    class Sealed(Exception):
        def __init_subclass__(cls):
            raise TypeError("sealed")

    cause = Sealed("text")
    error = task_error(cause).as_instanceof_cause()
    assert type(error) is RayTaskError
    assert error.cause is cause


def test_the_error_of_an_argument_names_the_task_that_did_not_run_and_keeps_the_class():
    error = load_error(payload.dependency_error("use", dump_error(task_error(KeyError("x"), "make"))))
    assert isinstance(error, KeyError)
    assert str(error).startswith("hpcray::use()\n")
    assert "hpcray::make() (pid=12" in str(error)


def test_an_actor_whose_creation_failed_is_dead_and_says_why():
    inner = dump_error(task_error(ValueError("in the constructor"), "Keeper.__init__"))
    error = load_error(payload.creation_error(b"\1" * 24, "Keeper", inner))
    assert type(error) is ActorDiedError
    assert not isinstance(error, ValueError)
    assert error.actor_init_failed
    assert error.actor_id == "01" * 16
    assert "in the constructor" in str(error)


def test_a_dead_actors_error_names_it_and_the_reason():
    error = load_error(payload.actor_died(b"\1" * 24, "Keeper", "process 5 exited."))
    assert isinstance(error, RayActorError)
    assert not error.actor_init_failed
    assert str(error) == f"The actor {'01' * 16} (Keeper) died: process 5 exited."
