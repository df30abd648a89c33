"""What starting costs, as JSON: ``python tests/bench/bench_boot.py [--quick] [--ranks 4]``.

From the command to the first result of a task in the script, and to the end of the command. The yardsticks: a
Python that does nothing, and as many ranks that import mpi4py's MPI and end. Also the import of hpcray, beyond
a Python that does nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from common import Bench, Ratio, job_command, options, output_of, seconds

from hpcray.launcher.mpirun import MpirunNotFound, added_environment, find_mpirun, mpirun_argv

HELLO = "from mpi4py import MPI"


def first_result() -> None:
    """The script: print when its first task was done. That clock is the machine's, the same in all processes."""
    import hpcray

    hpcray.init()
    result = hpcray.get(hpcray.remote(lambda: 1).remote())
    assert result == 1
    print(time.monotonic(), flush=True)


class Stopwatch:
    """Times jobs; keeps how long the latest took to its end."""

    def __init__(self) -> None:
        self.end = 0.0

    def first_result(self, ranks: int) -> float:
        """Seconds to the first result of a job."""
        start = time.monotonic()
        printed = output_of(job_command(ranks, __file__, "--as-script"))
        self.end = time.monotonic() - start
        return float(printed.split()[-1]) - start


def python_seconds(code: str) -> float:
    """How long a Python takes that runs this."""
    return seconds(lambda: output_of([sys.executable, "-c", code]))


def main() -> None:
    """Measure all in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--as-script", action="store_true", help=argparse.SUPPRESS)
    parsed = options(parser)
    if parsed.as_script:
        first_result()
        return
    ranks = 2 if parsed.quick else parsed.ranks
    bench = Bench("boot")
    bench.facts["script"] = Path(__file__).name
    watch = Stopwatch()
    python_seconds("import hpcray")
    watch.first_result(1)
    try:
        mpirun = find_mpirun()
    except MpirunNotFound as error:
        mpirun = None
        bench.facts["mpirun"] = str(error)
    for _ in range(parsed.rounds):
        nothing = python_seconds("pass")
        importing = python_seconds("import hpcray")
        bench.add("python -c pass", "s", nothing)
        bench.add("python -c 'import hpcray'", "s", importing)
        bench.add("import hpcray", "s", max(importing - nothing, 1e-4))
        bench.add("first result, 1 rank", "s", watch.first_result(1))
        bench.add("whole job, 1 rank", "s", watch.end)
        if mpirun is None:
            continue
        env = {**os.environ, **added_environment(mpirun.flavour)}
        hello_command = mpirun_argv(mpirun, ranks, [sys.executable, "-c", HELLO])
        hello = seconds(lambda command=hello_command, env=env: output_of(command, env))
        first = watch.first_result(ranks)
        bench.add(f"mpi4py hello, {ranks} ranks", "s", hello)
        bench.add(f"first result, {ranks} ranks", "s", first)
        bench.add(f"first result beyond the hello, {ranks} ranks", "s", max(first - hello, 1e-4))
        bench.add(f"whole job, {ranks} ranks", "s", watch.end)
    promised = {"import hpcray": {"at_most": 0.15}, "first result, 1 rank": {"at_most": 1.0}}
    if mpirun is not None:
        promised[f"first result beyond the hello, {ranks} ranks"] = {"at_most": 2.0}
    bench.report(
        {
            "import hpcray": Ratio("python -c 'import hpcray'", "python -c pass"),
            "first result, 1 rank": Ratio("first result, 1 rank", "python -c pass"),
            f"first result, {ranks} ranks": Ratio(f"first result, {ranks} ranks", f"mpi4py hello, {ranks} ranks"),
        },
        promised,
    )


if __name__ == "__main__":
    main()
