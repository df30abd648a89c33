"""Environments of child processes: without the marks of an MPI rank, with limits for thread pools. Pure.

What launchers add to a rank was compared by experiment: Open MPI 5 sets `OMPI_*` and `PMIX_*` (identity,
contact, and `OMPI_MCA_*` for its own use), MPICH's hydra sets `PMI_*`, `MPI_LOCAL*` and `HYDI_CONTROL_FD`.
What a user sets to configure MPI is kept, so that a task's own `mpirun` behaves as in the user's shell.
"""

from __future__ import annotations

import os
import re
from collections.abc import Container, Mapping
from pathlib import Path

DRIVER_SOCKET = "HPCRAY_DRIVER"

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)

MPI_SETTINGS = {
    # Slurm's PMIx plugin and the wheel's client disagree about munge, at length and without effect.
    "PMIX_MCA_psec": "native",
    # What ranks move lies in host memory: without these, a library that knows GPUs asks a driver about each buffer.
    "OMPI_MCA_accelerator": "null",
    "OMPI_MCA_opal_cuda_support": "0",  # Open MPI 4
    "MPIR_CVAR_ENABLE_GPU": "0",
}
"""For MPI in the ranks, where the user has not set it otherwise."""

SET_AT_START = frozenset(name for name in THREAD_VARIABLES if name in os.environ)
"""Thread variables of this process's own environment as it was when it started: the user's choice."""

_IDENTITY = re.compile(
    r"""
    # Open MPI: all but the permission to run as root, compiler wrappers, and MCA parameters ...
    OMPI_(?!ALLOW_RUN_AS_ROOT|MCA_|(CC|CXX|FC|CPPFLAGS|CFLAGS|CXXFLAGS|FCFLAGS|LDFLAGS|LIBS)$)
    # ... except the parameters by which the launcher (4 and 5) tells a rank who it is.
    | OMPI_MCA_(PREFIXES$|cpu_type$|initial_wdir$|num_procs$|mpi_ft_enable$)
    | OMPI_MCA_(ess|orte_|pmix|opal_|shmem_RUNTIME)
    | OPAL_USER_PARAMS_GIVEN$
    # PMIx and its runtime: parameters and installation prefixes are configuration.
    | PMIX_(?!MCA_|PREFIX$|INSTALL_PREFIX$)
    | PRTE_(?!MCA_|PREFIX$)
    | PRTE_MCA_(PREFIXES$|ess|prte_(hnp|parent|ess)|plm_ssh_|schizo_proxy$)
    # PMI 1 and 2: hydra, Slurm, Cray, Flux. HYDRA_* only configures mpiexec.
    | PMI2?_
    | HYDI_
    | MPI_LOCAL(NRANKS|RANKID)$
    | MV2_COMM_WORLD_
    | PALS_
    | ALPS_APP_
    | FLUX_TASK_
    # Slurm: the step, not the job.
    | SLURM_(STEP|SRUN_COMM_|PMIX|PMI2|CPU_BIND|MEM_BIND)
    | SLURMD_(NODENAME|DEBUG)$
    | SLURM_(PROCID|LOCALID|NODEID|TASK_PID|GTIDS|LAUNCH_NODE_IPADDR|MPI_TYPE)$
    | HPCRAY_(DRIVER|STDIO)$
    """,
    re.VERBOSE,
)


def scrub(env: Mapping[str, str]) -> dict[str, str]:
    """The environment without what would make a child believe that it is an MPI rank or a driver."""
    return {name: value for name, value in env.items() if not _IDENTITY.match(name)}


def thread_limits(num_cpus: float, set_by_user: Container[str] = SET_AT_START) -> dict[str, str]:
    """Variables that keep thread pools to a task's CPUs: as in Ray, ``max(1, int(num_cpus))``.

    Args:
        num_cpus: What the task asks for.
        set_by_user: Names that keep their values. With `OMP_NUM_THREADS` all do, since it governs the others.
    """
    if "OMP_NUM_THREADS" in set_by_user:
        return {}
    return {name: str(max(1, int(num_cpus))) for name in THREAD_VARIABLES if name not in set_by_user}


def startup_path(env: Mapping[str, str]) -> dict[str, str]:
    """The variable by which a script's Python runs `startup/sitecustomize.py` before the script."""
    folder = str(Path(__file__).parent / "startup")
    return {"PYTHONPATH": os.pathsep.join([folder, *filter(None, [env.get("PYTHONPATH")])])}


def driver_socket_value(fd: int, inode: int) -> str:
    """The value of `HPCRAY_DRIVER`: a descriptor, and what proves to a grandchild that it is not its own."""
    return f"{fd}:{inode}"


def parse_driver_socket(value: str) -> tuple[int, int]:
    """``(fd, inode)`` of `driver_socket_value`: the driver checks that ``os.fstat(fd).st_ino`` is that inode.

    Raises:
        ValueError: Not such a value.
    """
    fd, inode = value.split(":")
    return int(fd), int(inode)
