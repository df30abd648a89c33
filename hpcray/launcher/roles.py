"""Which part a process plays in a job, read from the environment that its launcher left. Pure.

Nothing here imports MPI: `detect_launch` answers before it, `check_pmi` once its library is loaded, and `check_world`
compares afterwards.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Launcher = Literal["none", "openmpi", "hydra", "slurm-pmix", "slurm-pmi2", "slurm-none", "pmix"]

# Slurm's ids for a step that is not an application (slurm.h): the batch script, the extern step, an
# interactive allocation's shell. Scripts there see SLURM_PROCID=0 without having been started as a rank.
_NOT_A_STEP = {"", "batch", "extern", "interactive", "4294967291", "4294967290", "4294967292", "4294967294"}
_NOT_A_STEP |= {str(int(number) - 2**32) for number in _NOT_A_STEP if number.isdigit()}


class LaunchError(RuntimeError):
    """The job cannot start as it was launched. The text is one line for the user, remedy included."""


@dataclass(frozen=True)
class Launch:
    """What the environment claims. A number it does not tell is None.

    Attributes:
        launcher: Who started this process; ``slurm-…`` is a direct `srun`, with the PMI it offers.
        rank: This process's rank.
        size: How many ranks the job has.
        local_rank: This process's place among the ranks of its host.
        local_size: How many ranks share its host.
    """

    launcher: Launcher
    rank: int | None = None
    size: int | None = None
    local_rank: int | None = None
    local_size: int | None = None

    @property
    def is_mpi(self) -> bool:
        """Whether a launcher started this process as one rank of a job (perhaps of one)."""
        return self.launcher != "none"


def detect_launch(env: Mapping[str, str]) -> Launch:
    """Tell from the environment whether, and by whom, this process was started as a rank."""
    if "OMPI_COMM_WORLD_RANK" in env:
        return Launch(
            "openmpi",
            _number(env, "OMPI_COMM_WORLD_RANK"),
            _number(env, "OMPI_COMM_WORLD_SIZE"),
            _number(env, "OMPI_COMM_WORLD_LOCAL_RANK"),
            _number(env, "OMPI_COMM_WORLD_LOCAL_SIZE"),
        )
    if _in_slurm_step(env) and not _under_hydra(env):
        return Launch(
            _slurm_flavour(env),
            _number(env, "SLURM_PROCID"),
            _first_number(env, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"),
            _number(env, "SLURM_LOCALID"),
            _tasks_on_this_host(env),
        )
    if "PMI_RANK" in env:
        return Launch(
            "hydra",
            _number(env, "PMI_RANK"),
            _number(env, "PMI_SIZE"),
            _number(env, "MPI_LOCALRANKID"),
            _number(env, "MPI_LOCALNRANKS"),
        )
    if "PMIX_RANK" in env and "PMIX_NAMESPACE" in env:
        return Launch("pmix", _number(env, "PMIX_RANK"))
    return Launch("none")


def check_pmi(launch: Launch, library: str) -> None:
    """Raise if it is certain, before `MPI_Init`, that the library cannot find the other ranks.

    Afterwards would be late: a lone Open MPI leaves files behind, MPICH ends the process. What may work is let pass;
    `check_world` sees whether it did.

    Args:
        launch: What the environment claims.
        library: ``MPI.Get_library_version()``.

    Raises:
        LaunchError: `srun` offers a PMI that the library does not speak.
    """
    name = _library_name(library)
    version = re.search(r"Open MPI v(\d+)", library)
    is_deaf = {
        "slurm-none": version is not None and int(version[1]) >= 5,
        "slurm-pmi2": version is not None and int(version[1]) >= 5,
        # MPICH's text has its configure options: only a build for PMIx speaks it.
        "slurm-pmix": name == "MPICH" and "pmix" not in library.lower(),
    }
    if is_deaf.get(launch.launcher, False):
        offered = launch.launcher.removeprefix("slurm-")
        raise LaunchError(
            f"{_started(launch)} with --mpi={offered}, which this {name} does not speak: "
            f"{_remedy_for_lone_ranks(launch, name)}"
        )


def check_world(launch: Launch, world_size: int, world_rank: int, library: str) -> None:
    """Raise if the MPI library's world is not the one that the launcher started.

    Args:
        launch: What the environment claims.
        world_size: Size of ``MPI.COMM_WORLD``.
        world_rank: This process's rank there.
        library: ``MPI.Get_library_version()``, or any text that names the library.

    Raises:
        LaunchError: They differ; typically the library does not speak the launcher's PMI and every rank
            is alone.
    """
    if launch.size is None or launch.size == world_size:
        if launch.rank is None or launch.rank == world_rank or launch.size == 1:
            return
        raise LaunchError(
            f"rank {world_rank} of MPI is rank {launch.rank} of its launcher ({launch.launcher}); "
            "was this process started by another rank, with its environment?"
        )
    name = _library_name(library)
    if world_size == 1:
        raise LaunchError(
            f"{_started(launch)}, but {name} sees each rank alone (a world of 1): "
            f"{_remedy_for_lone_ranks(launch, name)}"
        )
    raise LaunchError(f"{_started(launch)}, but {name} sees a world of {world_size} ranks")


def driver_rank(launch: Launch) -> bool:
    """Whether the user's script runs beside this process: on rank 0, or where there are no ranks."""
    return launch.rank in (0, None)


def offers_cpus(rank: int, hosts: Sequence[str], head_cpus: float | None) -> bool:
    """Whether a rank's raylet offers CPUs.

    Rank 0, which also serves the job and the driver, offers none if another rank shares its host;
    alone there it does, or a whole node of an allocation would idle.

    Args:
        rank: The rank asked about.
        hosts: Each rank's host name, in rank order.
        head_cpus: `--head-cpus`, which decides for rank 0 when given.
    """
    if rank != 0:
        return True
    if head_cpus is not None:
        return head_cpus > 0
    return hosts[0] not in hosts[1:]


def offers_gpus(rank: int, hosts: Sequence[str], head_cpus: float | None) -> bool:
    """Whether a rank's raylet offers GPUs: if it offers CPUs, which tasks on GPUs need too, or is alone on its host.

    Arguments as for `offers_cpus`.
    """
    return offers_cpus(rank, hosts, head_cpus) or hosts[0] not in hosts[1:]


def _in_slurm_step(env: Mapping[str, str]) -> bool:
    step = env.get("SLURM_STEP_ID", env.get("SLURM_STEPID", ""))
    return "SLURM_PROCID" in env and step not in _NOT_A_STEP


def _under_hydra(env: Mapping[str, str]) -> bool:
    # Inside a step, mpiexec's proxies are themselves started by srun: the ranks see both. Hydra's own
    # variables tell them from an srun step, where PMI_RANK (pmi2) comes from Slurm.
    return "PMI_RANK" in env and ("HYDI_CONTROL_FD" in env or "MPI_LOCALRANKID" in env)


def _slurm_flavour(env: Mapping[str, str]) -> Launcher:
    if "PMIX_RANK" in env or "PMIX_NAMESPACE" in env:
        return "slurm-pmix"
    if "PMI_RANK" in env or "PMI_FD" in env or "PMI_JOBID" in env:
        return "slurm-pmi2"
    return "slurm-none"


def _tasks_on_this_host(env: Mapping[str, str]) -> int | None:
    # SLURM_STEP_TASKS_PER_NODE is "4(x2),3": per node of the step, in the order of SLURM_NODEID.
    listed = env.get("SLURM_STEP_TASKS_PER_NODE", "")
    node = _number(env, "SLURM_NODEID")
    if node is None:
        return None
    for part in listed.split(","):
        count, _, repeat = part.partition("(x")
        nodes = int(repeat[:-1]) if repeat[:-1].isdecimal() else 1
        if not count.isdecimal():
            return None
        if node < nodes:
            return int(count)
        node -= nodes
    return None


def _number(env: Mapping[str, str], name: str) -> int | None:
    text = env.get(name, "")
    return int(text) if text.isdecimal() else None


def _first_number(env: Mapping[str, str], *names: str) -> int | None:
    return next((value for name in names if (value := _number(env, name)) is not None), None)


def _library_name(library: str) -> str:
    for name in ("Open MPI", "Intel(R) MPI", "MVAPICH", "MPICH"):
        if name.lower() in library.lower():
            return name
    return library.split(",")[0].splitlines()[0].strip() if library.strip() else "the MPI library"


def _started(launch: Launch) -> str:
    if launch.launcher.startswith("slurm"):
        return f"srun started {launch.size} ranks"
    names = {"openmpi": "Open MPI's mpirun", "hydra": "MPICH's mpiexec (hydra)"}
    return f"{names.get(launch.launcher, launch.launcher)} started {launch.size} ranks"


def _remedy_for_lone_ranks(launch: Launch, library: str) -> str:
    if launch.launcher.startswith("slurm"):
        pmi = "pmix" if library == "Open MPI" else "pmi2"
        return f"use srun --mpi={pmi} (srun --mpi=list shows which there are)"
    return f"use the mpirun of {library}, next to the library that mpi4py loads (hpcray doctor shows which)"
