"""`--bind-workers`: each task runs on CPUs of its rank that are its own."""

import json
import os

import pytest

CPUS = sorted(os.sched_getaffinity(0))
pytestmark = pytest.mark.skipif(len(CPUS) < 2, reason="needs two CPUs")

PRELUDE = """
import json, os, sys, threading, time
from pathlib import Path
import hpcray

@hpcray.remote
def look(meet=None, count=1):
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    if meet is not None:
        (Path(meet) / str(os.getpid())).touch()
        while sum(1 for _ in Path(meet).iterdir()) < count:
            time.sleep(0.005)
    rank = hpcray.get_runtime_context().get_node_id()
    threads = [os.sched_getaffinity(int(name)) for name in os.listdir("/proc/self/task")]
    assert all(cpus == threads[0] for cpus in threads), threads
    return rank, sorted(threads[0])

def together(count, **options):
    folder = Path(f"meet-{count}-{options}".replace("/", ""))
    folder.mkdir()
    return hpcray.get([look.options(**options).remote(str(folder.absolute()), count) for _ in range(count)])

hpcray.init()
"""


def seen(finished):
    assert finished.code == 0, str(finished)
    return json.loads(finished.out.splitlines()[-1])


def test_each_of_two_tasks_of_a_rank_has_a_cpu_of_its_own(starter, python):
    script = starter.write(PRELUDE + "print(json.dumps([cpus for _, cpus in together(2)]))")
    first, second = seen(starter.run(["hpcray", "run", "--bind-workers", script], python=python))
    assert len(first) == len(second) == 1
    assert set(first + second) < set(CPUS) or len(CPUS) == 2
    assert first != second


def test_a_task_has_as_many_as_it_asks_for_and_one_that_asks_for_none_has_all(starter, python):
    script = starter.write(
        PRELUDE
        + """
@hpcray.remote
class Actor:
    def look(self):
        return sorted(os.sched_getaffinity(0))

bound = Actor.options(num_cpus=1).remote()
print(json.dumps([
    hpcray.get(look.options(num_cpus=amount).remote())[1] for amount in (0, 0.5, 1, 0)
] + [hpcray.get(bound.look.remote()), hpcray.get(Actor.remote().look.remote())]
))
"""
    )
    none, half, one, none_again, actor, free_actor = seen(
        starter.run(["hpcray", "run", script], python=python, env={"HPCRAY_BIND_WORKERS": "1"})
    )
    assert none == none_again == free_actor == CPUS
    assert len(half) == len(one) == len(actor) == 1


def test_a_task_for_all_cpus_runs_on_all_also_in_a_worker_that_was_bound_to_one(starter, python):
    count = len(CPUS)
    script = starter.write(
        PRELUDE + f"together({count})\nprint(json.dumps(hpcray.get(look.options(num_cpus={count}).remote())[1]))"
    )
    assert seen(starter.run(["hpcray", "run", "--bind-workers", script], python=python)) == CPUS


def test_a_nested_task_runs_where_its_blocked_parent_does_not_while_there_is_room(starter, python):
    script = starter.write(
        PRELUDE
        + """
@hpcray.remote
def parent():
    return sorted(os.sched_getaffinity(0)), hpcray.get(look.remote())[1], sorted(os.sched_getaffinity(0))
print(json.dumps(hpcray.get(parent.remote())))
"""
    )
    before, child, after = seen(starter.run(["hpcray", "run", "--bind-workers", script], python=python))
    assert before == after
    assert len(before) == len(child) == 1


@pytest.mark.parametrize("way", ["run-n", "mpirun-init"])
def test_ranks_of_a_host_bind_to_different_cpus(way, any_mpi, starter):
    script = starter.write(PRELUDE + "print(json.dumps(together(2)))")
    anywhere = ["--bind-to", "none"]
    argv = {
        "run-n": ["hpcray", "run", "-n", "3", "--num-cpus", "1", "--bind-workers", script],
        "mpirun-init": [*any_mpi.mpirun(3), *anywhere, any_mpi.python, script],
    }[way]
    env = {"HPCRAY_NUM_CPUS": "1", "HPCRAY_BIND_WORKERS": "1"} if way == "mpirun-init" else {}
    (rank, first), (other, second) = seen(starter.run(argv, python=any_mpi.python, env=env))
    assert rank != other
    assert first
    assert second
    assert not set(first) & set(second)


def test_ranks_without_cpus_of_their_own_say_so_and_run_all_the_same(any_mpi, starter):
    script = starter.write(PRELUDE + "print(json.dumps(hpcray.get(look.remote())[1]))")
    argv = ["hpcray", "run", "-n", str(len(CPUS) + 2), "--bind-workers", script]
    finished = starter.run(argv, python=any_mpi.python)
    seen(finished)
    assert finished.err.count("workers are not bound, since other ranks or jobs may be using the same CPUs") == 1


def test_without_it_nothing_is_bound(starter, python):
    script = starter.write(PRELUDE + "print(json.dumps([cpus for _, cpus in together(2)]))")
    assert seen(starter.run(["hpcray", "run", script], python=python)) == [CPUS, CPUS]
