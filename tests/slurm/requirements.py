"""What a virtual cluster needs of this machine."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from . import namespaces
from .execution import SEARCH_PATH

# Slurm's PMIx plugin opens the name without a version, which only the -dev package has.
PMIX_LIBRARY = "libpmix.so"
PROGRAMS = {
    "srun": "slurm-wlm",
    "sbatch": "slurm-wlm",
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "munged": "munge",
    "ip": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
}


def why_unavailable() -> str | None:
    """What keeps a cluster from starting on this machine, or None. Takes some milliseconds."""
    if os.geteuid() != 0:
        return "virtual Slurm hosts need root"
    missing = {package for program, package in PROGRAMS.items() if not shutil.which(program, path=SEARCH_PATH)}
    if not any(Path("/usr/lib").glob(f"*/{PMIX_LIBRARY}")) and not Path("/usr/lib64", PMIX_LIBRARY).exists():
        missing.add("libpmix-dev")
    if missing:
        return f"Debian packages missing: {' '.join(sorted(missing))} (tests/slurm/packages.txt lists all)"
    return namespaces.why_impossible()
