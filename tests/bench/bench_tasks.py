"""No-op tasks and actor calls per second, as JSON: ``hpcray run [-n 2] tests/bench/bench_tasks.py [--quick]``.

Batch: all are submitted, then all are got. One at a time: each is got before the next is submitted, which takes
the sum of all wake-ups on its way, so its yardstick is a wake-up there and back: a Unix-socket round trip
between two Python processes.

mpi4py.futures runs beside the idle job, one master and one worker, afresh in each round. ProcessPoolExecutor
has two workers.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import Bench, Ratio, echo, options, output_of, per_second

import hpcray
from hpcray.launcher.mpirun import MpirunNotFound, added_environment, find_mpirun, mpirun_argv

FUTURES = str(Path(__file__).with_name("bench_futures.py"))
WORKERS = 2
PROMISED = 3000 * 24e-6
"""Tasks per round trip, one at a time: 3,000/s where a round trip takes 24 us."""
PROMISED_ALONE = 4000 * 24e-6
"""Likewise in one rank, where no other rank has to be woken."""
Measures = dict[str, tuple[str, Callable[[], float]]]


@hpcray.remote
def nothing() -> None:
    """The task."""


@hpcray.remote
class Nobody:
    """The actor."""

    def nothing(self) -> None:
        """The call."""


def plain_nothing() -> None:
    """The task, for the other executors."""


def hpcray_measures(name: str, submit: Callable[[], Any], batch: int, single: int) -> Measures:
    """Both figures of one kind of work."""

    def run_batch() -> None:
        hpcray.get([submit() for _ in range(batch)])

    def run_one_at_a_time() -> None:
        for _ in range(single):
            hpcray.get(submit())

    run_batch()
    return {
        f"{name}, batch": ("1/s", lambda: per_second(run_batch, batch)),
        f"{name}, one at a time": ("1/s", lambda: per_second(run_one_at_a_time, single)),
    }


@contextmanager
def process_pool_measures(batch: int, single: int) -> Iterator[Measures]:
    """The standard library's executor. Spawned, since a fork of this process would hold its connection."""
    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn")) as pool:

        def run_batch() -> None:
            for future in [pool.submit(plain_nothing) for _ in range(batch)]:
                future.result()

        def run_one_at_a_time() -> None:
            for _ in range(single):
                pool.submit(plain_nothing).result()

        run_batch()
        yield {
            "ProcessPoolExecutor, batch": ("1/s", lambda: per_second(run_batch, batch)),
            "ProcessPoolExecutor, one at a time": ("1/s", lambda: per_second(run_one_at_a_time, single)),
        }


def futures_measures(bench: Bench, batch: int, single: int) -> Measures:
    """mpi4py's executor, where there is an mpirun."""
    try:
        mpirun = find_mpirun()
    except MpirunNotFound as error:
        bench.facts["mpi4py.futures"] = str(error)
        return {}
    env = {**os_environment(), **added_environment(mpirun.flavour)}
    command = [sys.executable, "-m", "mpi4py.futures", FUTURES, str(batch), str(single)]
    latest: dict[str, float] = {}

    def run_batch() -> float:
        answer = json.loads(output_of(mpirun_argv(mpirun, 2, command), env))
        bench.facts["mpi4py.futures"] = f"{answer['library']}, {answer['workers']} worker"
        latest.update(answer)
        return latest["batch"]

    return {
        "mpi4py.futures, batch": ("1/s", run_batch),
        "mpi4py.futures, one at a time": ("1/s", lambda: latest["single"]),
    }


def os_environment() -> dict[str, str]:
    """The environment without what one MPI job would tell another."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX_", "PMI_", "PRTE_", "HYD"))}


def main() -> None:
    """Measure all in turns."""
    parsed = options(argparse.ArgumentParser(description=__doc__))
    batch, single = (200, 20) if parsed.quick else (5000, 1000)
    hpcray.init()
    ranks = len(hpcray.nodes())
    bench = Bench(f"tasks, {ranks} rank{'s' * (ranks > 1)}")
    bench.facts |= {"ranks": ranks, "CPUs of the job": hpcray.cluster_resources()["CPU"], "batch": batch}
    actor = Nobody.remote()
    with echo() as round_trips, process_pool_measures(batch, single) as process_pool:
        bench.run(
            parsed.rounds,
            {
                "socket round trips": ("1/s", round_trips),
                **hpcray_measures("tasks", nothing.remote, batch, single),
                **hpcray_measures("actor calls", actor.nothing.remote, batch, single),
                **futures_measures(bench, batch, single),
                **process_pool,
            },
        )
    bench.report(
        {
            "tasks, batch": Ratio("tasks, batch", "mpi4py.futures, batch", at_least=4.0),
            "actor calls, batch": Ratio("actor calls, batch", "mpi4py.futures, batch", at_least=4.0),
            "tasks, one at a time": Ratio(
                "tasks, one at a time", "socket round trips", at_least=PROMISED_ALONE if ranks == 1 else PROMISED
            ),
            "tasks to mpi4py.futures, one at a time": Ratio("tasks, one at a time", "mpi4py.futures, one at a time"),
            "actor calls to tasks, batch": Ratio("actor calls, batch", "tasks, batch", at_least=1.0),
            "actor calls to tasks, one at a time": Ratio(
                "actor calls, one at a time", "tasks, one at a time", at_least=1.0
            ),
            "tasks to ProcessPoolExecutor, batch": Ratio("tasks, batch", "ProcessPoolExecutor, batch"),
            "tasks to ProcessPoolExecutor, one at a time": Ratio(
                "tasks, one at a time", "ProcessPoolExecutor, one at a time"
            ),
        }
    )


if __name__ == "__main__":
    main()
