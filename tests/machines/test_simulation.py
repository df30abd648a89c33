"""Simulated jobs: all work is done, no core is idle while work waits, and the GCS hears of no task."""

from __future__ import annotations

import random

import pytest

from hpcray.protocol import messages as m
from hpcray.testing.simulation import Simulation

TASK_MESSAGES = (m.Submit, m.Execute, m.Finished, m.Crashed)


def mixed(count: int) -> list[float]:
    return random.Random(count).choices((0.1, 1.0, 10.0), (80, 15, 5), k=count)


@pytest.mark.parametrize(("nodes", "cpus", "tasks"), [(1, 1, 50), (3, 2, 300), (60, 8, 6_000)])
def test_no_schedule_leaves_cores_idle_while_work_waits(nodes, cpus, tasks):
    seconds = mixed(tasks)
    simulation = Simulation(nodes, cpus, seconds.__getitem__)
    simulation.define(b"f")
    simulation.submit([b"f"] * tasks)
    makespan = simulation.run()
    # Graham's bound for any order in which no core is idle while something waits; the rest is what messages take.
    assert makespan <= (sum(seconds) / (nodes * cpus) + max(seconds)) * 1.1 + 0.5
    for rank in simulation.ranks:
        rank.core.check()
        assert rank.core.ledger.free == rank.core.ledger.total


def test_short_tasks_are_pipelined_and_cost_the_gcs_little():
    tasks = 20_000
    simulation = Simulation(20, 4, lambda _: 0.0005)
    simulation.define(b"f")
    simulation.submit([b"f"] * tasks)
    simulation.run()
    assert simulation.sent["Load"] < tasks / 4
    assert simulation.sent["Execute"] == simulation.sent["Finished"] == tasks


def test_classes_do_not_wait_for_one_another():
    """Tasks that no node can run, and others that need what few have, hold up nobody."""
    simulation = Simulation(4, 2, lambda number: 0.5 if number % 3 else 3.0)
    simulation.define(b"impossible", resources={"TPU": 10_000})
    simulation.define(b"f")
    simulation.define(b"wide", resources={"CPU": 20_000})
    simulation.submit([b"impossible"])
    simulation.submit([b"f", b"wide"] * 40)
    with pytest.raises(RuntimeError, match="1 of 81 tasks wait for ever"):
        simulation.run()


def test_what_a_node_submits_stays_there_while_there_is_room():
    simulation = Simulation(2, 4, lambda _: 0.0)
    simulation.define(b"f")
    seen: list[type] = []
    gcs = simulation.gcs.core
    on_message = gcs.on_message
    gcs.on_message = lambda rank, message: (seen.append(type(message)), on_message(rank, message))
    simulation.submit([b"f"] * 10_000)
    simulation.run()
    assert not set(seen) & set(TASK_MESSAGES)
