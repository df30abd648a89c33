"""Actors: state, order, handles that travel, errors, and how an actor ends."""

import gc
import os
import signal

import numpy as np
import psutil
import pytest

pytestmark = pytest.mark.usefixtures("ray_start")


@pytest.fixture
def counter_class(hpcray):
    @hpcray.remote
    class Counter:
        def __init__(self, start=0, *, step=1):
            self.value = start
            self.step = step

        def add(self, amount=None):
            self.value += self.step if amount is None else amount
            return self.value

        def fail(self):
            self.value += 100
            raise ValueError("in the method")

        def pid(self):
            return os.getpid()

        def die(self):
            os._exit(1)

    return Counter


def ended(pid):
    """True when the process is gone, or a zombie that its parent has yet to collect."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_an_actor_is_made_with_arguments_and_keeps_state(hpcray, counter_class):
    counter = counter_class.remote(10, step=5)
    assert hpcray.get(counter.add.remote()) == 15
    assert hpcray.get(counter.add.remote(amount=1)) == 16


def test_calls_of_one_caller_run_in_the_order_they_were_made(hpcray, counter_class):
    counter = counter_class.remote()
    assert hpcray.get([counter.add.remote() for _ in range(1000)]) == list(range(1, 1001))


def test_two_actors_have_their_own_state_and_their_own_process(hpcray, counter_class):
    first, second = counter_class.remote(), counter_class.remote(100)
    hpcray.get([first.add.remote(), second.add.remote()])
    assert hpcray.get([first.add.remote(), second.add.remote()]) == [2, 102]
    assert len({os.getpid(), *hpcray.get([first.pid.remote(), second.pid.remote()])}) == 3


def test_an_actor_stays_in_one_process(hpcray, counter_class):
    counter = counter_class.remote()
    assert len(set(hpcray.get([counter.pid.remote() for _ in range(10)]))) == 1


def test_refs_as_arguments_of_constructor_and_methods_arrive_as_values(hpcray, counter_class):
    counter = counter_class.remote(hpcray.put(10), step=hpcray.put(2))
    assert hpcray.get(counter.add.remote()) == 12
    assert hpcray.get(counter.add.remote(counter.add.remote())) == 28


def test_an_argument_that_comes_late_does_not_let_later_calls_overtake(hpcray, counter_class, gate):
    @hpcray.remote
    def slow():
        gate.wait()
        return 10

    counter = counter_class.remote()
    late, after = counter.add.remote(slow.remote()), counter.add.remote(1)
    gate.open()
    assert hpcray.get([late, after]) == [10, 11]


def test_a_handle_may_be_passed_to_tasks_and_inside_containers(hpcray, counter_class):
    @hpcray.remote
    def add(counter):
        return hpcray.get(counter.add.remote())

    @hpcray.remote
    def add_in(holder):
        return hpcray.get(holder["counter"].add.remote())

    counter = counter_class.remote()
    hpcray.get([add.remote(counter) for _ in range(5)] + [add_in.remote({"counter": counter})])
    assert hpcray.get(counter.add.remote()) == 7


def test_a_handle_may_be_passed_to_another_actor(hpcray, counter_class):
    @hpcray.remote
    class Forwarder:
        def __init__(self, target):
            self.target = target

        def add(self):
            return hpcray.get(self.target.add.remote())

    counter = counter_class.remote()
    forwarder = Forwarder.remote(counter)
    assert hpcray.get([forwarder.add.remote() for _ in range(3)]) == [1, 2, 3]


def test_a_handle_may_be_put_and_returned(hpcray, counter_class):
    @hpcray.remote
    def create():
        return counter_class.remote(5)

    made = hpcray.get(create.remote())
    assert hpcray.get(made.add.remote()) == 6
    again = hpcray.get(hpcray.put(made))
    assert hpcray.get(again.add.remote()) == 7
    assert again == made
    assert hash(again) == hash(made)


def test_an_actor_may_call_itself_through_its_own_handle(hpcray):
    @hpcray.remote
    class Selfish:
        def me(self):
            return hpcray.get_runtime_context().current_actor

    actor = Selfish.remote()
    assert hpcray.get(actor.me.remote()) == actor


def test_large_arguments_and_results_pass_through_methods(hpcray):
    @hpcray.remote
    class Store:
        def keep(self, array):
            self.array = array
            return array.nbytes

        def read(self):
            return self.array * 2

    store = Store.remote()
    assert hpcray.get(store.keep.remote(np.ones(500_000))) == 4_000_000
    result = hpcray.get(store.read.remote())
    assert result.sum() == 1_000_000
    assert not result.flags.writeable


def test_a_method_may_return_several_values(hpcray):
    @hpcray.remote
    class Pairs:
        @hpcray.method(num_returns=2)
        def pair(self):
            return 1, 2

    actor = Pairs.remote()
    assert hpcray.get(actor.pair.remote()) == [1, 2]
    assert hpcray.get(actor.pair.options(num_returns=1).remote()) == (1, 2)


def test_inherited_static_class_and_private_methods_can_be_called(hpcray):
    class Base:
        def inherited(self):
            return "inherited"

    @hpcray.remote
    class Derived(Base):
        @staticmethod
        def static():
            return "static"

        @classmethod
        def of_class(cls):
            return "class"

        def _private(self):
            return "private"

        def __call__(self):
            return "called"

    actor = Derived.remote()
    methods = [actor.inherited, actor.static, actor.of_class, actor._private, actor.__call__]
    assert hpcray.get([method.remote() for method in methods]) == [
        "inherited",
        "static",
        "class",
        "private",
        "called",
    ]


def test_a_missing_method_is_an_attribute_error_in_the_caller(hpcray, counter_class):
    with pytest.raises(AttributeError, match="subtract"):
        counter_class.remote().subtract.remote()


def test_a_handle_shows_its_class_and_its_methods(hpcray, counter_class):
    counter = counter_class.remote()
    assert repr(counter).startswith("Actor(")
    assert repr(counter).endswith(f"Counter, {counter._actor_id.hex()})")
    assert {"add", "fail", "pid"} <= set(dir(counter))


def test_an_error_in_a_method_is_the_users_type_and_leaves_the_actor_alive(hpcray, counter_class):
    counter = counter_class.remote()
    with pytest.raises(ValueError, match="in the method") as caught:
        hpcray.get(counter.fail.remote())
    assert isinstance(caught.value, hpcray.exceptions.RayTaskError)
    assert "Counter.fail" in str(caught.value).splitlines()[0]
    assert hpcray.get(counter.add.remote()) == 101


def test_an_error_in_an_argument_fails_the_call_and_leaves_the_actor_alive(hpcray, counter_class):
    @hpcray.remote
    def fails():
        raise KeyError("argument")

    counter = counter_class.remote()
    with pytest.raises(KeyError, match="argument"):
        hpcray.get(counter.add.remote(fails.remote()))
    assert hpcray.get(counter.add.remote()) == 1


def test_an_error_in_the_constructor_fails_every_call(hpcray):
    @hpcray.remote
    class Broken:
        def __init__(self):
            raise ValueError("in the constructor")

        def read(self):
            return 1

    broken = Broken.remote()
    for _ in range(2):
        with pytest.raises(hpcray.exceptions.ActorDiedError, match="in the constructor") as caught:
            hpcray.get(broken.read.remote())
        assert caught.value.actor_init_failed
        assert "__init__" in str(caught.value)


def test_an_error_in_an_argument_of_the_constructor_fails_every_call(hpcray, counter_class):
    @hpcray.remote
    def fails():
        raise KeyError("argument")

    with pytest.raises(hpcray.exceptions.ActorDiedError, match="argument"):
        hpcray.get(counter_class.remote(fails.remote()).add.remote())


def test_the_name_of_an_actor_whose_creation_failed_is_free_and_everybody_learns_why(hpcray, counter_class):
    @hpcray.remote
    def fails():
        raise KeyError("argument")

    @hpcray.remote
    def use(counter):
        return hpcray.get(counter.add.remote())

    failed = counter_class.options(name="reborn").remote(fails.remote())
    with pytest.raises(hpcray.exceptions.ActorDiedError, match="argument"):
        hpcray.get(use.remote(failed))
    assert hpcray.get(counter_class.options(name="reborn").remote(5).add.remote()) == 6


def test_an_actor_ends_when_its_last_handle_goes(hpcray, counter_class, wait_until):
    counter = counter_class.remote()
    pid = hpcray.get(counter.pid.remote())
    second = counter
    del counter
    gc.collect()
    assert hpcray.get(second.pid.remote()) == pid
    del second
    gc.collect()
    wait_until(lambda: ended(pid), on_timeout=lambda: psutil.Process(pid))


def test_calls_made_before_the_last_handle_went_are_still_answered(hpcray, counter_class):
    assert hpcray.get(counter_class.remote(3).add.remote()) == 4
    refs = [counter_class.remote(start).add.remote() for start in range(3)]
    gc.collect()
    assert hpcray.get(refs) == [1, 2, 3]


def test_a_handle_held_by_another_actor_keeps_the_actor_alive(hpcray, counter_class, wait_until):
    @hpcray.remote
    class Holder:
        def hold(self, handle):
            self.handle = handle

        def pid(self):
            return hpcray.get(self.handle.pid.remote())

        def let_go(self):
            del self.handle

    holder, counter = Holder.remote(), counter_class.remote()
    hpcray.get(holder.hold.remote(counter))
    pid = hpcray.get(counter.pid.remote())
    del counter
    gc.collect()
    assert hpcray.get(holder.pid.remote()) == pid
    hpcray.get(holder.let_go.remote())
    wait_until(lambda: ended(pid))


def test_a_killed_actor_ends_and_its_calls_fail(hpcray, counter_class, wait_until):
    counter = counter_class.remote()
    pid = hpcray.get(counter.pid.remote())
    hpcray.kill(counter)
    with pytest.raises(hpcray.exceptions.ActorDiedError, match="kill"):
        hpcray.get(counter.add.remote())
    wait_until(lambda: ended(pid))


def test_a_killed_actor_that_may_restart_comes_back_in_a_new_process(hpcray, counter_class, wait_until):
    counter = counter_class.options(max_restarts=1).remote(5)
    first = hpcray.get(counter.pid.remote())
    hpcray.kill(counter, no_restart=False)

    def pid():
        try:
            return hpcray.get(counter.pid.remote())
        except hpcray.exceptions.RayActorError:
            return first

    wait_until(lambda: pid() != first)
    assert hpcray.get(counter.add.remote()) == 6


@pytest.mark.parametrize("way", ["os._exit", "SIGKILL", "sys.exit"])
def test_an_actor_whose_process_dies_fails_its_running_and_its_later_calls(hpcray, way):
    @hpcray.remote
    class Mortal:
        def die(self):
            if way == "os._exit":
                os._exit(3)
            elif way == "SIGKILL":
                os.kill(os.getpid(), signal.SIGKILL)
            raise SystemExit(4)

        def read(self):
            return 1

    mortal = Mortal.remote()
    running, queued = mortal.die.remote(), mortal.read.remote()
    for ref in (running, queued, mortal.read.remote()):
        with pytest.raises(hpcray.exceptions.ActorDiedError) as caught:
            hpcray.get(ref)
        assert isinstance(caught.value, hpcray.exceptions.RayActorError)
        assert caught.value.actor_id == mortal._actor_id.hex()
        assert not caught.value.actor_init_failed


def test_the_death_of_one_actor_leaves_the_others_alone(hpcray, counter_class):
    first, second = counter_class.remote(), counter_class.remote()
    hpcray.get(second.add.remote())
    with pytest.raises(hpcray.exceptions.ActorDiedError):
        hpcray.get(first.die.remote())
    assert hpcray.get(second.add.remote()) == 2


def test_a_named_actor_is_found_by_its_name(hpcray, counter_class):
    counter = counter_class.options(name="the counter").remote(1)
    hpcray.get(counter.add.remote())

    @hpcray.remote
    def add():
        return hpcray.get(hpcray.get_actor("the counter").add.remote())

    assert hpcray.get(add.remote()) == 3
    assert hpcray.get_actor("the counter") == counter


def test_a_name_that_is_taken_is_refused_and_free_again_after_the_actors_end(hpcray, counter_class, wait_until):
    counter = counter_class.options(name="taken").remote()
    hpcray.get(counter.add.remote())
    with pytest.raises(ValueError, match="taken") as caught:
        counter_class.options(name="taken").remote()
    assert isinstance(caught.value, hpcray.exceptions.ActorAlreadyExistsError)
    hpcray.kill(counter)

    def name_is_free():
        try:
            hpcray.get_actor("taken")
        except ValueError:
            return True
        return False

    wait_until(name_is_free)
    assert hpcray.get(counter_class.options(name="taken").remote(5).add.remote()) == 6


def test_a_name_that_nobody_has_is_a_value_error_that_names_it(hpcray):
    with pytest.raises(ValueError, match="nobody"):
        hpcray.get_actor("nobody")
    with pytest.raises(ValueError):
        hpcray.get_actor("")


def test_get_if_exists_gives_the_actor_that_is_there(hpcray, counter_class):
    options = {"name": "shared", "get_if_exists": True}
    first = counter_class.options(**options).remote(10)
    second = counter_class.options(**options).remote(20)
    assert hpcray.get(first.add.remote()) == 11
    assert hpcray.get(second.add.remote()) == 12


def test_many_actors_share_the_cpus_since_an_idle_actor_holds_none(hpcray, counter_class):
    counters = [counter_class.remote(number) for number in range(6)]
    assert hpcray.get([counter.add.remote() for counter in counters]) == [1, 2, 3, 4, 5, 6]
