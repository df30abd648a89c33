"""Placement groups as users see them: creation, what runs in them, removal, names, errors of bad input."""

from __future__ import annotations

import importlib
import math
import os
import pickle
import time
from types import SimpleNamespace

import pytest

INIT = {"num_cpus": 4, "num_gpus": 2, "resources": {"licence": 2}}
pytestmark = pytest.mark.usefixtures("ray_start")


@pytest.fixture
def pgs(hpcray):
    """The module of placement groups, whose groups of one test are removed at its end."""
    module = importlib.import_module(f"{hpcray.__name__}.util.placement_group")
    made = []

    def create(*args, **kwargs):
        made.append(module.placement_group(*args, **kwargs))
        return made[-1]

    wrapped = {name: getattr(module, name) for name in dir(module) if not name.startswith("__")}
    yield SimpleNamespace(**{**wrapped, "placement_group": create})
    for group in made:
        module.remove_placement_group(group)


@pytest.fixture
def inside(hpcray):
    """``f.options(**inside(group, 1))``: the options of what runs in a group."""
    strategy = importlib.import_module(f"{hpcray.__name__}.util.scheduling_strategies").PlacementGroupSchedulingStrategy

    def options(group, index=-1, *, capture=None, **others):
        return {"scheduling_strategy": strategy(group, index, capture), **others}

    return options


@pytest.fixture
def where(hpcray, pgs):
    """A task that tells the group that it is in, as hexadecimal digits, or None."""
    current = pgs.get_current_placement_group

    @hpcray.remote
    def where():
        group = current()
        assert hpcray.get_runtime_context().get_placement_group_id() == (group and group.id.hex())
        return group and group.id.hex()

    return where


@pytest.fixture
def place_class(hpcray, pgs, gate):
    current = pgs.get_current_placement_group

    @hpcray.remote
    class Place:
        def where(self):
            group = current()
            return group and group.id.hex()

        def call(self, function):
            return hpcray.get(function.remote())

        def create(self, cls):
            return hpcray.get(cls.remote().where.remote())

        def wait(self):
            gate.wait()

        def devices(self):
            return os.environ.get("CUDA_VISIBLE_DEVICES")

    return Place


# ----------------------------------------------------------------------------------------------------------- ready and wait
@pytest.mark.parametrize("strategy", ["PACK", "SPREAD", "STRICT_PACK"])
def test_a_group_for_which_there_is_room_is_ready(hpcray, pgs, strategy):
    group = pgs.placement_group([{"CPU": 1}, {"CPU": 2, "GPU": 1}], strategy=strategy)
    assert group.wait(30)
    assert hpcray.get(group.ready(), timeout=30) == group
    assert hpcray.get([group.ready(), group.ready()], timeout=30) == [group, group]


@pytest.mark.parametrize(
    ("bundles", "strategy"),
    [([{"CPU": 5}], "PACK"), ([{"CPU": 3}, {"CPU": 2}], "STRICT_PACK"), ([{"CPU": 1}, {"CPU": 1}], "STRICT_SPREAD")],
)
def test_a_group_without_room_is_pending(hpcray, pgs, bundles, strategy):
    group = pgs.placement_group(bundles, strategy=strategy)
    assert not group.wait(0.1)
    assert not group.wait(0)
    ready, pending = hpcray.wait([group.ready()], timeout=0.1)
    assert not ready
    with pytest.raises(hpcray.exceptions.GetTimeoutError):
        hpcray.get(pending, timeout=0.1)
    assert pgs.placement_group_table(group)["state"] == "PENDING"


def test_a_pending_group_is_placed_when_another_is_removed(hpcray, pgs):
    first, second = (pgs.placement_group([{"CPU": 2}, {"CPU": 2}]) for _ in range(2))
    assert first.wait(30)
    ready = second.ready()
    assert not second.wait(0.2)
    pgs.remove_placement_group(first)
    assert hpcray.get(ready, timeout=30) == second


def test_a_group_waits_for_tasks_that_run(hpcray, pgs, gate, wait_until):
    @hpcray.remote(num_cpus=3)
    def hold():
        gate.wait()

    held = hold.remote()
    wait_until(gate.arrived)
    group = pgs.placement_group([{"CPU": 2}])
    assert not group.wait(0.2)
    gate.open()
    assert group.wait(30)
    hpcray.get(held)


def test_what_a_group_has_set_aside_nobody_else_gets(hpcray, pgs, where):
    group = pgs.placement_group([{"CPU": 4}])
    assert group.wait(30)
    outside = where.remote()
    assert not hpcray.wait([outside], timeout=0.3)[0]
    pgs.remove_placement_group(group)
    assert hpcray.get(outside, timeout=30) is None


def test_fractions(hpcray, pgs):
    groups = [pgs.placement_group([{"CPU": 0.25, "licence": 0.5}] * 2) for _ in range(2)]
    assert all(group.wait(30) for group in groups)
    assert not pgs.placement_group([{"licence": 0.5}]).wait(0.2)


def test_many_groups_at_once(pgs):
    groups = [pgs.placement_group([{"CPU": 0.01}]) for _ in range(100)]
    assert all(group.wait(30) for group in groups)


# --------------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "bundles",
    [
        [], [{}], [{"CPU": 0}], [{"CPU": 1}, {}], [{"CPU": "1"}], [{1: 1}], {"CPU": 1}, ({"CPU": 1},), "CPU", None, [1],
        [None], [{"CPU": None}],
    ],
)  # fmt: skip
def test_bundles_that_are_none_are_refused(pgs, bundles):
    with pytest.raises(ValueError, match=r"(?i)bundle"):
        pgs.placement_group(bundles)


@pytest.mark.beyond_ray("Ray accepts these: some at once, others are pending for ever")
@pytest.mark.parametrize("amount", [-1, math.nan, math.inf, -math.inf, 0.00001])
def test_impossible_amounts_are_refused(pgs, amount):
    with pytest.raises(ValueError, match="CPU"):
        pgs.placement_group([{"CPU": amount}])


@pytest.mark.parametrize("options", [{"strategy": "X"}, {"strategy": "pack"}, {"lifetime": "X"}])
def test_strategies_and_lifetimes_that_do_not_exist_are_refused(pgs, options):
    with pytest.raises(ValueError, match=r"(?i)strategy|lifetime"):
        pgs.placement_group([{"CPU": 1}], **options)


def test_a_name_must_be_a_string(pgs):
    with pytest.raises(TypeError):
        pgs.placement_group([{"CPU": 1}], name=3)


def test_zeros_beside_amounts_are_allowed(pgs):
    group = pgs.placement_group([{"CPU": 1, "GPU": 0}])
    assert group.wait(30)
    assert group.bundle_specs == [{"CPU": 1.0, "GPU": 0.0}]


# ------------------------------------------------------------------------------------------------------------ what runs there
def test_tasks_run_in_any_bundle_or_in_the_one_asked_for(hpcray, pgs, inside, where):
    group = pgs.placement_group([{"CPU": 1}, {"CPU": 1}])
    refs = [where.options(**inside(group, index)).remote() for index in (0, 1, -1, -1, 0, 1)]
    assert hpcray.get(refs, timeout=30) == [group.id.hex()] * 6
    assert hpcray.get(where.remote(), timeout=30) is None
    assert pgs.get_current_placement_group() is None


def test_tasks_may_be_submitted_before_there_is_room(hpcray, pgs, inside, where):
    first, second = pgs.placement_group([{"CPU": 4}]), pgs.placement_group([{"CPU": 4}])
    assert first.wait(30)
    ref = where.options(**inside(second)).remote()
    assert not hpcray.wait([ref], timeout=0.3)[0]
    pgs.remove_placement_group(first)
    assert hpcray.get(ref, timeout=30) == second.id.hex()


def test_no_more_runs_in_a_bundle_than_fits(hpcray, pgs, inside, gate, wait_until):
    group = pgs.placement_group([{"CPU": 1}, {"CPU": 1}])

    @hpcray.remote
    def hold():
        gate.wait()

    refs = [hold.options(**inside(group, 0)).remote() for _ in range(2)]
    wait_until(gate.arrived)
    refs.append(hold.options(**inside(group)).remote())
    wait_until(lambda: gate.arrived() == 2)
    time.sleep(0.3)
    assert gate.arrived() == 2
    gate.open()
    hpcray.get(refs, timeout=30)


def test_a_task_without_demands_runs_in_a_full_bundle(hpcray, pgs, inside, where, gate, wait_until):
    group = pgs.placement_group([{"CPU": 1}])

    @hpcray.remote
    def hold():
        gate.wait()

    held = hold.options(**inside(group)).remote()
    wait_until(gate.arrived)
    assert hpcray.get(where.options(**inside(group, num_cpus=0)).remote(), timeout=30) == group.id.hex()
    gate.open()
    hpcray.get(held)


def test_a_task_that_waits_for_its_children_gives_its_bundle_to_them(hpcray, pgs, inside, where):
    group = pgs.placement_group([{"CPU": 1}])

    @hpcray.remote
    def parent(options):
        return hpcray.get(where.options(**options).remote())

    assert hpcray.get(parent.options(**inside(group)).remote(inside(group)), timeout=30) == group.id.hex()


def test_assigned_resources_are_what_was_asked_for(hpcray, pgs, inside):
    group = pgs.placement_group([{"CPU": 2, "licence": 1}])

    @hpcray.remote(num_cpus=1, resources={"licence": 0.5})
    def resources():
        return hpcray.get_runtime_context().get_assigned_resources()

    assert hpcray.get(resources.options(**inside(group)).remote(), timeout=30) == {"CPU": 1.0, "licence": 0.5}


def test_gpus_of_bundles_are_given_to_what_runs_in_them(hpcray, pgs, inside):
    group = pgs.placement_group([{"GPU": 1}, {"GPU": 1}])

    @hpcray.remote(num_cpus=0)
    def devices():
        return os.environ["CUDA_VISIBLE_DEVICES"]

    whole = [hpcray.get(devices.options(**inside(group, index, num_gpus=1)).remote(), timeout=30) for index in (0, 1)]
    assert sorted(whole) == ["0", "1"]
    shares = [hpcray.get(devices.options(**inside(group, 1, num_gpus=0.5)).remote(), timeout=30) for _ in range(2)]
    assert shares == [whole[1]] * 2


def test_two_shares_of_a_gpu_run_beside_each_other(hpcray, pgs, inside, gate, wait_until):
    group = pgs.placement_group([{"GPU": 0.5}, {"GPU": 0.5}])

    @hpcray.remote(num_cpus=0, num_gpus=0.5)
    def devices():
        gate.wait()
        return os.environ["CUDA_VISIBLE_DEVICES"]

    refs = [devices.options(**inside(group)).remote() for _ in range(2)]
    wait_until(lambda: gate.arrived() == 2)
    gate.open()
    assert len(set(hpcray.get(refs, timeout=30))) == 1


def test_actors_live_in_groups(hpcray, pgs, inside, place_class):
    group = pgs.placement_group([{"CPU": 1}, {"CPU": 1, "GPU": 1}])
    first = place_class.options(**inside(group, 0, num_cpus=1)).remote()
    second = place_class.options(**inside(group, 1, num_cpus=1, num_gpus=1)).remote()
    assert hpcray.get([first.where.remote(), second.where.remote()], timeout=30) == [group.id.hex()] * 2
    assert hpcray.get(second.devices.remote(), timeout=30) in ("0", "1")


def test_an_actor_waits_for_the_one_that_has_its_bundle(hpcray, pgs, inside, place_class):
    group = pgs.placement_group([{"CPU": 1}])
    first = place_class.options(**inside(group, num_cpus=1)).remote()
    assert hpcray.get(first.where.remote(), timeout=30) == group.id.hex()
    second = place_class.options(**inside(group, num_cpus=1)).remote()
    ref = second.where.remote()
    assert not hpcray.wait([ref], timeout=0.3)[0]
    hpcray.kill(first)
    assert hpcray.get(ref, timeout=30) == group.id.hex()


# ------------------------------------------------------------------------------------------------- requests that never fit
@pytest.mark.parametrize("options", [{"num_cpus": 2}, {"resources": {"licence": 1}}, {"num_gpus": 1}])
def test_what_fits_into_no_bundle_is_refused_at_the_call(pgs, inside, where, place_class, options):
    group = pgs.placement_group([{"CPU": 1}, {"CPU": 1}])
    with pytest.raises(ValueError, match=r"(?i)fit"):
        where.options(**inside(group, **options)).remote()
    with pytest.raises(ValueError, match=r"(?i)fit"):
        place_class.options(**inside(group, **options)).remote()


@pytest.mark.beyond_ray("Ray looks at all bundles, and the task waits for ever")
def test_what_does_not_fit_into_its_bundle_is_refused(pgs, inside, where):
    group = pgs.placement_group([{"CPU": 1}, {"CPU": 2}])
    with pytest.raises(ValueError, match="bundle 0"):
        where.options(**inside(group, 0, num_cpus=2)).remote()


@pytest.mark.parametrize("index", [2, -2])
def test_a_bundle_that_does_not_exist_is_refused(pgs, inside, where, index):
    group = pgs.placement_group([{"CPU": 1}, {"CPU": 1}])
    with pytest.raises(ValueError, match="bundle"):
        where.options(**inside(group, index)).remote()


def test_no_group_and_the_empty_group_are_none(hpcray, pgs, inside, where):
    assert hpcray.get(where.options(**inside(None)).remote(), timeout=30) is None
    assert hpcray.get(where.options(**inside(pgs.PlacementGroup.empty())).remote(), timeout=30) is None


# ---------------------------------------------------------------------------------------------------------------- children
def test_children_are_captured_if_asked_for(hpcray, pgs, inside, where):
    group = pgs.placement_group([{"CPU": 1}])

    @hpcray.remote(num_cpus=0)
    def parent(options):
        return hpcray.get(where.options(**options).remote())

    @hpcray.remote(num_cpus=0)
    def grandparent():
        return hpcray.get(parent.remote({}))

    def child(options, **capture):
        return hpcray.get(parent.options(**inside(group, **capture)).remote(options), timeout=30)

    assert child({}) is None
    assert child({}, capture=False) is None
    assert child({}, capture=True) == group.id.hex()
    assert child({"scheduling_strategy": "DEFAULT"}, capture=True) is None
    assert child({"scheduling_strategy": "SPREAD"}, capture=True) is None
    assert child(inside(None), capture=True) is None
    with pytest.raises(ValueError, match=r"(?i)fit"):
        child({"num_cpus": 2}, capture=True)
    captured = grandparent.options(**inside(group, 0, capture=True)).remote()
    assert hpcray.get(captured, timeout=30) == group.id.hex()


def test_one_function_is_captured_by_one_group_after_the_other(hpcray, pgs, inside, where):
    groups = [pgs.placement_group([{"CPU": 1}]) for _ in range(2)]

    @hpcray.remote(num_cpus=0)
    def parent():
        return hpcray.get(where.remote())

    choices = [inside(groups[0], capture=True), {}, inside(groups[1], capture=True)] * 2
    expected = [groups[0].id.hex(), None, groups[1].id.hex()] * 2
    assert [hpcray.get(parent.options(**options).remote(), timeout=30) for options in choices] == expected


def test_actors_capture_what_they_submit(hpcray, pgs, inside, where, place_class):
    group = pgs.placement_group([{"CPU": 1}])
    plain = place_class.options(**inside(group)).remote()
    assert hpcray.get(plain.call.remote(where), timeout=30) is None
    captor = place_class.options(**inside(group, capture=True)).remote()
    assert hpcray.get(captor.call.remote(where), timeout=30) == group.id.hex()
    assert hpcray.get(captor.create.remote(place_class), timeout=30) == group.id.hex()


# ----------------------------------------------------------------------------------------------------------------- removal
def test_removal_gives_everything_back(hpcray, pgs, wait_until):
    def free():
        available = hpcray.available_resources()
        return available.get("CPU", 0), available.get("GPU", 0), available.get("licence", 0)

    wait_until(lambda: free() == (4, 2, 2), on_timeout=free)
    group = pgs.placement_group([{"CPU": 1, "GPU": 0.5}, {"CPU": 2, "GPU": 1}, {"licence": 2}])
    assert group.wait(30)
    wait_until(lambda: free() == (1, 0.5, 0), on_timeout=free)
    pgs.remove_placement_group(group)
    wait_until(lambda: free() == (4, 2, 2), on_timeout=free)


def test_removal_kills_the_tasks_that_run_and_fails_those_that_wait(hpcray, pgs, inside, gate, wait_until):
    group = pgs.placement_group([{"CPU": 1}])

    @hpcray.remote(max_retries=0)
    def hold():
        gate.wait()

    running = hold.options(**inside(group)).remote()
    wait_until(gate.arrived)
    waiting = [hold.options(**inside(group, index)).remote() for index in (0, -1)]
    pgs.remove_placement_group(group)
    with pytest.raises(hpcray.exceptions.WorkerCrashedError):
        hpcray.get(running, timeout=30)
    for ref in waiting:
        with pytest.raises(hpcray.exceptions.TaskPlacementGroupRemoved):
            hpcray.get(ref, timeout=30)
    assert gate.arrived() == 1


@pytest.mark.beyond_ray("in Ray these tasks wait for ever")
def test_tasks_that_would_be_retried_or_come_too_late_fail_too(hpcray, pgs, inside, gate, wait_until):
    group = pgs.placement_group([{"CPU": 1}])

    @hpcray.remote(max_retries=3)
    def hold():
        gate.wait()

    running = hold.options(**inside(group)).remote()
    wait_until(gate.arrived)
    pgs.remove_placement_group(group)
    late = hold.options(**inside(group)).remote()
    for ref in (running, late):
        with pytest.raises(hpcray.exceptions.TaskPlacementGroupRemoved):
            hpcray.get(ref, timeout=30)
    assert gate.arrived() == 1


@pytest.mark.beyond_ray("in Ray such a task waits for ever")
def test_removal_with_tasks_that_wait_for_arguments(hpcray, pgs, inside, where, gate):
    group = pgs.placement_group([{"CPU": 1}])

    @hpcray.remote
    def slow():
        gate.wait()

    @hpcray.remote(max_retries=0)
    def follow(_):
        return 1

    ref = follow.options(**inside(group)).remote(slow.remote())
    assert group.wait(30)
    pgs.remove_placement_group(group)
    gate.open()
    with pytest.raises(hpcray.exceptions.TaskPlacementGroupRemoved):
        hpcray.get(ref, timeout=30)


def test_removal_ends_actors(hpcray, pgs, inside, place_class, gate, wait_until):
    group = pgs.placement_group([{"CPU": 1}])
    alive = place_class.options(**inside(group, num_cpus=1)).remote()
    hpcray.get(alive.where.remote(), timeout=30)
    call = alive.wait.remote()
    wait_until(gate.arrived)
    waiting = place_class.options(**inside(group, num_cpus=1)).remote()
    unborn = waiting.where.remote()
    time.sleep(0.3)
    pgs.remove_placement_group(group)
    with pytest.raises(hpcray.exceptions.ActorDiedError):
        hpcray.get(call, timeout=30)
    with pytest.raises(hpcray.exceptions.ActorDiedError):
        hpcray.get(alive.where.remote(), timeout=30)
    with pytest.raises(hpcray.exceptions.ActorUnschedulableError):
        hpcray.get(unborn, timeout=30)


@pytest.mark.beyond_ray("in Ray calls to such an actor wait for ever")
def test_an_actor_in_a_removed_group_is_refused(hpcray, pgs, inside, place_class):
    group = pgs.placement_group([{"CPU": 1}])
    pgs.remove_placement_group(group)
    late = place_class.options(**inside(group)).remote()
    with pytest.raises(hpcray.exceptions.ActorUnschedulableError):
        hpcray.get(late.where.remote(), timeout=30)


def test_who_waits_for_a_group_that_is_removed_is_told(hpcray, pgs):
    group = pgs.placement_group([{"CPU": 100}])
    before = group.ready()
    pgs.remove_placement_group(group)
    for ref in (before, group.ready()):
        with pytest.raises(hpcray.exceptions.TaskPlacementGroupRemoved):
            hpcray.get(ref, timeout=30)


@pytest.mark.beyond_ray("Ray raises an Exception that says that there is no such group")
def test_a_group_that_was_removed_is_not_waited_for(pgs):
    group = pgs.placement_group([{"CPU": 1}])
    assert group.wait(30)
    pgs.remove_placement_group(group)
    assert not group.wait(30)


def test_removing_again_and_at_once(pgs):
    group = pgs.placement_group([{"CPU": 1}])
    pgs.remove_placement_group(group)
    pgs.remove_placement_group(group)
    assert pgs.placement_group_table(group)["state"] == "REMOVED"


@pytest.mark.beyond_ray("Ray asserts")
def test_removing_none(pgs):
    with pytest.raises(ValueError, match="None"):
        pgs.remove_placement_group(None)


# --------------------------------------------------------------------------------------------------- names, tables, handles
def test_named_groups_are_found_until_they_are_removed(hpcray, pgs):
    group = pgs.placement_group([{"CPU": 1}, {"CPU": 0.5}], name="training")
    assert pgs.get_placement_group("training") == group
    assert pgs.get_placement_group("training").bundle_specs == [{"CPU": 1.0}, {"CPU": 0.5}]
    with pytest.raises(hpcray.exceptions.RaySystemError, match="training"):
        pgs.placement_group([{"CPU": 1}], name="training")

    @hpcray.remote
    def find():
        return pgs_get("training")

    pgs_get = pgs.get_placement_group
    assert hpcray.get(find.remote(), timeout=30) == group
    pgs.remove_placement_group(group)
    with pytest.raises(ValueError, match="training"):
        pgs.get_placement_group("training")
    again = pgs.placement_group([{"CPU": 1}], name="training")
    assert pgs.get_placement_group("training") == again


@pytest.mark.parametrize("name", ["nobody", "", None])
def test_names_that_nobody_has(pgs, name):
    with pytest.raises(ValueError, match=r"get_placement_group|nobody"):
        pgs.get_placement_group(name)


def test_the_table(hpcray, pgs):
    group = pgs.placement_group([{"CPU": 1}, {"CPU": 1, "GPU": 1}], name="shown", strategy="STRICT_PACK")
    assert group.wait(30)
    row = pgs.placement_group_table(group)
    node = hpcray.nodes()[0]["NodeID"]
    assert row.pop("stats")["scheduling_state"] == "FINISHED"
    assert row == {
        "placement_group_id": group.id.hex(),
        "name": "shown",
        "bundles": {0: {"CPU": 1.0}, 1: {"CPU": 1.0, "GPU": 1.0}},
        "bundles_to_node_id": {0: node, 1: node},
        "strategy": "STRICT_PACK",
        "state": "CREATED",
    }
    assert pgs.placement_group_table()[group.id.hex()]["name"] == "shown"
    pgs.remove_placement_group(group)
    assert pgs.placement_group_table(group)["state"] == "REMOVED"
    assert pgs.placement_group_table(group)["bundles"] == row["bundles"]
    assert pgs.placement_group_table()[group.id.hex()]["state"] == "REMOVED"


def test_handles_travel(hpcray, pgs, inside, where):
    group = pgs.placement_group([{"CPU": 1}, {"CPU": 1}])

    @hpcray.remote
    def use(groups, options):
        [handle] = groups
        return handle.wait(30), handle.bundle_specs, handle.bundle_count, hpcray.get(where.options(**options).remote())

    expected = (True, [{"CPU": 1.0}] * 2, 2, group.id.hex())
    assert hpcray.get(use.remote([group], inside(group)), timeout=30) == expected
    copied = pickle.loads(pickle.dumps(group))
    assert copied == group
    assert hash(copied) == hash(group)
    assert copied != pgs.placement_group([{"CPU": 1}])
    assert copied.bundle_specs == group.bundle_specs
    assert not copied.is_empty
    assert pgs.PlacementGroup.empty().is_empty


def test_a_handle_looks_up_what_it_does_not_know(pgs):
    group = pgs.placement_group([{"CPU": 1}, {"GPU": 0.5}])
    assert pgs.PlacementGroup(group.id).bundle_specs == [{"CPU": 1.0}, {"GPU": 0.5}]
    assert group.bundle_count == 2


def test_a_group_outlives_the_task_or_actor_that_made_it(hpcray, pgs, inside, where):
    make = importlib.import_module(f"{hpcray.__name__}.util.placement_group").placement_group

    @hpcray.remote(num_cpus=0)
    class Maker:
        def make(self):
            return make([{"CPU": 1}])

    @hpcray.remote(num_cpus=0)
    def make_one():
        return make([{"CPU": 1}])

    maker = Maker.remote()
    groups = hpcray.get([maker.make.remote(), make_one.remote()], timeout=30)
    hpcray.kill(maker)
    time.sleep(0.5)
    for group in groups:
        assert hpcray.get(where.options(**inside(group)).remote(), timeout=30) == group.id.hex()
        pgs.remove_placement_group(group)


def test_tasks_remove_groups(hpcray, pgs, wait_until):
    remove = pgs.remove_placement_group
    group = pgs.placement_group([{"CPU": 1}])

    @hpcray.remote
    def end(groups):
        remove(groups[0])

    hpcray.get(end.remote([group]), timeout=30)
    wait_until(lambda: pgs.placement_group_table(group)["state"] == "REMOVED")


def test_the_groups_of_a_job_end_with_it(run_script):
    script = """
    import hpcray
    from hpcray.util.placement_group import placement_group
    hpcray.init(num_cpus=1)
    group = placement_group([{"CPU": 1}])
    assert group.wait(30)
    print("made")
    """
    finished = run_script(script.replace("from hpcray.util", "from ray.util") if _on_ray() else script)
    assert finished.returncode == 0, finished.stderr
    assert "made" in finished.stdout


def _on_ray():
    return os.environ.get("HPCRAY_TEST_IMPL") == "ray"
