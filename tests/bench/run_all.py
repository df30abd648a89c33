"""Run the benches one after the other and print one JSON: ``python tests/bench/run_all.py [--quick] [--only NAME…]``.

A bench that fails is an "error" in the JSON, and the exit code is 1. Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
TIMEOUT = 900.0  # seconds; the slowest takes a tenth of it on an idle machine
JOB = ["-m", "hpcray", "run"]
COMMANDS: dict[str, list[str]] = {
    "tasks-1": [*JOB, "bench_tasks.py"],
    "tasks-2": [*JOB, "-n", "2", "bench_tasks.py"],
    "put": [*JOB, "bench_put.py"],
    "spill": ["bench_spill.py"],
    "store": [*JOB, "bench_store.py"],
    "references": [*JOB, "bench_references.py"],
    "boot": ["bench_boot.py"],
    "idle": ["bench_idle.py"],
    "transfer": ["mpirun", "4", "bench_transfer.py"],
    "scheduling": ["bench_scheduling.py"],
    "scale": ["bench_scale.py"],
    "policies": ["bench_policies.py"],
    "placement-groups-1": [*JOB, "bench_placement_groups.py"],
    "placement-groups-8": [*JOB, "-n", "8", "bench_placement_groups.py"],
}
"""What follows `python`, all but `--quick`."""
MORE_COMMANDS: dict[str, list[str]] = {
    "arena": ["bench_arena.py"],
    "transport": ["mpirun", "2", "bench_transport.py"],
}
"""Benches of a part, which have no `--quick`."""


def main() -> int:
    """Run what is asked for; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="show that they run; measures nothing")
    parser.add_argument("--only", nargs="+", choices=[*COMMANDS, *MORE_COMMANDS], metavar="NAME", default=None)
    parsed = parser.parse_args()
    names = parsed.only or [*COMMANDS, *([] if parsed.quick else MORE_COMMANDS)]
    reports: dict[str, object] = {}
    for name in names:
        print(f"{name} …", file=sys.stderr, flush=True)
        quick = ["--quick"] if parsed.quick and name in COMMANDS else []
        reports[name] = report_of([*command_of(name), *quick])
    print(json.dumps(reports, indent=2))
    return int(any(isinstance(report, dict) and "error" in report for report in reports.values()))


def command_of(name: str) -> list[str]:
    """The whole command line of a bench, without `--quick`."""
    words = [str(HERE / word) if word.endswith(".py") else word for word in {**COMMANDS, **MORE_COMMANDS}[name]]
    if words[0] != "mpirun":
        return [sys.executable, *words]
    from hpcray.launcher.mpirun import find_mpirun, mpirun_argv

    return mpirun_argv(find_mpirun(), int(words[1]), [sys.executable, *words[2:]])


def report_of(command: list[str]) -> object:
    """What a bench prints, or its error. Blocks."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE.parents[1]), os.environ.get("PYTHONPATH")])),
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as bench:
        try:
            out, err = bench.communicate(timeout=TIMEOUT)
        except BaseException as error:
            os.killpg(bench.pid, signal.SIGTERM)
            bench.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                return {"error": f"still ran after {TIMEOUT} s"}
            raise
    if bench.returncode:
        return {"error": f"exit code {bench.returncode}", "stderr": err.splitlines()[-20:]}
    try:
        return json.loads(out)
    except ValueError:
        return {"error": "printed no JSON", "stdout": out[-2000:]}


if __name__ == "__main__":
    sys.exit(main())
