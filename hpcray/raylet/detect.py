"""What this rank may use of its host: CPUs, memory, GPUs, and how ranks of one host share them.

Reading and judging are apart: `detect_…` look (with /proc, /sys and /dev under a `root` that tests replace),
`share…` are pure.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from hpcray.raylet.cgroup import CgroupLimits, parse_cpu_list, read_limits

_MIB = 2**20
_PAGE = 4096
_Item = TypeVar("_Item", bound=Hashable)


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


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank: all that it may use, and the part that is its object store."""

    total: int
    store: int


@dataclass(frozen=True)
class Gpu:
    """A GPU, or a part of one (MIG). `uuid` is what CUDA_VISIBLE_DEVICES takes."""

    uuid: str
    name: str
    memory: int


@dataclass(frozen=True)
class GpuReport:
    """The GPUs that this process may use, and why there are none or fewer."""

    gpus: tuple[Gpu, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class RankMask:
    """One rank's claim to the CPUs of its host.

    Attributes:
        cpus: The CPUs that it may run on.
        shared: How many the job may use on this host.
        own: How many this rank may use, if that is set.
    """

    cpus: frozenset[int]
    shared: int
    own: int | None = None


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


def detect_memory(env: Mapping[str, str], root: Path = Path("/"), limits: CgroupLimits | None = None) -> MemoryReport:
    """The memory that the job may use on this host; arguments as for `detect_cpus`."""
    limits = limits or read_limits(root)
    fields = dict(line.split(":", 1) for line in _read(root / "proc/meminfo").splitlines() if ":" in line)
    host = int(fields["MemTotal"].split()[0]) * 1024
    return MemoryReport(host, limits.memory, _slurm_memory(env))


def detect_gpus(env: Mapping[str, str], root: Path = Path("/")) -> GpuReport:
    """The GPUs that this process may use, by NVML. Where there is no driver NVML is not even loaded."""
    if not any((root / "dev" / name).exists() for name in ("nvidiactl", "dxg")):
        return GpuReport(reason="no NVIDIA driver on this host")
    try:
        import pynvml
    except ImportError as error:
        return GpuReport(reason=f"nvidia-ml-py cannot be imported: {error}")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return GpuReport(reason=f"the NVIDIA driver does not answer: {error}")
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        found = [
            Gpu(
                _text(pynvml.nvmlDeviceGetUUID(handle)),
                _text(pynvml.nvmlDeviceGetName(handle)),
                int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
            )
            for handle in handles
        ]
    except pynvml.NVMLError as error:
        return GpuReport(reason=f"the NVIDIA driver does not tell its GPUs: {error}")
    finally:
        pynvml.nvmlShutdown()
    return visible_gpus(found, env.get("CUDA_VISIBLE_DEVICES"))


def visible_gpus(found: Sequence[Gpu], visible: str | None) -> GpuReport:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves: numbers or beginnings of UUIDs, up to the first bad one."""
    if visible is None:
        return GpuReport(tuple(found), "" if found else "the NVIDIA driver knows no GPU")
    chosen: list[Gpu] = []
    for entry in filter(None, (part.strip() for part in visible.split(","))):
        gpu = _gpu_named(found, entry)
        if gpu is None or gpu in chosen:
            break
        chosen.append(gpu)
    reason = "" if len(chosen) == len(found) else f"CUDA_VISIBLE_DEVICES={visible}"
    return GpuReport(tuple(chosen), reason)


def share(ranks: Sequence[RankMask]) -> list[int]:
    """How many CPUs each rank of a host offers: as evenly as masks allow, none twice, at least 1 each."""
    if not ranks:
        return []
    limits = [len(rank.cpus) if rank.own is None else rank.own for rank in ranks]
    dealt = _deal([rank.cpus for rank in ranks], limits, min(rank.shared for rank in ranks))
    return [max(1, len(cpus)) for cpus in dealt]


def share_memory(usable: Sequence[int], stores: Sequence[int | None], part: float) -> list[RankMemory]:
    """Memory of each rank of a host.

    Args:
        usable: Bytes that the job may use on this host, as each rank sees it; the least counts.
        stores: Bytes that each rank's object store was asked to have; None: `part` of its memory.
        part: Between 0 and 1.

    Raises:
        ValueError: The stores that were asked for are larger than the memory; the text has the sizes.
    """
    together = min(usable)
    each = together // len(usable)
    sizes = [int(each * part) if store is None else store for store in stores]
    if sum(sizes) > together:
        raise ValueError(
            f"object stores of {sum(sizes):,} bytes in {len(sizes)} ranks are more than the {together:,} bytes of memory that "
            "the job may use on their host: ask for less (--object-store-memory, for each rank), or get more memory"
        )
    return [RankMemory(max(each, size), size - size % _PAGE) for size in sizes]


def share_gpus(ranks: Sequence[Sequence[str]]) -> list[list[str]]:
    """Which of the GPUs (by UUID) that each of a host's ranks sees it offers: evenly, none twice."""
    return _deal(ranks, [len(gpus) for gpus in ranks], sum(map(len, ranks)))


def _deal(hands: Sequence[Collection[_Item]], limits: Sequence[int], total: int) -> list[list[_Item]]:
    """Give each item to one who may have it: always to whoever has least, what fewest others may have."""
    claims: dict[_Item, int] = {}
    for hand in hands:
        for item in hand:
            claims[item] = claims.get(item, 0) + 1
    wanted = [sorted(hand, key=lambda item: claims[item])[::-1] for hand in hands]  # taken from the end
    dealt: list[list[_Item]] = [[] for _ in hands]
    taken: set[_Item] = set()
    players = list(range(len(hands)))
    while players and len(taken) < total:
        player = min(players, key=lambda p: len(dealt[p]))
        while wanted[player] and wanted[player][-1] in taken:
            wanted[player].pop()
        if not wanted[player] or len(dealt[player]) >= limits[player]:
            players.remove(player)
            continue
        item = wanted[player].pop()
        taken.add(item)
        dealt[player].append(item)
    return dealt


def _gpu_named(found: Sequence[Gpu], entry: str) -> Gpu | None:
    if entry.isdecimal():
        return found[int(entry)] if int(entry) < len(found) else None
    if entry.startswith("MIG-"):
        return Gpu(entry, "MIG device", 0)
    matches = [gpu for gpu in found if gpu.uuid.startswith(entry)]
    return matches[0] if len(matches) == 1 else None


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


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
