"""Which GPUs tasks and actors are given, and that each sees its own and no others."""

import os
import signal
from types import SimpleNamespace

import pytest

GPUS = 4


@pytest.fixture
def start(own_init, fake_gpus):
    """``start(8, num_cpus=2)``: a job of one rank with so many GPUs."""

    def start(count, **options):
        fake_gpus(count)
        own_init.init(num_gpus=count, **{"num_cpus": 4, **options})
        return own_init

    return start


@pytest.fixture
def job(start):
    """A job of one rank with four GPUs."""
    return start(GPUS)


@pytest.fixture
def look(hpcray, job):
    """A remote function that tells what it was given."""
    return look_on(hpcray)


def look_on(hpcray):
    return hpcray.remote(looking(hpcray))


def looking(hpcray):
    def look(*_):
        context = hpcray.get_runtime_context()
        return SimpleNamespace(
            visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
            ids=hpcray.get_gpu_ids(),
            accelerators=context.get_accelerator_ids()["GPU"],
            assigned=context.get_assigned_resources(),
            pid=os.getpid(),
        )

    return look


@pytest.fixture
def actor(hpcray, job):
    """An actor class whose actors tell what they were given."""
    look_now = looking(hpcray)

    class Looker:
        def __init__(self):
            self.at_start = look_now()

        def look(self):
            return look_now()

        def look_at_start(self):
            return self.at_start

        def wait(self, gate):
            gate.wait()

    return hpcray.remote(Looker)


@pytest.mark.parametrize("count", [1, 4, 8])
def test_a_task_sees_as_many_as_it_asked_for(start, count):
    hpcray = start(count)
    look = look_on(hpcray)
    for wanted in range(1, count + 1):
        seen = hpcray.get(look.options(num_gpus=wanted).remote())
        assert len(set(seen.ids)) == wanted
        assert seen.visible == ",".join(map(str, seen.ids))
        assert seen.accelerators == list(map(str, seen.ids))
        assert seen.assigned == {"CPU": 1.0, "GPU": float(wanted)}
    assert len(set(hpcray.get(look.options(num_gpus=count).remote()).ids)) == count


def test_one_that_asks_for_none_is_given_none(hpcray, look):
    for asked in ({}, {"num_gpus": 0}):
        seen = hpcray.get(look.options(**asked).remote())
        assert (seen.ids, seen.accelerators, seen.assigned) == ([], [], {"CPU": 1.0})


@pytest.mark.beyond_ray("there it sees all GPUs of the node")
def test_one_that_asks_for_none_sees_none(hpcray, look, actor):
    assert hpcray.get(look.remote()).visible == ""
    assert hpcray.get(actor.remote().look.remote()).visible == ""


def test_a_driver_is_given_none(hpcray, job):
    assert hpcray.get_gpu_ids() == []
    assert hpcray.get_runtime_context().get_accelerator_ids()["GPU"] == []


@pytest.mark.beyond_ray("there they are numbers")
def test_gpus_that_the_driver_tells_of_are_named_by_their_uuids(hpcray, look):
    assert sorted(name[:5] for name in hpcray.get(look.options(num_gpus=4).remote()).ids) == [
        f"GPU-{n}" for n in range(4)
    ]


def test_gpus_that_are_only_counted_are_numbered(own_init, fake_gpus):
    hpcray = own_init
    fake_gpus(None)
    hpcray.init(num_cpus=1, num_gpus=2)
    seen = hpcray.get(look_on(hpcray).options(num_gpus=2).remote())
    assert sorted(seen.ids) == [0, 1]
    assert seen.visible == ",".join(seen.accelerators) == ",".join(map(str, seen.ids))


def test_what_cuda_visible_devices_names_are_names(own_init, fake_gpus, monkeypatch):
    hpcray = own_init
    fake_gpus(None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    hpcray.init(num_cpus=1, num_gpus=2)
    seen = hpcray.get(look_on(hpcray).options(num_gpus=2).remote())
    assert sorted(seen.ids) == sorted(seen.accelerators) == ["2", "3"]
    assert seen.visible == ",".join(seen.ids)


def test_fractions_that_fit_share_a_gpu(hpcray, look, gate, wait_until):
    @hpcray.remote(num_gpus=0.5)
    def half():
        gate.wait()
        return hpcray.get_gpu_ids()

    halves = [half.remote(), half.remote()]
    wait_until(lambda: gate.arrived() == 2)
    others = hpcray.get(look.options(num_gpus=GPUS - 1).remote(), timeout=60).ids
    gate.open()
    first, second = hpcray.get(halves)
    assert first == second
    assert len(first) == 1
    assert not set(first) & set(others)


def test_the_assigned_fraction_is_told(hpcray, look):
    seen = hpcray.get(look.options(num_gpus=0.25).remote())
    assert seen.assigned == {"CPU": 1.0, "GPU": 0.25}
    assert len(seen.ids) == 1


def test_a_whole_gpu_is_nobody_elses_at_any_time(hpcray, job, tmp_path):
    def alone(amount):
        for gpu in hpcray.get_gpu_ids():
            (tmp_path / str(gpu)).mkdir()  # fails if somebody else is here
        for gpu in hpcray.get_gpu_ids():
            (tmp_path / str(gpu)).rmdir()
        return len(hpcray.get_gpu_ids())

    alone = hpcray.remote(num_cpus=0, max_retries=0)(alone)
    wanted = [1 + number % 3 for number in range(60)]
    refs = [alone.options(num_gpus=amount).remote(amount) for amount in wanted]
    assert hpcray.get(refs, timeout=120) == wanted


def test_fractions_are_never_more_than_their_gpu(hpcray, job, tmp_path):
    def share(fifths):
        [gpu] = hpcray.get_gpu_ids()
        mine = [next(place for place in range(5) if take(tmp_path / f"{gpu}-{place}")) for _ in range(fifths)]
        for place in mine:
            (tmp_path / f"{gpu}-{place}").rmdir()
        return max(mine)

    def take(path):
        try:
            path.mkdir()
        except FileExistsError:
            return False
        return True

    share = hpcray.remote(num_cpus=0, max_retries=0)(share)
    refs = [share.options(num_gpus=0.2 * (1 + number % 3)).remote(1 + number % 3) for number in range(60)]
    assert max(hpcray.get(refs, timeout=120)) <= 4


def test_an_actor_has_its_gpus_from_its_creation_to_its_end(hpcray, actor, look):
    kept = [actor.options(num_gpus=1).remote() for _ in range(GPUS - 1)]
    seen = hpcray.get([one.look.remote() for one in kept])
    assert len({gpu for one in seen for gpu in one.ids}) == GPUS - 1
    for one, told in zip(kept, seen, strict=True):
        assert told.assigned == {"CPU": 1.0, "GPU": 1.0}
        assert told.visible == ",".join(map(str, told.ids))
        assert hpcray.get(one.look_at_start.remote()).ids == told.ids
        assert hpcray.get(one.look.remote()).ids == told.ids
    [left] = hpcray.get(look.options(num_gpus=1).remote()).ids
    assert left not in {gpu for one in seen for gpu in one.ids}
    with pytest.raises(hpcray.exceptions.GetTimeoutError):
        hpcray.get(look.options(num_gpus=2).remote(), timeout=0.2)
    hpcray.kill(kept[0])


def test_the_gpu_of_an_actor_that_was_killed_is_free_again(hpcray, actor, look):
    whole = actor.options(num_gpus=GPUS).remote()
    assert len(hpcray.get(whole.look.remote()).ids) == GPUS
    waiting = look.options(num_gpus=1).remote()
    hpcray.kill(whole)
    assert len(hpcray.get(waiting, timeout=60).ids) == 1


def test_the_gpu_of_a_worker_that_was_killed_is_free_again(hpcray, look, gate, wait_until, tmp_path):
    @hpcray.remote(num_gpus=GPUS, max_retries=0)
    def hold():
        (tmp_path / "pid").write_text(str(os.getpid()))
        gate.wait()

    holding = hold.remote()
    wait_until(lambda: gate.arrived() == 1)
    waiting = look.options(num_gpus=GPUS).remote()
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    with pytest.raises(hpcray.exceptions.WorkerCrashedError):
        hpcray.get(holding, timeout=60)
    assert len(hpcray.get(waiting, timeout=60).ids) == GPUS


def test_a_retry_is_given_gpus_too(hpcray, job, counter):
    @hpcray.remote(num_gpus=2, max_retries=1)
    def crash_once():
        if counter.add() == 1:
            os._exit(1)
        return len(hpcray.get_gpu_ids()), os.environ["CUDA_VISIBLE_DEVICES"].count(",")

    assert hpcray.get(crash_once.remote(), timeout=60) == (2, 1)


def test_a_blocked_worker_keeps_its_gpus(start):
    hpcray = start(2, num_cpus=1)
    look = look_on(hpcray)

    @hpcray.remote(num_gpus=1)
    def outer():
        mine = hpcray.get_gpu_ids()
        inner = hpcray.get(look.options(num_gpus=1).remote())
        with pytest.raises(hpcray.exceptions.GetTimeoutError):
            hpcray.get(look.options(num_gpus=2).remote(), timeout=0.2)
        plain = hpcray.get(look.remote())
        return mine, inner.ids, plain.ids, hpcray.get_gpu_ids()

    mine, inner, plain, mine_later = hpcray.get(outer.remote(), timeout=60)
    assert mine == mine_later
    assert len(set(mine + inner)) == 2
    assert plain == []


def test_a_bundle_has_its_gpus_until_its_group_is_removed(hpcray, actor, look, wait_until):
    util = pytest.importorskip(f"{hpcray.__name__}.util.placement_group")
    strategies = pytest.importorskip(f"{hpcray.__name__}.util.scheduling_strategies")
    group = util.placement_group([{"CPU": 1, "GPU": 2}, {"CPU": 1, "GPU": 1}])
    hpcray.get(group.ready(), timeout=60)

    def inside(bundle):
        return strategies.PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)

    [outside] = hpcray.get(look.options(num_gpus=1).remote()).ids
    two = hpcray.get(look.options(num_gpus=2, scheduling_strategy=inside(0)).remote())
    assert two.assigned == {"CPU": 1.0, "GPU": 2.0}
    one = actor.options(num_cpus=1, num_gpus=1, scheduling_strategy=inside(1)).remote()
    told = hpcray.get(one.look.remote())
    assert told.assigned == {"CPU": 1.0, "GPU": 1.0}
    assert told.visible == ",".join(map(str, told.ids))
    assert len({outside, *two.ids, *told.ids}) == GPUS
    first = hpcray.get(look.options(num_gpus=1, scheduling_strategy=inside(0)).remote()).ids
    assert set(first) < set(two.ids)
    halves = [actor.options(num_cpus=0, num_gpus=0.5, scheduling_strategy=inside(0)).remote() for _ in range(4)]
    seen = [gpu for half in hpcray.get([half.look.remote() for half in halves]) for gpu in half.ids]
    assert sorted(map(str, seen)) == sorted(map(str, two.ids * 2))
    assert hpcray.get(look.options(scheduling_strategy=inside(0)).remote()).ids == []
    del halves
    util.remove_placement_group(group)
    assert len(hpcray.get(look.options(num_gpus=GPUS).remote(), timeout=60).ids) == GPUS


def test_children_of_a_task_in_a_group_get_its_gpus(hpcray, look):
    util = pytest.importorskip(f"{hpcray.__name__}.util.placement_group")
    strategies = pytest.importorskip(f"{hpcray.__name__}.util.scheduling_strategies")
    group = util.placement_group([{"CPU": 1, "GPU": 2}])

    @hpcray.remote(num_gpus=1)
    def outer():
        return hpcray.get_gpu_ids() + hpcray.get(look.options(num_cpus=0, num_gpus=1).remote()).ids

    inside = strategies.PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
    mine = hpcray.get(outer.options(scheduling_strategy=inside).remote(), timeout=60)
    assert len(set(mine)) == 2
    others = hpcray.get(look.options(num_gpus=GPUS - 2).remote(), timeout=60).ids
    assert not set(mine) & set(others)


def test_calls_one_at_a_time_see_their_gpus_too(hpcray, look, actor):
    for _ in range(5):
        assert len(hpcray.get(look.options(num_gpus=2).remote()).ids) == 2
    for _ in range(5):
        assert hpcray.get(look.remote()).ids == []
    one = actor.options(num_gpus=1).remote()
    assert len({tuple(hpcray.get(one.look.remote()).ids) for _ in range(5)}) == 1


@pytest.mark.beyond_ray("there it may, with its memory on the GPU")
def test_a_process_that_has_had_gpus_serves_nobody_else(hpcray, look):
    # CUDA keeps its memory and its choice of GPUs for as long as the process lives.
    with_gpu = hpcray.get(look.options(num_gpus=1).remote()).pid
    others = [hpcray.get(look.options(num_gpus=amount).remote()).pid for amount in (0, 0.5, 2, 0)]
    assert with_gpu not in others


@pytest.mark.beyond_ray("there it may be one that has looked for GPUs before, and seen all")
def test_gpus_are_given_only_to_a_process_that_has_done_nothing_before(hpcray, look):
    without = {seen.pid for seen in hpcray.get([look.remote() for _ in range(8)])}
    assert hpcray.get(look.options(num_gpus=1).remote()).pid not in without


@pytest.mark.parametrize("amount", [1.5, 2.0001])
def test_more_than_one_gpu_must_be_a_whole_number_says_remote(look, actor, amount):
    remote, remote_actor = look.options(num_gpus=amount), actor.options(num_gpus=amount)
    with pytest.raises(ValueError, match=r"(?s)GPU.*whole numbers"):
        remote.remote()
    with pytest.raises(ValueError, match=r"(?s)GPU.*whole numbers"):
        remote_actor.remote()


@pytest.mark.beyond_ray("there the driver's own process looks")
def test_a_kind_of_gpu_may_be_asked_for(hpcray, look):
    own = look.options(num_gpus=1, accelerator_type="H100")
    assert len(hpcray.get([own.remote() for _ in range(8)], timeout=60)[0].ids) == 1
    with pytest.raises(hpcray.exceptions.GetTimeoutError):
        hpcray.get(look.options(num_gpus=1, accelerator_type="T4").remote(), timeout=0.3)
    with pytest.raises(TypeError, match="accelerator_type"):
        look.options(accelerator_type=100)


def test_two_gpus_may_be_written_as_a_fraction(hpcray, look):
    assert len(hpcray.get(look.options(num_gpus=2.0).remote()).ids) == 2
