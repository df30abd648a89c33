"""How fast objects go to disk and come back, as JSON: ``python tests/bench/bench_spill.py [--quick] [--megabytes 1000]``.

Starts a job of one rank with a store of `--megabytes` and puts three times as much. The yardstick writes and reads files without
names in the same directory, as many bytes as were spilled and restored, in steps of the same size and from memory that is warm,
in as many threads as the raylet has. Both end in the page cache where that is large enough: the figures are of what hpcray adds,
not of the disk. Needs free memory for five times `--megabytes`, and disk space for three times.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
from collections.abc import Callable

import numpy as np
from common import Bench, Ratio, job_command, options, output_of, seconds

import hpcray
from hpcray.store.spillfiles import STEP, THREADS, spill_directory

MEGABYTE = 10**6
OBJECT = 5 * MEGABYTE
TOGETHER = 4  # objects in one `get`


def in_job(megabytes: int) -> None:
    """Put three stores full, then get them all: what a second of either moved to disk and back."""
    hpcray.init()
    count = 3 * megabytes * MEGABYTE // OBJECT
    fitting = megabytes * MEGABYTE // OBJECT
    array = np.ones(OBJECT, np.uint8)
    refs = [hpcray.put(array) for _ in range(fitting)]
    put = seconds(lambda: refs.extend(hpcray.put(array) for _ in range(count - fitting)))

    def get_all() -> None:
        for first in range(0, count - fitting, TOGETHER):
            assert hpcray.get(refs[first : min(first + TOGETHER, count - fitting)])[-1][-1] == 1

    got = seconds(get_all)
    moved = (count - fitting) * OBJECT / 1e9
    print(json.dumps({"spill": moved / put, "restore": moved / got}))


def bare(size: int, directory: str) -> tuple[float, float]:
    """The same bytes by nothing but pwrite and preadv, GB/s."""
    count = min(THREADS, max(2, len(os.sched_getaffinity(0))))
    share = size // count
    descriptors = [os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o600) for _ in range(count)]
    # As far apart as what the raylet writes: a buffer that stays in the cache of the CPU would be no yardstick.
    memory = [memoryview(np.ones(share // 2, np.uint8)).cast("B") for _ in range(count)]

    def step(index: int, start: int) -> memoryview:
        start %= len(memory[index])
        return memory[index][start : start + STEP]

    def write(index: int) -> None:
        for start in range(0, share, STEP):
            os.pwrite(descriptors[index], step(index, start), start)

    def read(index: int) -> None:
        for start in range(0, share, STEP):
            os.preadv(descriptors[index], [step(index, start)], start)

    def by_all(action: Callable[[int], None]) -> float:
        threads = [threading.Thread(target=action, args=[index]) for index in range(count)]

        def run() -> None:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        return size / seconds(run) / 1e9

    try:
        return by_all(write), by_all(read)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def main() -> None:
    """Measure all in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--in-job", action="store_true", help=argparse.SUPPRESS)
    parsed = options(parser)
    megabytes = 64 if parsed.quick else parsed.megabytes
    if parsed.in_job:
        in_job(megabytes)
        return
    bench = Bench("spilling")
    bench.facts |= {"store MB": megabytes, "object MB": OBJECT // MEGABYTE, "put MB": 3 * megabytes}
    directory = spill_directory(os.environ.get("HPCRAY_SPILL_DIR", ""), os.environ)
    command = [
        *job_command(1, "--object-store-memory", f"{megabytes}MB", __file__, "--in-job", "--megabytes", str(megabytes)),
        *(["--quick"] if parsed.quick else []),
    ]
    for _ in range(parsed.rounds):
        written, read = bare(2 * megabytes * MEGABYTE, directory)
        figures = json.loads(output_of(command).splitlines()[-1])
        bench.add("bare write", "GB/s", written)
        bench.add("spill", "GB/s", figures["spill"])
        bench.add("bare read", "GB/s", read)
        bench.add("restore", "GB/s", figures["restore"])
    bench.report({"spill": Ratio("spill", "bare write"), "restore": Ratio("restore", "bare read")})


if __name__ == "__main__":
    main()
