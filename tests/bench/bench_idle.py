"""What an idle job costs, as JSON: ``python tests/bench/bench_idle.py [--quick] [--ranks 8] [--seconds 10]``.

The job runs some tasks, so that there are workers, then nothing happens. CPU time is what the scheduler has
counted for all threads of all of its processes, mpirun among them, as a share of one core. Private memory is
what `smaps_rollup` calls private: pages that no other process maps. A rank's has its arena's touched pages in
it, so they are also left out.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from common import CHILD_TIMEOUT, Bench, job_command, options

READY = "ready"
SETTLE = 2.0
"""Seconds from the last task until the job counts as idle: the transport's sleeps have grown by then."""


def idle_script() -> None:
    """The script: some tasks, then nothing until stdin ends."""
    import hpcray

    hpcray.init()
    hpcray.get([hpcray.remote(lambda: None).remote() for _ in range(100)])
    print(READY, flush=True)
    sys.stdin.read()


@contextlib.contextmanager
def idle_job(ranks: int) -> Iterator[psutil.Process]:
    """A job that does nothing, as its outermost process."""
    command = job_command(ranks, __file__, "--as-script")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdin is not None
        assert job.stdout is not None
        try:
            if READY not in job.stdout.readline():
                raise RuntimeError("the job did not start")
            yield psutil.Process(job.pid)
            job.stdin.close()
            job.wait(CHILD_TIMEOUT)
        finally:
            job.terminate()


@dataclass(frozen=True)
class Roles:
    """The processes of a job."""

    launchers: list[psutil.Process]
    ranks: list[psutil.Process]
    fork_servers: list[psutil.Process]
    workers: list[psutil.Process]
    drivers: list[psutil.Process]


def roles_of(job: psutil.Process) -> Roles:
    """Tell the processes apart: below a rank is its fork server, below that its workers, and the driver on rank 0."""
    everybody = [job, *job.children(recursive=True)]
    parents = {process.pid: process.ppid() for process in everybody}
    forked = [process for process in everybody if "hpcray.raylet.forkserver" in process.cmdline()]
    servers = {process.pid for process in forked if parents[process.pid] not in {other.pid for other in forked}}
    ranks = {parents[pid] for pid in servers}
    roles = Roles([], [], [], [], [])
    for process in everybody:
        if process.pid in servers:
            roles.fork_servers.append(process)
        elif process.pid in ranks:
            roles.ranks.append(process)
        elif process in forked:
            roles.workers.append(process)
        elif parents[process.pid] in servers:
            roles.drivers.append(process)
        else:
            roles.launchers.append(process)
    return roles


def cpu_seconds(processes: list[psutil.Process]) -> float:
    """CPU time of all their threads since they began; the scheduler's nanoseconds, since a tick is 10 ms."""
    files = (path for process in processes for path in Path(f"/proc/{process.pid}/task").glob("*/schedstat"))
    return sum(int(path.read_text().split()[0]) for path in files) / 1e9


def private_megabytes(process: psutil.Process) -> float:
    """Memory that would be free without this process."""
    return _sum_private(Path(f"/proc/{process.pid}/smaps_rollup").read_text())


def private_arena_megabytes(process: psutil.Process) -> float:
    """The part of it that is its arena's."""
    total = 0.0
    is_arena = False
    for line in Path(f"/proc/{process.pid}/smaps").read_text().splitlines():
        if not line.split()[0].endswith(":"):
            is_arena = "/memfd:" in line
        elif is_arena:
            total += _sum_private(line)
    return total


def _sum_private(smaps: str) -> float:
    return sum(int(line.split()[1]) for line in smaps.splitlines() if line.startswith("Private_")) * 1024 / 1e6


def measure(bench: Bench, job: psutil.Process, wait: float, rounds: int) -> None:
    """Look at the job, then let it be for some seconds, so many times."""
    roles = roles_of(job)
    named = {name: getattr(roles, name) for name in Roles.__dataclass_fields__}
    bench.facts |= {"seconds": wait, **{name: len(processes) for name, processes in named.items()}}
    for _ in range(rounds):
        before = {name: cpu_seconds(processes) for name, processes in named.items()}
        time.sleep(wait)
        used = {name: cpu_seconds(processes) - before[name] for name, processes in named.items()}
        bench.add("CPU, the whole job", "% of a core", 100 * sum(used.values()) / wait)
        for name, part in used.items():
            bench.add(f"CPU, {name}", "% of a core", 100 * part / wait)
    for name in ("workers", "ranks", "fork_servers", "drivers"):
        processes = named[name]
        bench.add(f"threads, {name}", "each", statistics.median(process.num_threads() for process in processes))
        bench.add(f"private memory, {name}", "MB each", statistics.median(map(private_megabytes, processes)))
    without = [private_megabytes(process) - private_arena_megabytes(process) for process in roles.ranks]
    bench.add("private memory, ranks without arena", "MB each", statistics.median(without))


def main() -> None:
    """Measure one job."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--as-script", action="store_true", help=argparse.SUPPRESS)
    parsed = options(parser)
    if parsed.as_script:
        idle_script()
        return
    ranks, wait, rounds = (2, 1.0, 1) if parsed.quick else (parsed.ranks, parsed.seconds, min(parsed.rounds, 3))
    bench = Bench(f"idle, {ranks} ranks")
    with idle_job(ranks) as job:
        time.sleep(SETTLE)
        measure(bench, job, wait, rounds)
    bench.report(
        {},
        {
            "CPU, the whole job": {"at_most": 1.0},
            "threads, workers": {"at_most": 1},
            "private memory, workers": {"at_most": 25.0},
        },
    )


if __name__ == "__main__":
    main()
