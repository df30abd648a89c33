"""What `hpcray doctor` looks at in each rank, as one value that travels to rank 0."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import msgspec

from hpcray.launcher.roles import detect_launch
from hpcray.raylet.accelerators import DeviceReport
from hpcray.raylet.cgroup import read_limits
from hpcray.raylet.detect import CpuReport, MemoryReport, detect_cpus, detect_devices, detect_memory

_PROBE_TIMEOUT = 30.0  # seconds; an MPI library that takes longer to start alone hangs
_PROBE = """
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
from hpcray.launcher import facts
MPI.Init_thread(MPI.THREAD_FUNNELED)
facts.print_mpi(MPI)
MPI.Finalize()
"""
_SLURM = (
    "SLURM_JOB_ID",
    "SLURM_JOB_PARTITION",
    "SLURM_JOB_NUM_NODES",
    "SLURM_JOB_NODELIST",
    "SLURM_NTASKS",
    "SLURM_CPUS_PER_TASK",
    "SLURM_CPUS_ON_NODE",
    "SLURM_MEM_PER_NODE",
    "SLURM_MEM_PER_CPU",
    "SLURM_JOB_GPUS",
    "SLURM_STEP_GPUS",
)


@dataclass(frozen=True)
class MpiFacts:
    """The MPI library that mpi4py loads; `error` says why there is none."""

    library: str = ""
    thread_level: str = ""
    has_ulfm: bool = False
    error: str = ""


@dataclass(frozen=True)
class Facts:
    """What one rank found. Limits are None where there is none.

    Attributes:
        launcher: Who started the rank (`roles.Launch.launcher`).
        rank: Its rank, 0 if it is alone.
        versions: hpcray's and Python's.
        descriptors: How many files it may have open.
        processes: How many processes its user may have.
        slurm: Slurm's word on the job, by variable.
        memfd_error: Why memory cannot be shared by descriptor; empty if it can.
    """

    launcher: str
    rank: int
    host: str
    versions: tuple[str, str]
    mpi: MpiFacts
    cpus: CpuReport
    memory: MemoryReport
    gpus: DeviceReport
    descriptors: int | None = None
    processes: int | None = None
    slurm: dict[str, str] = field(default_factory=dict)
    memfd_error: str = ""


def collect(env: Mapping[str, str] = os.environ) -> Facts:
    """This process's facts. Blocks up to 30 s where MPI has to be tried in a process of its own."""
    import hpcray

    launch = detect_launch(env)
    limits = read_limits()
    loaded = sys.modules.get("mpi4py.MPI")
    return Facts(
        launcher=launch.launcher,
        rank=launch.rank or 0,
        host=socket.gethostname(),
        versions=(hpcray.__version__, platform.python_version()),
        mpi=describe_mpi(loaded) if loaded is not None and loaded.Is_initialized() else _probe_mpi(),
        cpus=detect_cpus(env, os.sched_getaffinity(0), limits=limits),
        memory=detect_memory(env, limits=limits),
        gpus=detect_devices(env),
        descriptors=_limit(resource.RLIMIT_NOFILE),
        processes=_limit(resource.RLIMIT_NPROC),
        slurm={name: env[name] for name in _SLURM if name in env},
        memfd_error=_memfd_error(),
    )


def describe_mpi(mpi: Any) -> MpiFacts:
    """The facts of an initialised ``mpi4py.MPI``."""
    levels = {
        mpi.THREAD_SINGLE: "single",
        mpi.THREAD_FUNNELED: "funneled",
        mpi.THREAD_SERIALIZED: "serialized",
        mpi.THREAD_MULTIPLE: "multiple",
    }
    has_ulfm = False
    with contextlib.suppress(Exception):
        mpi.COMM_SELF.Is_revoked()
        has_ulfm = True
    return MpiFacts(_first_words(mpi.Get_library_version()), levels[mpi.Query_thread()], has_ulfm)


def print_mpi(mpi: Any) -> None:
    """For the probe: `describe_mpi` on a line of stdout."""
    print(msgspec.json.encode(describe_mpi(mpi)).decode(), flush=True)


def encode(facts: Facts) -> bytes:
    return msgspec.msgpack.encode(asdict(facts))


def decode(data: bytes) -> Facts:
    return msgspec.msgpack.decode(data, type=Facts)


def _probe_mpi() -> MpiFacts:
    # MPI may abort the process that initialises it where something is amiss, so not this one.
    try:
        probe = subprocess.run(
            [sys.executable, "-c", _PROBE],
            # Open MPI without a launcher leaves its segment in /dev/shm behind; alone it needs none.
            env={**os.environ, "OMPI_MCA_btl": "self"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PROBE_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return MpiFacts(error=f"MPI_Init did not return within {_PROBE_TIMEOUT:.0f} s")
    for line in probe.stdout.splitlines():
        if line.startswith("{"):
            return msgspec.json.decode(line, type=MpiFacts)
    said = [line for line in (probe.stdout + probe.stderr).splitlines() if line.strip(" -")]
    return MpiFacts(error=said[-1].strip() if said else f"the probe ended with {probe.returncode}")


def _first_words(version: str) -> str:
    """``Open MPI v5.0.11`` or ``MPICH Version: 5.0.2`` of a text that goes on about the build."""
    return " ".join(version.split(",")[0].splitlines()[0].split())


def _limit(which: int) -> int | None:
    soft, _ = resource.getrlimit(which)
    return None if soft == resource.RLIM_INFINITY else soft


def _memfd_error() -> str:
    try:
        os.close(os.memfd_create("hpcray-doctor"))
    except OSError as error:
        return str(error)
    return ""
