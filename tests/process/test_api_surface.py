"""What a user can say: names, signatures, decorator forms, options, and the errors of wrong calls."""

import inspect
import os

import cloudpickle
import pytest

pytestmark = pytest.mark.usefixtures("ray_start")

NO_CANCEL_YET = pytest.mark.xfail(
    os.environ.get("HPCRAY_TEST_IMPL") != "ray",
    reason="hpcray has no cancel() yet: one that left running tasks alone would promise too much",
    raises=AttributeError,
)

FUNCTIONS = {
    "shutdown": [],
    "is_initialized": [],
    "get": ["timeout"],
    "put": [],
    "wait": ["num_returns", "timeout", "fetch_local"],
    "kill": ["no_restart"],
    "cancel": ["force", "recursive"],
    "get_actor": ["namespace"],
    "nodes": [],
    "cluster_resources": [],
    "available_resources": [],
    "get_runtime_context": [],
}

EXCEPTIONS = {
    "RayError": ["Exception"],
    "RayTaskError": ["RayError"],
    "TaskCancelledError": ["RayError"],
    "WorkerCrashedError": ["RayError"],
    "RayActorError": ["RayError"],
    "ActorDiedError": ["RayActorError"],
    "ActorUnavailableError": ["RayActorError"],
    "RaySystemError": ["RayError"],
    "ObjectStoreFullError": ["RayError"],
    "OutOfDiskError": ["RayError"],
    "OutOfMemoryError": ["RayError"],
    "NodeDiedError": ["RayError"],
    "ObjectLostError": ["RayError"],
    "ObjectFetchTimedOutError": ["ObjectLostError"],
    "OwnerDiedError": ["ObjectLostError"],
    "ObjectReconstructionFailedError": ["ObjectLostError"],
    "GetTimeoutError": ["RayError", "TimeoutError"],
    "RuntimeEnvSetupError": ["RayError"],
    "TaskPlacementGroupRemoved": ["RayError"],
    "ActorPlacementGroupRemoved": ["RayError"],
    "PendingCallsLimitExceeded": ["RayError"],
    "TaskUnschedulableError": ["RayError"],
    "ActorUnschedulableError": ["RayError"],
    "ActorAlreadyExistsError": ["ValueError", "RayError"],
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=NO_CANCEL_YET) if name == "cancel" else name for name in FUNCTIONS]
)
def test_each_function_takes_rays_keywords(hpcray, name):
    parameters = inspect.signature(getattr(hpcray, name)).parameters
    assert set(FUNCTIONS[name]) <= set(parameters)


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_each_exception_has_rays_name_and_bases(hpcray, name):
    exception = getattr(hpcray.exceptions, name)
    assert set(EXCEPTIONS[name]) <= {base.__name__ for base in exception.__mro__}


def test_a_remote_function_called_directly_says_what_to_write_instead(hpcray):
    @hpcray.remote
    def compute():
        return 1

    with pytest.raises(TypeError, match=r"compute\.remote\("):
        compute()


def test_an_actor_class_called_directly_says_what_to_write_instead(hpcray):
    @hpcray.remote
    class Keeper:
        pass

    with pytest.raises(TypeError, match=r"Keeper\.remote\("):
        Keeper()


def test_an_actor_method_called_directly_says_what_to_write_instead(hpcray):
    @hpcray.remote
    class Keeper:
        def read(self):
            return 1

    keeper = Keeper.remote()
    with pytest.raises(TypeError, match=r"read\.remote\("):
        keeper.read()


def test_arguments_that_do_not_fit_are_refused_where_the_call_is_written(hpcray):
    @hpcray.remote
    def compute(x, *, factor=1):
        return x * factor

    @hpcray.remote
    class Keeper:
        def __init__(self, value):
            self.value = value

        def add(self, amount):
            self.value += amount

    with pytest.raises(TypeError, match="missing a required argument: 'x'"):
        compute.remote()
    with pytest.raises(TypeError, match="too many positional arguments"):
        compute.remote(1, 2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'power'"):
        compute.remote(1, power=2)
    with pytest.raises(TypeError, match="missing a required argument: 'value'"):
        Keeper.remote()
    with pytest.raises(TypeError, match="too many positional arguments"):
        Keeper.remote(1).add.remote(1, 2)


def test_remote_is_a_decorator_a_decorator_with_options_and_a_plain_function(hpcray):
    @hpcray.remote
    def bare():
        return "bare"

    @hpcray.remote(num_cpus=1, max_retries=0)
    def with_options():
        return "with options"

    plain = hpcray.remote(lambda: "plain")
    plain_with_options = hpcray.remote(num_cpus=0.5)(lambda: "plain with options")

    functions = [bare, with_options, plain, plain_with_options]
    assert hpcray.get([f.remote() for f in functions]) == [
        "bare",
        "with options",
        "plain",
        "plain with options",
    ]


@pytest.mark.parametrize("arguments", [(), (5,), (print, 5)], ids=["nothing", "a number", "two values"])
def test_remote_of_anything_else_is_refused(hpcray, arguments):
    with pytest.raises((TypeError, AssertionError), match="remote"):
        hpcray.remote(*arguments)


def test_remote_of_a_remote_function_is_refused(hpcray):
    @hpcray.remote
    def compute():
        return 1

    with pytest.raises(TypeError, match="function or a class"):
        hpcray.remote(compute)


def test_remote_of_a_coroutine_function_is_refused(hpcray):
    async def compute():
        return 1

    with pytest.raises(ValueError, match="async"):
        hpcray.remote(compute).remote()


COMMON_MISTAKES = [
    ({"num_cpu": 1}, ValueError, "num_cpu"),
    ({"num_cpus": -1}, ValueError, "num_cpus"),
    ({"num_cpus": "one"}, TypeError, "num_cpus"),
    ({"num_cpus": 0.00001}, ValueError, "num_cpus"),
    ({"num_gpus": -0.5}, ValueError, "num_gpus"),
    ({"memory": -1}, ValueError, "memory"),
    ({"resources": {"licence": -1}}, ValueError, "licence"),
    ({"resources": {"CPU": 1}}, ValueError, "num_cpus"),
    ({"resources": ["licence"]}, TypeError, "resources"),
    ({"name": 5}, TypeError, "name"),
    ({"scheduling_strategy": 5}, TypeError, "scheduling_strategy"),
]
TASK_MISTAKES = [
    ({"num_returns": -1}, ValueError, "num_returns"),
    ({"num_returns": 1.5}, TypeError, "num_returns"),
    ({"max_retries": -2}, ValueError, "max_retries"),
    ({"max_retries": 0.5}, TypeError, "max_retries"),
    ({"retry_exceptions": 5}, TypeError, "retry_exceptions"),
    ({"retry_exceptions": [5]}, ValueError, "retry_exceptions"),
    ({"max_restarts": 1}, ValueError, "max_restarts"),
]
ACTOR_MISTAKES = [
    ({"max_restarts": -2}, ValueError, "max_restarts"),
    ({"max_task_retries": -2}, ValueError, "max_task_retries"),
    ({"max_concurrency": -1}, ValueError, "max_concurrency"),
    ({"lifetime": "forever"}, ValueError, "lifetime"),
    ({"num_returns": 2}, ValueError, "num_returns"),
    ({"max_retries": 1}, ValueError, "max_retries"),
    ({"get_if_exists": True}, ValueError, "name"),
]


@pytest.mark.parametrize(("options", "error", "named"), COMMON_MISTAKES + TASK_MISTAKES, ids=str)
def test_a_wrong_task_option_names_itself_in_both_forms(hpcray, options, error, named):
    def compute():
        return 1

    with pytest.raises(error, match=named):
        hpcray.remote(**options)(compute)
    with pytest.raises(error, match=named):
        hpcray.remote(compute).options(**options)


@pytest.mark.parametrize(("options", "error", "named"), COMMON_MISTAKES + ACTOR_MISTAKES, ids=str)
def test_a_wrong_actor_option_names_itself_in_both_forms(hpcray, options, error, named):
    class Keeper:
        pass

    with pytest.raises(error, match=named):
        hpcray.remote(**options)(Keeper)
    with pytest.raises(error, match=named):
        hpcray.remote(Keeper).options(**options)


def test_an_empty_actor_name_or_namespace_is_refused(hpcray):
    @hpcray.remote
    class Keeper:
        pass

    with pytest.raises(ValueError, match="name"):
        Keeper.options(name="").remote()
    with pytest.raises(ValueError, match="namespace"):
        Keeper.options(name="keeper", namespace="").remote()


@pytest.mark.parametrize(
    "options",
    [
        {"num_cpus": 0},
        {"num_cpus": 0.5},
        {"num_cpus": None},
        {"max_retries": -1},
        {"name": "x"},
        {"num_returns": 1},
    ],
    ids=str,
)
def test_a_right_option_is_accepted(hpcray, options):
    @hpcray.remote
    def compute():
        return 1

    assert hpcray.get(compute.options(**options).remote()) == 1


def test_options_hold_for_one_call_and_leave_the_function_as_it_was(hpcray):
    @hpcray.remote
    def pair():
        return 1, 2

    first, second = pair.options(num_returns=2).remote()
    assert hpcray.get([first, second]) == [1, 2]
    assert hpcray.get(pair.remote()) == (1, 2)


def test_options_override_what_the_decorator_said(hpcray):
    @hpcray.remote(num_returns=2)
    def pair():
        return 1, 2

    assert hpcray.get(pair.options(num_returns=1).remote()) == (1, 2)


def test_kill_takes_actors_only(hpcray):
    for not_an_actor in (5, hpcray.put(1)):
        with pytest.raises(ValueError, match="actors"):
            hpcray.kill(not_an_actor)


@NO_CANCEL_YET
def test_cancel_takes_refs_only(hpcray):
    @hpcray.remote
    class Keeper:
        pass

    for not_a_ref in (5, Keeper.remote()):
        with pytest.raises(TypeError, match="kill"):
            hpcray.cancel(not_a_ref)


def test_a_remote_function_and_its_options_can_be_sent_to_a_task(hpcray):
    @hpcray.remote
    def double(x):
        return 2 * x

    @hpcray.remote
    def apply(function, x):
        return hpcray.get(function.remote(x))

    assert hpcray.get(apply.remote(double, 4)) == 8


def test_an_actor_class_can_be_sent_to_a_task(hpcray):
    @hpcray.remote
    class Keeper:
        def __init__(self, value):
            self.value = value

        def read(self):
            return self.value

    @hpcray.remote
    def create(actor_class):
        return hpcray.get(actor_class.remote(6).read.remote())

    assert hpcray.get(create.remote(Keeper)) == 6


def test_a_task_error_survives_pickling(hpcray):
    @hpcray.remote
    def fails():
        raise KeyError("lost")

    with pytest.raises(hpcray.exceptions.RayTaskError) as caught:
        hpcray.get(fails.remote())
    copy = cloudpickle.loads(cloudpickle.dumps(caught.value))
    assert isinstance(copy, KeyError)
    assert isinstance(copy, hpcray.exceptions.RayTaskError)
    assert str(copy) == str(caught.value)
