"""What many cost: queued tasks, ranks, short actors, as JSON: ``python tests/bench/bench_scale.py [--quick]``.

The memory of queued tasks is each process's own, without the arena; of the driver, and of all that the job runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from common import Bench, Ratio, job_command, options, output_of, per_second, seconds

import hpcray

NO_OPS = 10_000
ACTORS_AT_ONCE = 50
MORE_RANKS, FEWER_RANKS = 8, 2


@hpcray.remote
def nothing() -> None:
    """A no-op."""


@hpcray.remote
def wait_for(path: Path) -> None:
    """Keep a worker busy until there is such a file."""
    while not path.exists():
        time.sleep(0.01)


@hpcray.remote(num_cpus=0)
class Short:
    """An actor that is called once."""

    def call(self) -> int:
        """Anything."""
        return 1


def no_ops(count: int) -> dict[str, float]:
    """Seconds that a batch takes in a job that has run some."""
    hpcray.get([nothing.remote() for _ in range(count // 5)])
    return {"seconds": seconds(lambda: hpcray.get([nothing.remote() for _ in range(count)]))}


def queued(count: int) -> dict[str, float]:
    """Queue tasks, run and forget them, and that again: what the second time adds to the memory is lost."""
    hpcray.get(nothing.remote())
    measured = queue_and_run(count)
    before = own_memory()
    queue_and_run(count)
    return {**measured, "bytes left": (own_memory() - before) / count}


def queue_and_run(count: int) -> dict[str, float]:
    """Memory of tasks that wait behind some that run; then they run, and are forgotten."""
    before = own_memory()
    refs: list[hpcray.ObjectRef] = []
    with tempfile.TemporaryDirectory() as folder:
        gate = Path(folder, "gate")
        busy = [wait_for.remote(gate) for _ in range(int(hpcray.cluster_resources()["CPU"]))]
        submitted = per_second(lambda: refs.extend(nothing.remote() for _ in range(count)), count)
        time.sleep(1.0)  # what was sent is being read
        size = (own_memory() - before) / count
        gate.touch()
        run = per_second(lambda: hpcray.get([*refs, *busy]), count)
    refs.clear()
    hpcray.get(nothing.remote())
    time.sleep(1.0)
    return {"submitted": submitted, "run": run, "bytes": size}


def short_actors(count: int) -> dict[str, float]:
    """Actors per second that are made, called and forgotten, some at a time."""

    def live() -> None:
        for _ in range(0, count, ACTORS_AT_ONCE):
            actors = [Short.remote() for _ in range(ACTORS_AT_ONCE)]
            hpcray.get([actor.call.remote() for actor in actors])

    hpcray.get(Short.remote().call.remote())
    return {"per second": per_second(live, count)}


def own_memory() -> int:
    """Bytes of this driver, its rank and what that has started, without what they share."""
    driver = psutil.Process()
    processes = {driver, *driver.children(recursive=True)}
    return sum(info.rss - info.shared for info in (process.memory_info() for process in processes))


PARTS: dict[str, Callable[[int], dict[str, float]]] = {"no_ops": no_ops, "queued": queued, "short_actors": short_actors}


def child(part: str, count: int, ranks: int | None = None) -> dict[str, float]:
    """What a part measures, in a job of its own; without a number of ranks, of plain Python's."""
    script = [str(Path(__file__)), "--part", part, str(count)]
    command = [sys.executable, *script] if ranks is None else job_command(ranks, *script)
    measured: dict[str, float] = json.loads(output_of(command))
    return measured


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", nargs=2, metavar=("NAME", "COUNT"), help=argparse.SUPPRESS)
    parser.add_argument("--tasks", type=int, default=1_000_000)
    parsed = options(parser, rounds=3)
    if parsed.part:
        hpcray.init()
        print(json.dumps(PARTS[parsed.part[0]](int(parsed.part[1]))))
        return
    tasks, batch, actors = (2_000, 500, 50) if parsed.quick else (parsed.tasks, NO_OPS, 1_000)
    bench = Bench("scale")
    bench.facts = {"queued tasks": tasks, "no-ops": batch, "short actors": actors}
    for _ in range(parsed.rounds):
        for ranks in (FEWER_RANKS, MORE_RANKS):
            bench.add(f"no-ops in {ranks} ranks", "s", child("no_ops", batch, ranks)["seconds"])
        bench.add("short actors", "1/s", child("short_actors", actors)["per second"])
    measured = child("queued", tasks)
    bench.add("a queued task", "bytes", measured["bytes"])
    bench.add("a task of the second time, left behind", "bytes", max(measured["bytes left"], 0.01))
    bench.add("queued tasks submitted", "1/s", measured["submitted"])
    bench.add("queued tasks run", "1/s", measured["run"])
    more = Ratio(f"no-ops in {MORE_RANKS} ranks", f"no-ops in {FEWER_RANKS} ranks", at_most=1.5)
    bench.report({"more ranks": more}, {"a queued task": {"at_most": 2_000}})


if __name__ == "__main__":
    main()
