"""What putting and getting costs, as JSON: ``hpcray run tests/bench/bench_put.py [--quick] [--megabytes 800]``.

The large puts go where an earlier one of the same size was: into pages that are there, through a mapping that
is warm. Their yardstick is a copy between two warm arrays of that size. The first put of the job, which is not
warm, is a fact. Needs four times `--megabytes` of free memory, and 1 GB.
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Callable

import numpy as np
from common import Bench, Ratio, echo, median_us, options, seconds

import hpcray

SMALL = bytes(1024)
LATENCIES = 300
LARGE_LATENCIES = 20


def put_and_drop(value: object) -> None:
    """The reference dies at once, so the next put finds the same memory."""
    hpcray.put(value)


def put_and_get_small() -> None:
    """The value is kept in this process while its reference lives."""
    hpcray.get(hpcray.put(SMALL))


def pickle_small() -> None:
    """What putting and getting cannot do without."""
    pickle.loads(pickle.dumps(SMALL, protocol=5))


def main() -> None:
    """Measure all in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=800)
    parsed = options(parser)
    megabytes, get_bytes = (8, 10**7) if parsed.quick else (parsed.megabytes, 10**9)
    size = megabytes * 10**6
    hpcray.init()
    bench = Bench("put and get")
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    first = seconds(lambda: put_and_drop(source))
    bench.facts |= {"put bytes": size, "get bytes": get_bytes, "first put, GB/s": round(size / first / 1e9, 2)}
    large = hpcray.put(np.ones(get_bytes, np.uint8))

    def get_large() -> None:
        # Nothing keeps the array, so each get asks the raylet anew.
        assert hpcray.get(large).nbytes == get_bytes

    def gigabytes_per_second(action: Callable[[], object]) -> float:
        return size / seconds(action) / 1e9

    put_and_drop(source)
    get_large()
    with echo() as round_trips:
        bench.run(
            parsed.rounds,
            {
                "memcpy": ("GB/s", lambda: gigabytes_per_second(lambda: np.copyto(target, source))),
                "put": ("GB/s", lambda: gigabytes_per_second(lambda: put_and_drop(source))),
                "socket round trips": ("1/s", round_trips),
                "get of a large array": ("us", lambda: median_us(get_large, LARGE_LATENCIES)),
                "put and get of 1 KB": ("us", lambda: median_us(put_and_get_small, LATENCIES)),
                "pickle and unpickle of 1 KB": ("us", lambda: median_us(pickle_small, LATENCIES)),
            },
        )
    bench.report(
        {
            "put": Ratio("put", "memcpy", at_least=0.8),
            "put and get of 1 KB": Ratio("put and get of 1 KB", "pickle and unpickle of 1 KB"),
        }
    )


if __name__ == "__main__":
    main()
