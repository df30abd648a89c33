"""Random programs on a fake cluster, under arbitrary delivery orders: nothing is lost, nothing leaks, nothing hangs.

`Program.judge` runs after every step: the cores agree with themselves, memory that is looked at does not change, and no get
is answered with an error that nothing explains. `Program.finish` brings each program to its end: every get is answered, and
when all references and groups are gone, no object, task, call, actor, bundle, lease or block is left.
"""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hpcray.testing.cluster import Cluster
from hpcray.testing.program import Program, random_step

LAYOUTS: list[tuple[list[int], list[str]]] = [
    ([1, 1, 1], []),  # three hosts
    ([2, 2], ["a", "a"]),  # one host: memory is mapped
    ([1, 1, 2], ["a", "b", "a"]),  # both
    ([0, 1, 1], ["a", "a", "a"]),  # rank 0 offers no CPUs
    ([2], []),  # alone
]
seeds = st.integers(0, 1 << 16)


def make_program(layout: int, random: Random, *, is_small: bool = False, drivers: int = 1) -> Program:
    cpus, machines = LAYOUTS[layout]
    # A small store has room for four large objects, and its creators wait 50 seconds of fake time.
    limits: dict[str, Any] = {"arena_size": 1 << 13, "store_timeout": 50.0} if is_small else {"arena_size": 1 << 18}
    program = Program(Cluster(cpus, machines=machines, **limits), random, drivers)
    program.may_be_full = is_small
    return program


class ClusterMachine(RuleBasedStateMachine):
    """Each rule is one action of somebody, drawn from the seed: a driver, a task, the network, or fate."""

    kills = False
    is_small = False

    @initialize(layout=st.integers(0, len(LAYOUTS) - 1), drivers=st.integers(1, 2), seed=seeds)
    def boot(self, layout: int, drivers: int, seed: int) -> None:
        self.program = make_program(layout, Random(seed), is_small=self.is_small, drivers=drivers)

    def seeded(self, seed: int) -> Program:
        self.program.random = Random(seed)
        return self.program

    @rule(seed=seeds, count=st.integers(1, 8))
    def deliver(self, seed: int, count: int) -> None:
        self.seeded(seed).deliver(count)

    @rule(seed=seeds, large=st.booleans())
    def put(self, seed: int, large: bool) -> None:
        self.seeded(seed).put(large=large)

    @rule(
        seed=seeds,
        cpus=st.sampled_from([10_000, 5_000, 0]),
        spread=st.booleans(),
        num_returns=st.integers(1, 2),
        retries=st.integers(0, 1),
    )
    def submit(self, seed: int, cpus: int, spread: bool, num_returns: int, retries: int) -> None:
        self.seeded(seed).submit(cpus=cpus, spread=spread, num_returns=num_returns, retries=retries)

    @rule(seed=seeds, restarts=st.integers(0, 1))
    def create_actor(self, seed: int, restarts: int) -> None:
        self.seeded(seed).create_actor(restarts=restarts)

    @rule(seed=seeds, strategy=st.sampled_from(["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]))
    def create_group(self, seed: int, strategy: str) -> None:
        self.seeded(seed).create_group(strategy)

    @rule(seed=seeds)
    def await_group(self, seed: int) -> None:
        self.seeded(seed).await_group()

    @rule(seed=seeds)
    def remove_group(self, seed: int) -> None:
        self.seeded(seed).remove_group()

    @rule(seed=seeds, num_returns=st.integers(1, 2))
    def call(self, seed: int, num_returns: int) -> None:
        self.seeded(seed).call(num_returns=num_returns)

    @rule(seed=seeds)
    def get(self, seed: int) -> None:
        self.seeded(seed).get()

    @rule(seed=seeds)
    def watch(self, seed: int) -> None:
        self.seeded(seed).watch()

    @rule(seed=seeds)
    def time_out(self, seed: int) -> None:
        self.seeded(seed).stop_getting()

    @rule(seed=seeds)
    def release(self, seed: int) -> None:
        self.seeded(seed).release()

    @rule(seed=seeds, large=st.booleans(), seconds=st.sampled_from([0.0001, 0.01]), keep=st.booleans())
    def finish_task(self, seed: int, large: bool, seconds: float, keep: bool) -> None:
        self.seeded(seed).finish_task(large=large, seconds=seconds, keep=keep)

    @rule()
    def let_time_pass(self) -> None:
        self.program.let_time_pass()

    @precondition(lambda self: self.kills)
    @rule(seed=seeds)
    def fail_task(self, seed: int) -> None:
        self.seeded(seed).finish_task(failed=True)

    @precondition(lambda self: self.kills)
    @rule(seed=seeds)
    def kill_worker(self, seed: int) -> None:
        self.seeded(seed).kill_worker()

    @precondition(lambda self: self.is_small)
    @rule(seed=seeds)
    def fill_disk(self, seed: int) -> None:
        self.seeded(seed).fill_disk()

    @precondition(lambda self: self.is_small)
    @rule(seed=seeds)
    def damage_disk(self, seed: int) -> None:
        self.seeded(seed).damage_disk()

    @precondition(lambda self: self.is_small)
    @rule(seed=seeds)
    def interrupt(self, seed: int) -> None:
        self.seeded(seed).stop_writing()

    @precondition(lambda self: self.is_small)
    @rule()
    def wait(self) -> None:
        self.program.cluster.advance(30.0)

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "program"):
            self.program.judge()

    def teardown(self) -> None:
        if hasattr(self, "program"):
            self.seeded(0).finish()


class DeadlyMachine(ClusterMachine):
    """Tasks fail, and workers are killed."""

    kills = True


class FullMachine(ClusterMachine):
    """The stores are so small that creators wait, objects go to disk and come back, and disks fill up and forget."""

    is_small = True


LIMITS = settings(
    max_examples=25,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestCluster = ClusterMachine.TestCase
TestDeadlyCluster = DeadlyMachine.TestCase
TestFullCluster = FullMachine.TestCase
TestCluster.settings = TestDeadlyCluster.settings = TestFullCluster.settings = LIMITS


@pytest.mark.parametrize("layout", range(len(LAYOUTS)))
@pytest.mark.parametrize("kind", ["peaceful", "deadly", "full", "full and deadly"])
def test_long_random_programs_come_to_their_end(layout: int, kind: str) -> None:
    for seed in range(8):
        random = Random(f"{layout} {kind} {seed}")
        program = make_program(layout, random, is_small="full" in kind, drivers=1 + seed % 2)
        for _ in range(120):
            random_step(program, random, kills="deadly" in kind, failures="deadly" in kind)
            if "full" in kind and random.random() < 0.1:
                random.choice([program.fill_disk, program.damage_disk, program.stop_writing])()
            program.judge()
        program.finish()
