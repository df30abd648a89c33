"""The yardstick of bench_tasks.py: no-op tasks with mpi4py.futures. Prints one JSON line.

``mpirun -n 2 python -m mpi4py.futures bench_futures.py BATCH SINGLE``: the master and one worker.
"""

from __future__ import annotations

import json
import sys

from common import per_second
from mpi4py import MPI
from mpi4py.futures import MPIPoolExecutor


def nothing() -> None:
    """The task."""


def main() -> None:
    """Measure in one pool, warm."""
    batch, single = map(int, sys.argv[1:])
    with MPIPoolExecutor() as pool:
        pool.bootup(wait=True)

        def run(count: int) -> None:
            for future in [pool.submit(nothing) for _ in range(count)]:
                future.result()

        def run_one_at_a_time() -> None:
            for _ in range(single):
                pool.submit(nothing).result()

        run(100)
        print(
            json.dumps(
                {
                    "library": MPI.Get_library_version().split(",")[0].split("\n")[0].strip("\0 "),
                    "workers": pool.num_workers,
                    "batch": per_second(lambda: run(batch), batch),
                    "single": per_second(run_one_at_a_time, single),
                }
            )
        )


if __name__ == "__main__":
    main()
