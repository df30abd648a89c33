"""Scheduling at sizes that no test machine has, as JSON: ``python tests/bench/bench_scheduling.py [--quick]``.

The real cores of GCS and raylets on a simulated clock (hpcray/testing/simulation.py): one driver submits all tasks at once.
A rank is as slow as its cores are on this machine, so the driver's own rank, which starts every task, bounds the makespan
too. No schedule that does not know what is to come is sure to end before the work is done by all cores plus the longest task.
"""

from __future__ import annotations

import argparse
import random

import psutil
from common import Bench, Ratio, echo, options, seconds

from hpcray.testing.simulation import Simulation

LOADS: dict[str, tuple[tuple[float, ...], tuple[int, ...]]] = {
    "mixed": ((0.1, 1.0, 10.0), (80, 15, 5)),
    "long": ((5.0, 10.0, 20.0), (40, 40, 20)),
}
"""Seconds that tasks take, and how many of a hundred."""
BATCH = 1_000


def simulate(bench: Bench, load: str, nodes: int, cpus: int, tasks: int) -> None:
    """One driver's tasks of mixed length over all nodes."""
    choice = random.Random(1)
    durations = choice.choices(*LOADS[load], k=tasks)
    simulation = Simulation(nodes, cpus, durations.__getitem__)
    simulation.define(b"task")
    process = psutil.Process()
    before = process.memory_info().rss

    def submit() -> None:
        for start in range(0, tasks, BATCH):
            simulation.submit([b"task"] * min(BATCH, tasks - start))

    submitting = seconds(submit)
    if load == next(iter(LOADS)):  # later ones are given what the first has left
        bench.add("memory of a queued task", "bytes", (process.memory_info().rss - before) / tasks)
    makespan = simulation.run()
    bench.add(f"{load}: makespan", "s", makespan)
    bench.add(f"{load}: work / cores", "s", sum(durations) / (nodes * cpus))
    bench.add(f"{load}: work / cores + longest", "s", sum(durations) / (nodes * cpus) + max(durations))
    head = simulation.ranks[0].seconds + submitting
    bench.add(f"{load}: GCS", "us per task", simulation.gcs.seconds / tasks * 1e6)
    bench.add(f"{load}: the driver's rank", "us per task", head / tasks * 1e6)
    bench.add(f"{load}: other ranks", "us per task", sum(rank.seconds for rank in simulation.ranks[1:]) / tasks * 1e6)
    bench.add(f"{load}: messages", "per task", simulation.sent.total() / tasks)
    to_gcs = sum(simulation.sent[kind] for kind in ("Load", "Demand", "GrantReturned"))
    bench.add(f"{load}: messages to the GCS", "per task", to_gcs / tasks)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=1_000)
    parser.add_argument("--cpus", type=int, default=64)
    parser.add_argument("--tasks", type=int, default=1_000_000)
    parsed = options(parser, rounds=1)
    nodes, cpus, tasks = (20, 4, 1_000) if parsed.quick else (parsed.nodes, parsed.cpus, parsed.tasks)
    bench = Bench("scheduling")
    bench.facts = {"nodes": nodes, "CPUs of each": cpus, "tasks": tasks}
    with echo() as round_trips:
        for _ in range(parsed.rounds):
            bench.add("socket round trip", "us", 1e6 / round_trips())
            for load in LOADS:
                simulate(bench, load, nodes, cpus, tasks)
    ratios = {f"{load}: GCS in round trips": Ratio(f"{load}: GCS", "socket round trip") for load in LOADS} | {
        f"{load}: makespan": Ratio(f"{load}: makespan", f"{load}: work / cores + longest", at_most=1.5)
        for load in LOADS
    }
    bench.report(ratios, {f"{load}: GCS": {"at_most": 20} for load in LOADS})


if __name__ == "__main__":
    main()
