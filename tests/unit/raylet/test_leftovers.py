"""Which files of an MPI library are ours to remove."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from hpcray.raylet.leftovers import JobTraces, find_traces, remove_mpi_leftovers

MAPS_OPEN_MPI = """\
7fae4ebfe000-7fae4edff000 rw-s 00000000 00:1b 60 /dev/shm/osc_sm.vm.d4d50001.0.3 (deleted)
7fae4f000000-7fae50000000 rw-s 00000000 00:1b 58 /dev/shm/sm_segment.vm.0.d4d50001.1
7fae54174000-7fae55174000 rw-s 00000000 00:1b 59 /dev/shm/sm_segment.vm.0.d4d50001.0
7fae54174000-7fae55174000 rw-s 00000000 00:1b 59 /dev/shm/psm_python_shared_memory
"""
MAPS_MPICH = """\
7fba679b4000-7fba67bb4000 rw-s 00000000 00:1b 71 /dev/shm/mpich_shar_tmpytzAhN (deleted)
7fba67dfa000-7fba68000000 rw-s 00000000 00:1b 70 /dev/shm/mpich_shm_b323ecd1_0
7fba6d0fa000-7fba6d000000 r--p 00000000 00:1b 70 /usr/lib/libmpi.so.12
"""


def test_open_mpi_s_segment_of_this_rank_and_its_session() -> None:
    env = {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "PMIX_SERVER_TMPDIR": "/tmp/ompi.9032"}
    assert find_traces(env, MAPS_OPEN_MPI) == JobTraces(
        ("/dev/shm/sm_segment.vm.0.d4d50001.1",), "/tmp/ompi.9032", 9032
    )


def test_mpich_s_segment_of_the_host() -> None:
    assert find_traces({}, MAPS_MPICH) == JobTraces(("/dev/shm/mpich_shm_b323ecd1_0",))


def test_slurm_s_directory_is_not_ours() -> None:
    env = {"PMIX_SERVER_TMPDIR": "/var/spool/slurmd/pmix.12.0"}
    assert find_traces(env, "") == JobTraces()


def test_a_session_of_a_living_launcher_stays(tmp_path: Path) -> None:
    remove_mpi_leftovers(JobTraces(session_dir=str(tmp_path), launcher_pid=os.getpid()))
    assert tmp_path.exists()


def test_what_a_dead_launcher_left_goes(tmp_path: Path) -> None:
    launcher = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, launcher.pid, os.WEXITED | os.WNOWAIT)  # dead, though its parent has not noticed
    session = tmp_path / f"ompi.{launcher.pid}"
    (session / "1" / "0").mkdir(parents=True)
    segment = tmp_path / "segment"
    segment.touch()
    traces = JobTraces((str(segment), "/dev/shm/mpich_shm_gone_0"), str(session), launcher.pid)
    remove_mpi_leftovers(traces)
    remove_mpi_leftovers(traces)
    assert list(tmp_path.iterdir()) == []
    launcher.wait()
