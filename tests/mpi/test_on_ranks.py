"""The whole product on real ranks: `mpirun -n {1,2,4} python -m pytest --with-mpi tests/mpi`.

Each test is the driver of a job of its own. Where ranks share a host, rank 0 offers no CPUs once there is another.
"""

from __future__ import annotations

import gc
import os
import time

import numpy as np
import psutil
import pytest

import hpcray
from hpcray.exceptions import GetTimeoutError, RayTaskError, WorkerCrashedError
from hpcray.util.scheduling_strategies import In, NodeAffinitySchedulingStrategy, NodeLabelSchedulingStrategy

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.hpcray(num_cpus=1, object_store_memory=128 << 20),
    pytest.mark.usefixtures("nothing_left_behind", "hpcray_job"),
]

BIG = 10_000_000  # bytes: far above what travels within messages


class WrongAnswerError(Exception):
    def __init__(self, answer: int) -> None:
        super().__init__(answer)
        self.answer = answer


@hpcray.remote
def here() -> str:
    return hpcray.get_runtime_context().get_node_id()


@hpcray.remote
class Counter:
    def __init__(self, start: int = 0) -> None:
        self.value = start

    def add(self, amount: int = 1) -> int:
        self.value += amount
        return self.value

    def where(self) -> tuple[str, int]:
        return hpcray.get_runtime_context().get_node_id(), os.getpid()


def nodes_with_cpus() -> set[str]:
    return {node["NodeID"] for node in hpcray.nodes() if node["Resources"].get("CPU")}


def on_each_node(function, *arguments):
    """Call a remote function on each node with CPUs: `{node: (value's reference)}`, through tasks that wait for each other."""
    wanted = nodes_with_cpus()

    @hpcray.remote
    def call(meeting, *arguments):
        while len(hpcray.get(meeting.arrive.remote(hpcray.get_runtime_context().get_node_id()))) < len(wanted):
            time.sleep(0.005)
        return hpcray.get_runtime_context().get_node_id(), [function(*arguments)]

    meeting = Meeting.remote()
    return dict(hpcray.get([call.remote(meeting, *arguments) for _ in wanted], timeout=60))


@hpcray.remote(num_cpus=0)
class Meeting:
    def __init__(self) -> None:
        self.present: set[str] = set()

    def arrive(self, who: str) -> set[str]:
        self.present.add(who)
        return self.present


# -------------------------------------------------------------------------------------------------------------------- tasks
def test_every_rank_is_a_node():
    assert len(hpcray.nodes()) == int(os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ.get("PMI_SIZE") or 1)
    assert hpcray.cluster_resources()["CPU"] == len(nodes_with_cpus()) >= 1


def test_tasks_run_on_all_ranks_that_have_cpus():
    assert on_each_node(os.getpid).keys() == nodes_with_cpus()


def test_several_thousand_short_tasks():
    @hpcray.remote
    def square(x):
        return x * x

    assert hpcray.get([square.remote(i) for i in range(5000)], timeout=120) == [i * i for i in range(5000)]


def test_a_chain_of_tasks_passes_its_value_from_rank_to_rank():
    @hpcray.remote
    def add_one(x):
        return x + 1

    ref = hpcray.put(0)
    for _ in range(100):
        ref = add_one.remote(ref)
    assert hpcray.get(ref, timeout=60) == 100


def test_tasks_that_wait_for_tasks_do_not_deadlock_on_one_cpu_per_rank():
    @hpcray.remote
    def fibonacci(n):
        if n < 2:
            return n
        return sum(hpcray.get([fibonacci.remote(n - 1), fibonacci.remote(n - 2)]))

    assert hpcray.get(fibonacci.remote(7), timeout=120) == 13


def test_a_task_whose_worker_dies_is_tried_again(tmp_path):
    @hpcray.remote(max_retries=3)
    def dies_twice():
        tries = tmp_path / "tries"
        with tries.open("a") as file:
            file.write(".")
        if tries.stat().st_size <= 2:
            os._exit(1)
        return tries.stat().st_size

    assert hpcray.get(dies_twice.remote(), timeout=60) == 3


def test_a_worker_that_keeps_dying_is_an_error():
    @hpcray.remote(max_retries=1)
    def dies():
        os._exit(1)

    @hpcray.remote
    def use(x):
        return x

    with pytest.raises(WorkerCrashedError):
        hpcray.get(dies.remote(), timeout=60)
    assert hpcray.get(use.remote(1), timeout=60) == 1


# ------------------------------------------------------------------------------------------------------------------- errors
def test_an_error_crosses_ranks_with_its_class_fields_and_traceback():
    @hpcray.remote
    def fails(x):
        raise WrongAnswerError(x)

    @hpcray.remote
    def use(x):
        return x

    @hpcray.remote
    def calls_on():
        return hpcray.get(use.remote(fails.remote(41)))

    for ref in (fails.remote(41), use.remote(fails.remote(41)), calls_on.remote()):
        with pytest.raises(WrongAnswerError) as caught:
            hpcray.get(ref, timeout=60)
        assert isinstance(caught.value, RayTaskError)
        assert caught.value.answer == 41
        assert "fails" in str(caught.value)


# ------------------------------------------------------------------------------------------------------------------ objects
def test_a_large_object_is_read_on_every_rank_as_a_read_only_array():
    numbers = np.arange(BIG // 8)
    ref = hpcray.put(numbers)

    def look(refs):
        array = hpcray.get(refs[0])
        return float(array.sum()), array.flags.writeable, array.dtype.str

    expected = [(float(numbers.sum()), False, numbers.dtype.str)]
    assert on_each_node(look, [ref]) == dict.fromkeys(nodes_with_cpus(), expected)


def test_large_results_of_all_ranks_come_to_the_driver():
    def make():
        return np.full(BIG // 8, os.getpid())

    made = on_each_node(make)
    for (array,) in made.values():
        assert array.nbytes == BIG
        assert array[0] == array[-1] != os.getpid()
        assert not array.flags.writeable


def test_a_large_object_made_by_one_task_is_an_argument_of_tasks_on_all_ranks():
    @hpcray.remote
    def make():
        return np.arange(BIG // 8)

    @hpcray.remote
    def total(array):
        time.sleep(0.02)
        return int(array.sum()), hpcray.get_runtime_context().get_node_id()

    ref = make.remote()
    sums = hpcray.get([total.remote(ref) for _ in range(20)], timeout=60)
    assert {value for value, _ in sums} == {(BIG // 8) * (BIG // 8 - 1) // 2}


def test_references_within_values_travel_between_ranks():
    @hpcray.remote
    def make(i):
        return {"inner": hpcray.put(np.full(200_000, i)), "small": hpcray.put(i)}

    @hpcray.remote
    def open_up(made):
        return int(hpcray.get(made["inner"]).sum()), hpcray.get(made["small"])

    refs = [make.remote(i) for i in range(8)]
    assert hpcray.get([open_up.remote(ref) for ref in refs], timeout=60) == [(200_000 * i, i) for i in range(8)]
    for i, made in enumerate(hpcray.get(refs)):
        assert hpcray.get(made["small"], timeout=60) == i
        assert int(hpcray.get(made["inner"], timeout=60)[0]) == i


def test_a_reference_returned_through_several_ranks_outlives_its_makers():
    @hpcray.remote
    def pass_on(depth):
        if depth == 0:
            return [hpcray.put(np.arange(100_000))]
        return hpcray.get(pass_on.remote(depth - 1))

    (inner,) = hpcray.get(pass_on.remote(5), timeout=60)
    gc.collect()
    assert hpcray.get(inner, timeout=60)[-1] == 99_999


def test_objects_of_other_ranks_are_freed_with_their_last_reference(wait_until):
    @hpcray.remote
    def make():
        return np.zeros(BIG, dtype=np.uint8)

    @hpcray.remote
    def read(array):
        return len(array)

    # Six times what the stores of all ranks hold together would not fit.
    for _ in range(12 * len(hpcray.nodes()) // 2):
        assert hpcray.get([read.remote(make.remote()) for _ in range(10)], timeout=60) == [BIG] * 10


def test_wait_tells_which_of_many_ranks_tasks_are_done(tmp_path):
    door = tmp_path / "door"

    @hpcray.remote(num_cpus=0)
    def quick(i):
        return i

    @hpcray.remote(num_cpus=0)
    def slow():
        while not door.exists():
            time.sleep(0.005)
        return "slow"

    waiting, fast = slow.remote(), [quick.remote(i) for i in range(4)]
    ready, pending = hpcray.wait([waiting, *fast], num_returns=4, timeout=60)
    assert (ready, pending) == (fast, [waiting])
    with pytest.raises(GetTimeoutError):
        hpcray.get(waiting, timeout=0.05)
    door.touch()
    assert hpcray.get(waiting, timeout=60) == "slow"


# ------------------------------------------------------------------------------------------------------------------- actors
def test_actors_fill_all_ranks_and_keep_their_state():
    counters = [Counter.remote(100 * i) for i in range(len(nodes_with_cpus()))]
    places = hpcray.get([counter.where.remote() for counter in counters], timeout=60)
    assert len({pid for _, pid in places}) == len(counters)
    calls = [[counter.add.remote() for counter in counters] for _ in range(50)]
    assert hpcray.get(calls[-1], timeout=60) == [100 * i + 50 for i in range(len(counters))]


def test_a_rank_full_of_actors_leaves_the_next_one_to_another():
    class Holder:
        def where(self):
            return hpcray.get_runtime_context().get_node_id()

    holder = hpcray.remote(num_cpus=1)(Holder)
    holders = [holder.remote() for _ in nodes_with_cpus()]
    assert set(hpcray.get([one.where.remote() for one in holders], timeout=60)) == nodes_with_cpus()


def test_calls_of_one_caller_keep_their_order_across_ranks():
    @hpcray.remote(num_cpus=0)
    class Diary:
        def __init__(self):
            self.entries = []

        def note(self, entry):
            self.entries.append(entry)

        def read(self):
            return self.entries

    diary = Diary.remote()

    @hpcray.remote
    def write(who, diary):
        hpcray.get([diary.note.remote((who, i)) for i in range(100)])

    hpcray.get([write.remote(who, diary) for who in range(4)], timeout=60)
    entries = hpcray.get(diary.read.remote(), timeout=60)
    assert len(entries) == 400
    for who in range(4):
        assert [i for author, i in entries if author == who] == list(range(100))


def test_a_handle_passed_on_calls_the_same_actor_from_every_rank():
    counter = Counter.options(num_cpus=0).remote()

    def add(handles):
        return hpcray.get(handles[0].add.remote())

    answers = on_each_node(add, [counter])
    assert sorted(value for (value,) in answers.values()) == list(range(1, len(answers) + 1))


def test_an_actor_uses_another_ones_large_result():
    @hpcray.remote(num_cpus=0)
    class Maker:
        def make(self, i):
            return np.full(BIG // 8, i)

    @hpcray.remote(num_cpus=0)
    class Reader:
        def total(self, array):
            return int(array.sum())

    makers, readers = [Maker.remote() for _ in range(3)], [Reader.remote() for _ in range(3)]
    totals = [reader.total.remote(maker.make.remote(i)) for i, maker in enumerate(makers) for reader in readers]
    assert hpcray.get(totals, timeout=60) == [i * (BIG // 8) for i in range(3) for _ in range(3)]


def test_an_error_in_a_method_leaves_the_actor_alive():
    @hpcray.remote
    class Moody:
        def fail(self):
            raise WrongAnswerError(7)

        def work(self):
            return "fine"

    moody = Moody.remote()
    with pytest.raises(WrongAnswerError):
        hpcray.get(moody.fail.remote(), timeout=60)
    assert hpcray.get(moody.work.remote(), timeout=60) == "fine"


def test_a_killed_actor_is_gone_for_all_ranks():
    counter = Counter.options(num_cpus=0).remote()
    hpcray.get(counter.add.remote(), timeout=60)
    hpcray.kill(counter)

    def call(handles):
        try:
            hpcray.get(handles[0].add.remote())
        except hpcray.exceptions.ActorDiedError:
            return "dead"
        return "alive"

    assert {answer for (answer,) in on_each_node(call, [counter]).values()} == {"dead"}


# ---------------------------------------------------------------------------------------------------------------------- end
def test_shutdown_ends_all_workers_and_a_new_job_can_start(wait_until):
    def pid():
        return os.getpid()

    pids = [value for (value,) in on_each_node(pid).values()]
    actor = Counter.options(num_cpus=0).remote()
    pids.append(hpcray.get(actor.where.remote())[1])
    assert all(map(psutil.pid_exists, pids))
    hpcray.shutdown()
    wait_until(lambda: not any(map(psutil.pid_exists, pids)), 10)

    hpcray.init(num_cpus=2)
    assert hpcray.cluster_resources()["CPU"] == 2 * len(nodes_with_cpus())
    assert hpcray.get(here.remote(), timeout=60) in nodes_with_cpus()


def test_calls_one_at_a_time_stay_where_they_want_to_run():
    # From the third call on, they could go by a lane, and that to a worker of this rank, as they ask for no CPU.
    @hpcray.remote(num_cpus=0)
    def where() -> str:
        return hpcray.get_runtime_context().get_node_id()

    for node in hpcray.nodes():
        bound = where.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        labelled = where.options(label_selector={"hpcray/rank": str(node["Rank"])})
        labels = NodeLabelSchedulingStrategy({"hpcray/rank": In(str(node["Rank"]))})
        for function in (bound, labelled, where.options(scheduling_strategy=labels)):
            assert {hpcray.get(function.remote()) for _ in range(8)} == {node["NodeID"]}
    spread = where.options(scheduling_strategy="SPREAD")
    seen = {hpcray.get(spread.remote()) for _ in range(8 * len(hpcray.nodes()))}
    assert seen == {node["NodeID"] for node in hpcray.nodes()}
