"""A million short-lived objects, what they cost and leave, as JSON: ``hpcray run tests/bench/bench_references.py [--quick]``.

Memory is each process's own, without the arena; the driver and all that the job runs on this host are taken together. An
entry or a count that were left behind would show as some hundred bytes for each object.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import psutil
from common import Bench, Ratio, echo, options, per_second

import hpcray

BATCH = 1_000
WARM = 20_000


@hpcray.remote
def wrap(refs: list[hpcray.ObjectRef]) -> list[hpcray.ObjectRef]:
    """Takes a reference, returns it and a new one."""
    return [*refs, hpcray.put(len(refs))]


def put(count: int) -> None:
    """Objects, a batch at a time."""
    for _ in range(0, count, BATCH):
        refs = [hpcray.put(number) for number in range(BATCH)]
        hpcray.get(refs[-1])


def nest(count: int) -> None:
    """Objects that hold one another."""
    for _ in range(0, count, BATCH):
        ref = hpcray.put(0)
        for _ in range(BATCH - 1):
            ref = hpcray.put([ref])


def call(count: int) -> None:
    """Arguments, results, and what is in them: three objects a call."""
    for _ in range(0, count, BATCH):
        hpcray.get([wrap.remote([hpcray.put(number)]) for number in range(BATCH // 3)])


def own_memory() -> int:
    """Bytes of the driver and of the rank's processes, without what they share."""
    rank = psutil.Process().parent()
    processes = [rank, *rank.children(recursive=True)] if rank is not None else []
    return sum(info.rss - info.shared for info in (process.memory_info() for process in processes))


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objects", type=int, default=1_000_000)
    parsed = options(parser)
    count = BATCH * 10 if parsed.quick else parsed.objects
    hpcray.init()
    bench = Bench("references")
    bench.facts = {"objects": count}
    uses: dict[str, Callable[[int], None]] = {"put": put, "nested put": nest, "call": call}
    for use in uses.values():
        use(BATCH if parsed.quick else WARM)
    with echo() as round_trips:
        for _ in range(parsed.rounds):
            bench.add("socket", "round trips/s", round_trips())
            for name, use in uses.items():
                bench.add(f"{name}, memory before", "MB", own_memory() / 1e6)
                bench.add(name, "objects/s", per_second(lambda use=use: use(count), count))  # type: ignore[misc]
                bench.add(f"{name}, memory after", "MB", own_memory() / 1e6)
    ratios = {f"{name} in round trips": Ratio(name, "socket") for name in uses}
    growth = {f"{name}, memory": Ratio(f"{name}, memory after", f"{name}, memory before", at_most=1.1) for name in uses}
    bench.report({**ratios, **growth})


if __name__ == "__main__":
    main()
