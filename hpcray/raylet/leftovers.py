"""What MPI libraries leave on a host when a job is killed, and its removal.

Observed with kill -9 (Open MPI 5.0, MPICH 5.0):
  mpirun killed   Open MPI: its session directory (`ompi.<pid of mpirun>`), each rank's /dev/shm/sm_segment.*.
                  MPICH: /dev/shm/mpich_shm_*, one per host.
  a rank killed   the same files in /dev/shm; Open MPI's launcher removes its session directory itself.
A file in /dev/shm is known as ours because our rank has it mapped; its random name alone says nothing.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec


class JobTraces(msgspec.Struct, array_like=True, frozen=True):
    """Where this rank's MPI library and launcher keep files on this host."""

    shared_files: tuple[str, ...] = ()
    """Paths in /dev/shm that go with the rank."""
    session_dir: str = ""
    """The launcher's directory, that goes with the launcher; empty if there is none."""
    launcher_pid: int = 0


_MAPPED = re.compile(r"/dev/shm/(\S+)$", re.MULTILINE)  # noqa: S108 - only read; a deleted file's line ends otherwise
_OF_MPI = re.compile(r"(mpich_shm_|mpich_shar_tmp|(sm|vader)_segment|osc_(sm|rdma)|open_mpi|ucx_shm_posix_|psm._shm)")
_SEGMENT = re.compile(r"(sm|vader)_segment\..*\.(?P<local_rank>\d+)$")
_SESSION = re.compile(r"(ompi|prte|prterun)\.(.*\.)?(?P<pid>\d+)$")


def find_traces(env: Mapping[str, str], maps: str) -> JobTraces:
    """Pure: a rank's traces, from its unscrubbed environment and its `/proc/self/maps` after `MPI_Init`."""
    local_rank = env.get("OMPI_COMM_WORLD_LOCAL_RANK")
    session_dir = env.get("PMIX_SERVER_TMPDIR", "")
    session = _SESSION.match(Path(session_dir).name)  # Slurm's directory does not match: it is slurmstepd's
    return JobTraces(
        shared_files=tuple(dict.fromkeys(_files_of_the_rank(maps, local_rank))),
        session_dir=session_dir if session else "",
        launcher_pid=int(session["pid"]) if session else 0,
    )


def _files_of_the_rank(maps: str, local_rank: str | None) -> Iterator[str]:
    for name in _MAPPED.findall(maps):
        segment = _SEGMENT.match(name)
        # Open MPI's peers attach to each other's segment late: a living rank's must keep its name.
        if _OF_MPI.match(name) and (segment is None or segment["local_rank"] == local_rank):
            yield f"/dev/shm/{name}"  # noqa: S108


def remove_mpi_leftovers(traces: JobTraces) -> None:
    """Remove the files of a rank that has ended, and its launcher's directory if the launcher is dead.

    Never raises; what is already gone is no error, and what belongs to another user stays.
    """
    for path in traces.shared_files:
        with contextlib.suppress(OSError):
            Path(path).unlink()
    if traces.session_dir and not _runs(traces.launcher_pid):
        shutil.rmtree(traces.session_dir, ignore_errors=True)


def _runs(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False
    return stat.rpartition(b")")[2].split()[0] not in (b"Z", b"X")
