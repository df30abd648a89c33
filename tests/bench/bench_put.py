"""What one client's puts and gets cost, as JSON: ``hpcray run tests/bench/bench_put.py [--quick] [--megabytes 800]``.

Warm puts go where an earlier one of the same size was: into pages that are there, through a mapping that is warm.
Their yardstick is a copy between two warm arrays of that size. Cold puts go where nobody has written yet; theirs is
a write into a new memfd. Needs four times `--megabytes` of free memory, and 1 GB.
"""

from __future__ import annotations

import argparse
import os
import pickle
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from common import Bench, Ratio, echo, median_us, options, per_second, seconds

import hpcray

SMALL = bytes(1024)
LATENCIES = 300
SMALL_PUTS = 5000
LARGE_LATENCIES = 20
TOUCHED_AHEAD = 150_000_000  # bytes: a little more than a raylet touches by itself

Bytes = npt.NDArray[np.uint8]


def put_and_drop(value: object) -> None:
    """The reference dies at once, so the next put finds the same memory."""
    hpcray.put(value)


def put_and_get_small() -> None:
    """The value is kept in this process while its reference lives."""
    hpcray.get(hpcray.put(SMALL))


def pickle_small() -> None:
    """What putting and getting cannot do without."""
    pickle.loads(pickle.dumps(SMALL, protocol=5))


def put_and_get_many() -> None:
    """As a program does it that is busy with it."""
    for _ in range(SMALL_PUTS):
        hpcray.get(hpcray.put(SMALL))


def write_to_new_memory(source: Bytes) -> float:
    """Seconds that the kernel takes to find pages and fill them; those of making the file and of giving it back aside."""
    fd = os.memfd_create("bench")
    os.ftruncate(fd, source.nbytes)

    def write() -> None:
        done = 0
        while done < source.nbytes:
            done += os.pwrite(fd, source.data[done:], done)

    taken = seconds(write)
    os.close(fd)
    return taken


def measure_cold(bench: Bench, rounds: int, size: int) -> None:
    """Nothing is dropped, so that each put finds new memory; must come before any other put."""
    kept = [hpcray.put(np.ones(TOUCHED_AHEAD, np.uint8))]
    source = np.ones(size, np.uint8)
    for _ in range(rounds):
        bench.add("write into a new memfd", "GB/s", size / write_to_new_memory(source) / 1e9)
        bench.add("cold put", "GB/s", size / seconds(lambda: kept.append(hpcray.put(source))) / 1e9)


def main() -> None:
    """Measure all in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=800)
    parsed = options(parser)
    megabytes, get_bytes = (8, 10**7) if parsed.quick else (parsed.megabytes, 10**9)
    size = megabytes * 10**6
    hpcray.init()
    bench = Bench("put and get")
    bench.facts |= {
        "put bytes": size,
        "smaller put bytes": size // 8,
        "cold put bytes": size // 4,
        "get bytes": get_bytes,
    }
    measure_cold(bench, parsed.rounds, size // 4)
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    smaller, smaller_target = source[: size // 8], target[: size // 8]
    large = hpcray.put(np.ones(get_bytes, np.uint8))

    def get_large() -> None:
        # Nothing keeps the array, so each get asks the raylet anew.
        assert hpcray.get(large).nbytes == get_bytes

    def gigabytes_per_second(size: int, action: Callable[[], object]) -> float:
        return size / seconds(action) / 1e9

    for warming in (source, smaller):
        for _ in range(2):
            put_and_drop(warming)
    get_large()
    put_and_get_many()
    with echo() as round_trips:
        bench.run(
            parsed.rounds,
            {
                "memcpy": ("GB/s", lambda: gigabytes_per_second(size, lambda: np.copyto(target, source))),
                "put": ("GB/s", lambda: gigabytes_per_second(size, lambda: put_and_drop(source))),
                "smaller memcpy": (
                    "GB/s",
                    lambda: gigabytes_per_second(smaller.nbytes, lambda: np.copyto(smaller_target, smaller)),
                ),
                "smaller put": ("GB/s", lambda: gigabytes_per_second(smaller.nbytes, lambda: put_and_drop(smaller))),
                "socket round trips": ("1/s", round_trips),
                "get of a large array": ("us", lambda: median_us(get_large, LARGE_LATENCIES)),
                "put and get of 1 KB": ("us", lambda: median_us(put_and_get_small, LATENCIES)),
                "put and get of 1 KB, many": ("1/s", lambda: per_second(put_and_get_many, SMALL_PUTS)),
                "pickle and unpickle of 1 KB": ("us", lambda: median_us(pickle_small, LATENCIES)),
            },
        )
    bench.report(
        {
            "put": Ratio("put", "memcpy", at_least=0.9),
            "smaller put": Ratio("smaller put", "smaller memcpy", at_least=0.9),
            "cold put": Ratio("cold put", "write into a new memfd", at_least=1.0),
            "put and get of 1 KB": Ratio("put and get of 1 KB", "pickle and unpickle of 1 KB"),
        },
        {"get of a large array": {"at_most": 300}, "put and get of 1 KB, many": {"at_least": 20_000}},
    )


if __name__ == "__main__":
    main()
