"""The small things of `ray.util`."""

import importlib
import io
import os
import threading

import numpy as np
import pytest

ON_RAY = os.environ.get("HPCRAY_TEST_IMPL") == "ray"

pytestmark = pytest.mark.usefixtures("ray_start")


# ------------------------------------------------------------------------------------------------------- results as they come
@pytest.fixture
def double(hpcray):
    @hpcray.remote
    def double(x):
        if x == "bad":
            raise ValueError("as told")
        return 2 * x

    return double


def test_as_completed_yields_all_values(hpcray, double):
    refs = [double.remote(x) for x in range(25)]
    assert sorted(hpcray.util.as_completed(refs)) == [2 * x for x in range(25)]
    assert sorted(hpcray.get(list(hpcray.util.as_completed(refs, yield_obj_refs=True)))) == [2 * x for x in range(25)]


def test_as_completed_does_not_wait_for_the_slow(hpcray, double, gate):
    @hpcray.remote
    def slow():
        gate.wait()
        return "slow"

    results = hpcray.util.as_completed([slow.remote(), double.remote(1)], chunk_size=1)
    assert next(results) == 2
    gate.open()
    assert list(results) == ["slow"]


def test_map_unordered_yields_all_values_of_any_iterable(hpcray, double):
    values = (x for x in range(30))
    assert sorted(hpcray.util.map_unordered(double, values, backpressure_size=4, chunk_size=2)) == [
        2 * x for x in range(30)
    ]
    assert sorted(hpcray.util.map_unordered(double, range(5), backpressure_size=None)) == [0, 2, 4, 6, 8]


def test_map_unordered_reads_no_more_items_than_may_be_under_way(hpcray, double):
    read = []
    results = hpcray.util.map_unordered(
        double, (read.append(x) or x for x in range(1000)), backpressure_size=5, chunk_size=1
    )
    next(results)
    assert len(read) == 5
    results.close()


def test_errors_of_tasks_and_wrong_arguments_are_raised(hpcray, double):
    with pytest.raises(ValueError, match="as told"):
        list(hpcray.util.map_unordered(double, [1, "bad"]))
    for options in ({"chunk_size": 0}, {"num_returns": 2}, {"backpressure_size": 0}):
        with pytest.raises(ValueError, match=r"chunk_size|num_returns|backpressure_size"):
            list(hpcray.util.map_unordered(double, [1], **options))
    with pytest.raises(ValueError, match="chunk_size"):
        list(hpcray.util.as_completed([double.remote(1)], chunk_size=0))


# --------------------------------------------------------------------------------------------------------------- this and that
def test_named_actors_are_listed(hpcray):
    @hpcray.remote(num_cpus=0)
    class Named:
        def ready(self):
            return True

    here = Named.options(name="here").remote()
    there = Named.options(name="there", namespace="elsewhere").remote()
    hpcray.get([here.ready.remote(), there.ready.remote()])
    assert hpcray.util.list_named_actors() == ["here"]
    everywhere = hpcray.util.list_named_actors(all_namespaces=True)
    assert {"name": "there", "namespace": "elsewhere"} in everywhere
    assert {entry["name"] for entry in everywhere} == {"here", "there"}


def test_the_address_of_this_host_is_one(hpcray):
    address = hpcray.util.get_node_ip_address()
    assert len([int(part) for part in address.split(".")]) == 4


def test_a_message_is_said_once(hpcray):
    debug = importlib.import_module(f"{hpcray.__name__}.util.debug")
    assert hpcray.util.log_once("a message")
    assert not hpcray.util.log_once("a message")
    assert hpcray.util.log_once("another")
    debug.reset_log_once("a message")
    assert hpcray.util.log_once("a message")
    debug.reset_log_once()
    assert hpcray.util.log_once("another")


def test_accelerators_have_rays_names(hpcray):
    assert hpcray.util.accelerators.NVIDIA_H100 == "H100"
    accelerators = importlib.import_module(f"{hpcray.__name__}.util.accelerators")
    assert accelerators.AMD_INSTINCT_MI250 == "AMD-Instinct-MI250X-MI250"


# ---------------------------------------------------------------------------------------------------------------- serializers
class Unpicklable:
    def __init__(self, value):
        self.value = value
        self.lock = threading.Lock()


@pytest.fixture
def registered(hpcray):
    hpcray.util.register_serializer(
        Unpicklable,
        serializer=lambda thing: {"value": thing.value},
        deserializer=lambda kept: Unpicklable(kept["value"]),
    )
    yield
    hpcray.util.deregister_serializer(Unpicklable)


@pytest.mark.usefixtures("registered")
def test_a_registered_class_travels_as_its_functions_say(hpcray):
    @hpcray.remote
    def value_of(thing, things):
        return thing.value, [one.value for one in things]

    array = np.arange(100_000)
    assert hpcray.get(hpcray.put(Unpicklable(5))).value == 5
    large = hpcray.get(hpcray.put([Unpicklable(array)]))[0].value
    assert (large == array).all()
    assert hpcray.get(value_of.remote(Unpicklable(1), [Unpicklable(2)])) == (1, [2])
    thing = Unpicklable(3)
    assert hpcray.get(hpcray.remote(lambda: thing.value).remote()) == 3


def test_what_is_registered_no_more_is_pickled_as_ever(hpcray):
    hpcray.util.register_serializer(Unpicklable, serializer=lambda thing: 1, deserializer=lambda kept: None)
    hpcray.util.deregister_serializer(Unpicklable)
    hpcray.util.deregister_serializer(Unpicklable)
    with pytest.raises(TypeError, match="lock"):
        hpcray.put(Unpicklable(1))


# ----------------------------------------------------------------------------------------------------------------- inspection
def test_what_can_be_pickled_is_said_to_be(hpcray):
    assert hpcray.util.inspect_serializability([1, "two"], print_file=io.StringIO()) == (True, set())


def test_what_keeps_a_function_from_being_pickled_is_found(hpcray):
    lock = threading.Lock()

    def function():
        return lock

    told = io.StringIO()
    is_serializable, failures = hpcray.util.inspect_serializability(function, name="function", print_file=told)
    assert not is_serializable
    [failure] = failures
    assert failure.obj is lock
    assert failure.parent is function
    assert failure.path == ("function", "lock")
    assert "lock" in told.getvalue()
    assert hash(failure) == hash(failure)


def test_what_keeps_an_object_from_being_pickled_is_found(hpcray):
    thing = Unpicklable(1)
    _, failures = hpcray.util.inspect_serializability(thing, name="thing", print_file=io.StringIO())
    [failure] = failures
    assert failure.obj is thing.lock
    assert failure.path == ("thing", "lock")
    assert "lock" in repr(failure)


def test_no_deeper_than_asked_for(hpcray):
    thing = Unpicklable(1)
    _, failures = hpcray.util.inspect_serializability([thing], depth=0, print_file=io.StringIO())
    assert [failure.obj for failure in failures] == [[thing]]
