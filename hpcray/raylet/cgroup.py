"""What this process's control groups allow it: version 1, version 2, and both at once (hybrid).

A limit counts wherever it stands on the path from the process's group up to the top; the smallest wins.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Version 1 says "no limit" with the largest multiple of the page size; nothing real comes near this.
_UNLIMITED_BYTES = 1 << 60


@dataclass(frozen=True)
class CgroupLimits:
    """None where no group sets a limit.

    Attributes:
        cpu_quota: CPUs' worth of time, a fraction perhaps.
        cpuset: The CPUs of its cpuset.
        memory: Bytes.
    """

    cpu_quota: float | None = None
    cpuset: frozenset[int] | None = None
    memory: int | None = None


def read_limits(root: Path = Path("/")) -> CgroupLimits:
    """The limits of this process; `root` holds /proc and /sys. What cannot be read sets no limit."""
    groups = _groups(root)
    quotas: list[float] = []
    memories: list[int] = []
    for path in _upwards(groups, "cpu"):
        quotas += _quota(path)
    for path in _upwards(groups, "memory"):
        memories += _memory(path)
    cpusets = [cpus for path in _upwards(groups, "cpuset") if (cpus := _cpuset(path))]
    return CgroupLimits(
        cpu_quota=min(quotas, default=None),
        cpuset=cpusets[0] if cpusets else None,
        memory=min(memories, default=None),
    )


def parse_cpu_list(text: str) -> frozenset[int]:
    """CPU numbers of a kernel list such as ``0-3,8,10-11``."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            cpus.update(range(int(first), int(last or first) + 1))
    return frozenset(cpus)


@dataclass(frozen=True)
class _Group:
    """A control group of this process and the top of its hierarchy, as directories."""

    path: Path
    top: Path


def _groups(root: Path) -> dict[str, _Group]:
    """By controller; version 2's group stands under the empty name."""
    tops = dict(_mounts(root))
    groups: dict[str, _Group] = {}
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, inside = rest.partition(":")
        for controller in controllers.split(","):
            if controller not in tops:
                continue
            top, mounted = tops[controller]
            below = inside[len(mounted) :] if mounted != "/" and inside.startswith(mounted) else inside
            path = top / below.lstrip("/")
            # In a container the path may be the host's, and the mount already ours.
            groups[controller] = _Group(path if path.is_dir() and ".." not in path.parts else top, top)
    return groups


def _mounts(root: Path) -> Iterator[tuple[str, tuple[Path, str]]]:
    """Where each controller's hierarchy is mounted, and which of its groups appears there."""
    for line in _read(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        if not after.startswith(("cgroup ", "cgroup2 ")):
            continue
        fields = before.split()
        top = root / fields[4].lstrip("/")
        if after.startswith("cgroup2 "):
            yield "", (top, fields[3])
        else:
            for option in after.split()[-1].split(","):
                yield option, (top, fields[3])


def _upwards(groups: dict[str, _Group], controller: str) -> Iterator[Path]:
    # In a hybrid set-up a controller belongs to one version; the files that exist tell which.
    for name in (controller, ""):
        if group := groups.get(name):
            path = group.path
            yield path
            while path != group.top:
                path = path.parent
                yield path


def _quota(path: Path) -> list[float]:
    if text := _read(path / "cpu.max"):  # version 2: "max 100000" or "150000 100000"
        quota, _, period = text.partition(" ")
    else:
        quota, period = _read(path / "cpu.cfs_quota_us"), _read(path / "cpu.cfs_period_us")
    if not quota.isdecimal() or not period.isdecimal() or int(period) == 0:
        return []
    return [int(quota) / int(period)]


def _memory(path: Path) -> list[int]:
    texts = [_read(path / name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
    return [int(text) for text in texts if text.isdecimal() and int(text) < _UNLIMITED_BYTES]


def _cpuset(path: Path) -> frozenset[int]:
    for name in ("cpuset.cpus.effective", "cpuset.effective_cpus", "cpuset.cpus"):
        if text := _read(path / name):
            return parse_cpu_list(text)
    return frozenset()


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
