"""The store under two clients, many references and many waits, as JSON: ``hpcray run tests/bench/bench_store.py [--quick]``.

Two actors put at once what their own earlier puts have left warm; their yardstick is that both copy between two warm
arrays at once. A get of references includes that they are dropped again, as in Ray's benchmark of that name, and so is
the time of `wait` that of all its 1,000 calls, on tasks that have been submitted just before. The speed of
a Unix socket's round trips tells how busy the machine was. Needs eight times `--megabytes` of free memory.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
from common import Bench, Ratio, echo, options, seconds

import hpcray

START_DELAY = 0.05  # seconds: both actors have the call by then
REFERENCES = 10_000
WAITS = 1000


@hpcray.remote(num_cpus=0)
class Putter:
    """A client with an array of its own."""

    def __init__(self, size: int) -> None:
        self.source, self.target = np.ones(size, np.uint8), np.ones(size, np.uint8)

    def copy(self, times: int, start: float) -> tuple[float, float]:
        """Copy from memory to memory; when it began and when it ended."""
        return self._repeat(lambda: np.copyto(self.target, self.source), times, start)

    def put(self, times: int, start: float) -> tuple[float, float]:
        """Put and drop."""

        def put_and_drop() -> None:
            hpcray.put(self.source)

        return self._repeat(put_and_drop, times, start)

    def _repeat(self, action: Callable[[], object], times: int, start: float) -> tuple[float, float]:
        while time.monotonic() < start:
            pass
        for _ in range(times):
            action()
        return start, time.monotonic()


@hpcray.remote
def small_value() -> bytes:
    """As Ray's benchmarks have it."""
    return b"ok"


@hpcray.remote
def make_references(count: int) -> list[hpcray.ObjectRef]:
    """One object with many references inside."""
    return [hpcray.put(1) for _ in range(count)]


def wait_one_by_one(count: int) -> float:
    """Milliseconds of all calls of `wait`; those of submitting the tasks are not in it."""
    pending = [small_value.remote() for _ in range(count)]

    def wait_for_all() -> None:
        left = pending
        fetch = True
        for _ in range(count):
            _, left = hpcray.wait(left, fetch_local=fetch)
            fetch = False

    return seconds(wait_for_all) * 1e3


def main() -> None:
    """Measure all in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=100)
    parsed = options(parser)
    size = (2 if parsed.quick else parsed.megabytes) * 10**6
    times = 2 if parsed.quick else 10
    references, waits = (100, 20) if parsed.quick else (REFERENCES, WAITS)
    hpcray.init()
    bench = Bench("store")
    bench.facts |= {"put bytes": size, "puts of each client": times, "references": references, "waits": waits}
    putters = [Putter.remote(size) for _ in range(2)]
    container = make_references.remote(references)

    def both(method: str) -> float:
        start = time.monotonic() + START_DELAY
        spans = hpcray.get([getattr(putter, method).remote(times, start) for putter in putters])
        return 2 * times * size / (max(end for _, end in spans) - start) / 1e9

    def get_references() -> float:
        def get_and_drop() -> None:
            assert len(hpcray.get(container)) == references

        return seconds(get_and_drop) * 1e3

    for _ in range(2):
        both("put")
        get_references()
        wait_one_by_one(waits)
    with echo() as round_trips:
        bench.run(
            parsed.rounds,
            {
                "memcpy of two processes": ("GB/s", lambda: both("copy")),
                "put of two clients": ("GB/s", lambda: both("put")),
                "get of an object with references": ("ms", get_references),
                "wait, one by one": ("ms", lambda: wait_one_by_one(waits)),
                "socket round trips": ("1/s", round_trips),
            },
        )
    bench.report(
        {
            "put of two clients": Ratio("put of two clients", "memcpy of two processes", at_least=0.9),
        },
        {"get of an object with references": {"at_most": 20}, "wait, one by one": {"at_most": 100}},
    )


if __name__ == "__main__":
    main()
