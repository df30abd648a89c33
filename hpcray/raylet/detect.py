"""What this process may use of its host: CPUs, memory, accelerators. How ranks of one host share it: `sharing.py`.

/proc, /sys and /dev are looked for under a `root`, which tests replace.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcray.raylet.accelerators import Accelerator, DeviceReport
from hpcray.raylet.amd import Amd
from hpcray.raylet.cgroup import CgroupLimits, parse_cpu_list, read_limits
from hpcray.raylet.nvidia import Nvidia
from hpcray.raylet.sharing import RankMask

MAKERS: tuple[Accelerator, ...] = (Nvidia(), Amd())
"""Asked in this order; a rank offers the devices of the first that has any, as in Ray."""
_MIB = 2**20


@dataclass(frozen=True)
class CpuReport:
    """CPUs by each authority. None: it has no say here.

    Attributes:
        host: CPUs that are online.
        affinity: CPUs that this process may run on.
        quota: Its control groups' CPU time, in CPUs.
        cpuset: CPUs of its control group's cpuset.
        slurm_on_host: CPUs that Slurm gave the job on this host.
        slurm_per_task: CPUs that Slurm gave this rank.
    """

    host: int
    affinity: frozenset[int]
    quota: float | None = None
    cpuset: int | None = None
    slurm_on_host: int | None = None
    slurm_per_task: int | None = None

    @property
    def shared(self) -> int:
        """How many CPUs all ranks of the job on this host may keep busy; at least 1."""
        quota = None if self.quota is None else math.floor(self.quota)
        limits = (self.host, quota, self.cpuset, self.slurm_on_host)
        return max(1, min(limit for limit in limits if limit is not None))

    @property
    def usable(self) -> int:
        """How many CPUs this rank may keep busy if it has its host for itself; at least 1."""
        own = self.host if self.slurm_per_task is None else self.slurm_per_task
        return max(1, min(self.shared, len(self.affinity), own))

    @property
    def mask(self) -> RankMask:
        return RankMask(self.affinity, self.shared, self.slurm_per_task)


@dataclass(frozen=True)
class MemoryReport:
    """Bytes by each authority. None: it sets no limit."""

    host: int
    cgroup: int | None = None
    slurm: int | None = None

    @property
    def usable(self) -> int:
        """Bytes that the job may use on this host, all its ranks together."""
        return min(limit for limit in (self.host, self.cgroup, self.slurm) if limit is not None)


def detect_cpus(
    env: Mapping[str, str],
    affinity: Collection[int],
    root: Path = Path("/"),
    limits: CgroupLimits | None = None,
) -> CpuReport:
    """The CPUs that this process may use.

    Args:
        env: The rank's environment, for Slurm's word.
        affinity: ``os.sched_getaffinity(0)``.
        root: Where /proc and /sys are found.
        limits: Its control groups' limits, if known already.
    """
    limits = limits or read_limits(root)
    online = _read(root / "sys/devices/system/cpu/online")
    return CpuReport(
        host=len(parse_cpu_list(online)) if online else os.cpu_count() or len(affinity),
        affinity=frozenset(affinity),
        quota=limits.cpu_quota,
        cpuset=None if limits.cpuset is None else len(limits.cpuset),
        slurm_on_host=_slurm_cpus_on_host(env),
        slurm_per_task=None if _under_mpirun(env) else _number(env, "SLURM_CPUS_PER_TASK"),
    )


def memory_nodes(root: Path = Path("/")) -> list[frozenset[int]]:
    """The CPUs of each memory node (NUMA) of the host."""
    folders = sorted((root / "sys/devices/system/node").glob("node[0-9]*"), key=lambda folder: int(folder.name[4:]))
    return [parse_cpu_list(_read(folder / "cpulist")) for folder in folders]


def detect_memory(env: Mapping[str, str], root: Path = Path("/"), limits: CgroupLimits | None = None) -> MemoryReport:
    """The memory that the job may use on this host; arguments as for `detect_cpus`."""
    limits = limits or read_limits(root)
    fields = dict(line.split(":", 1) for line in _read(root / "proc/meminfo").splitlines() if ":" in line)
    host = int(fields["MemTotal"].split()[0]) * 1024
    return MemoryReport(host, limits.memory, _slurm_memory(env))


def detect_devices(
    env: Mapping[str, str], root: Path = Path("/"), makers: Sequence[Accelerator] = MAKERS
) -> DeviceReport:
    """The accelerators that this process may use; takes as long as their drivers take to answer."""
    reports = [maker.detect(env, root) for maker in makers]
    for report in reports:
        if report.devices:
            return report
    told = [report for report in reports if report.problem or report.reason]
    return told[0] if told else DeviceReport(reason="no GPU driver on this host")


def _slurm_cpus_on_host(env: Mapping[str, str]) -> int | None:
    if not _under_mpirun(env):
        return _number(env, "SLURM_CPUS_ON_NODE")
    # mpirun's daemons are a step of their own with few CPUs; the job's list says what its hosts have.
    counts = {part.partition("(")[0] for part in env.get("SLURM_JOB_CPUS_PER_NODE", "").split(",")}
    count = counts.pop() if len(counts) == 1 else ""
    return int(count) if count.isdecimal() else None


def _slurm_memory(env: Mapping[str, str]) -> int | None:
    if per_host := _number(env, "SLURM_MEM_PER_NODE"):  # MiB; 0 means all there is
        return per_host * _MIB
    for per_one, ones in (
        (_number(env, "SLURM_MEM_PER_CPU"), _slurm_cpus_on_host(env)),
        (_number(env, "SLURM_MEM_PER_GPU"), _number(env, "SLURM_GPUS_ON_NODE")),
    ):
        if per_one and ones:
            return per_one * ones * _MIB
    return None


def _under_mpirun(env: Mapping[str, str]) -> bool:
    return "OMPI_COMM_WORLD_RANK" in env or "HYDI_CONTROL_FD" in env


def _number(env: Mapping[str, str], name: str) -> int | None:
    text = env.get(name, "")
    return int(text) if text.isdecimal() else None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
