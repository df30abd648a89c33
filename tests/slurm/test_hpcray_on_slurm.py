"""hpcray on a Slurm cluster of three hosts: under srun with either library, and with mpirun inside a batch job."""

from __future__ import annotations

import subprocess
import textwrap
from pathlib import Path

import pytest

from .cluster import SlurmCluster
from .conftest import REPOSITORY

PYTHONPATH = {"PYTHONPATH": str(REPOSITORY)}

ARRAYS = """
import socket

import numpy as np

import hpcray

@hpcray.remote(num_cpus=1)
class Host:
    def make(self, seed):
        return np.random.default_rng(seed).random(8_000_000)  # 64 MB

    def total(self, array):
        return float(array.sum()), socket.gethostname()

hpcray.init()
cpus = int(hpcray.cluster_resources()["CPU"])
hosts = [Host.options(scheduling_strategy="SPREAD").remote() for _ in range(cpus)]
arrays = [host.make.remote(seed) for seed, host in enumerate(hosts)]
expected = [float(np.random.default_rng(seed).random(8_000_000).sum()) for seed in range(3)]
seen = set()
for i in range(3):
    for total, name in hpcray.get([host.total.remote(arrays[i]) for host in hosts]):
        assert total == expected[i], (total, expected[i])
        seen.add(name)
    assert float(hpcray.get(arrays[i]).sum()) == expected[i]
print("hosts", sorted(seen), "nodes", len(hpcray.nodes()), flush=True)
"""

PRESSED = """
import numpy as np

import hpcray

SIZE = 20_000_000  # bytes; a store has room for seven

@hpcray.remote(num_cpus=1)
def total(*arrays):
    return [int(array[0]) for array in arrays], sum(int(array[-1]) for array in arrays)

@hpcray.remote(num_cpus=1)
def look(refs):
    return int(hpcray.get(refs[0])[-1])

hpcray.init()
arrays = [np.full(SIZE // 8, i) for i in range(12)]
refs = [hpcray.put(array) for array in arrays]
del arrays
# A broadcast, and arguments that together are more than any store has room for.
assert hpcray.get([look.options(scheduling_strategy="SPREAD").remote([refs[3]]) for _ in range(9)], timeout=60) == [3] * 9
work = {}
for first in range(12):
    chosen = [(first + k) % 12 for k in range(4)]
    work[total.options(scheduling_strategy="SPREAD").remote(*[refs[i] for i in chosen])] = (chosen, sum(chosen))
for ref, expected in work.items():
    assert hpcray.get(ref, timeout=60) == expected
ready, _ = hpcray.wait(refs, num_returns=12, fetch_local=True, timeout=60)
assert len(ready) == 12
print("nodes", len(hpcray.nodes()), flush=True)
"""


NEIGHBOURS = """
import socket

import hpcray
from hpcray.util.placement_group import placement_group
from hpcray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

@hpcray.remote(num_cpus=1)
def host():
    return socket.gethostname()

hpcray.init()
group = placement_group([{"CPU": 1}] * 2, strategy="STRICT_SPREAD")
assert group.wait(60)
inside = [PlacementGroupSchedulingStrategy(group, index) for index in (0, 1)]
print("hosts", sorted(hpcray.get([host.options(scheduling_strategy=bundle).remote() for bundle in inside])), flush=True)
"""


@pytest.fixture(params=["openmpi:pmix", "mpich:pmi2"])
def library(request: pytest.FixtureRequest) -> tuple[str, str]:
    """An interpreter and the PMI under which its MPI library runs."""
    name, _, pmi = request.param.partition(":")
    return request.getfixturevalue(f"python_{name}"), pmi


def run(
    cluster: SlurmCluster, python: str, pmi: str, *arguments: str, per_host: int = 1, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """`srun hpcray run` on all hosts."""
    command = [f"--ntasks-per-node={per_host}", python, "-m", "hpcray", "run", *arguments]
    return cluster.srun(command, ntasks=3 * per_host, mpi=pmi, env=PYTHONPATH, cwd=cwd)


@pytest.mark.parametrize("per_host", [1, 2])
@pytest.mark.parametrize("example", ["stdlib_words", "counter_actor"])
def test_srun_runs_an_example_over_all_hosts(
    slurm_cluster: SlurmCluster, library: tuple[str, str], example: str, per_host: int
) -> None:
    script = str(REPOSITORY / "examples" / f"{example}.py")
    done = run(slurm_cluster, *library, script, per_host=per_host)
    assert done.returncode == 0, done
    assert f"{3 * per_host} ranks on 3 hosts" in done.stderr, done
    assert len(done.stderr.splitlines()) == 1, done


@pytest.mark.parametrize("per_host", [1, 2])
def test_arrays_move_between_hosts(
    slurm_cluster: SlurmCluster, library: tuple[str, str], tmp_path: Path, per_host: int
) -> None:
    (tmp_path / "arrays.py").write_text(ARRAYS)
    done = run(slurm_cluster, *library, "--num-cpus", "1", "arrays.py", per_host=per_host, cwd=tmp_path)
    assert done.returncode == 0, done
    assert f"hosts ['n1', 'n2', 'n3'] nodes {3 * per_host}" in done.stdout, done


@pytest.mark.parametrize("per_host", [1, 2])
def test_arguments_of_many_tasks_are_fetched_where_they_do_not_all_fit(
    slurm_cluster: SlurmCluster, library: tuple[str, str], tmp_path: Path, per_host: int
) -> None:
    (tmp_path / "pressed.py").write_text(PRESSED)
    options = ["--num-cpus", "1", "--object-store-memory", "150000000"]
    done = run(slurm_cluster, *library, *options, "pressed.py", per_host=per_host, cwd=tmp_path)
    assert done.returncode == 0, done
    assert done.stdout == f"nodes {3 * per_host}\n", done


def test_a_plain_script_finds_its_job_under_srun(
    slurm_cluster: SlurmCluster, library: tuple[str, str], tmp_path: Path
) -> None:
    (tmp_path / "plain.py").write_text(
        "import hpcray\nhpcray.init()\nprint(len(hpcray.nodes()), flush=True)\nraise SystemExit(3)\n"
    )
    python, pmi = library
    done = slurm_cluster.srun([python, "plain.py"], mpi=pmi, env=PYTHONPATH, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (3, "3\n"), f"{done.returncode}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("mpi", ["none", "other"])
def test_a_pmi_that_the_library_does_not_speak_is_refused_in_one_line(
    slurm_cluster: SlurmCluster, library: tuple[str, str], tmp_path: Path, mpi: str
) -> None:
    (tmp_path / "script.py").write_text("import hpcray\nhpcray.init()\nprint('ran')\n")
    python, pmi = library
    wrong = {"pmix": "pmi2", "pmi2": "pmix"}[pmi] if mpi == "other" else "none"
    done = run(slurm_cluster, python, wrong, "script.py", cwd=tmp_path)
    assert done.returncode == 2, done
    assert done.stdout == ""
    refusals = [line for line in done.stderr.splitlines() if line.startswith("hpcray: ")]
    assert len(refusals) == 1, done
    assert f"--mpi={pmi}" in refusals[0]
    assert "Traceback" not in done.stderr


def test_an_exception_ends_the_step_with_one(
    slurm_cluster: SlurmCluster, library: tuple[str, str], tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text("import hpcray\nhpcray.init()\nraise ArithmeticError('lost')\n")
    done = run(slurm_cluster, *library, "script.py", cwd=tmp_path)
    assert done.returncode == 1, done
    assert done.stderr.count("ArithmeticError: lost") == 1, done


def test_mpirun_inside_a_batch_job_spans_its_hosts(
    slurm_cluster: SlurmCluster, library: tuple[str, str], tmp_path: Path
) -> None:
    (tmp_path / "arrays.py").write_text(ARRAYS)
    python, _ = library
    batch = f"""\
        #!/bin/bash
        export PYTHONPATH={REPOSITORY}
        {python} -m hpcray run -n 3 --num-cpus 1 arrays.py
        """
    done = slurm_cluster.sbatch(textwrap.dedent(batch), cwd=tmp_path, env=PYTHONPATH)
    assert done.returncode == 0, done
    assert "hosts ['n1', 'n2', 'n3'] nodes 3" in done.stdout, done


def test_bundles_are_placed_on_hosts_of_one_switch(
    slurm_cluster: SlurmCluster, library: tuple[str, str], tmp_path: Path
) -> None:
    (tmp_path / "neighbours.py").write_text(NEIGHBOURS)
    done = run(slurm_cluster, *library, "--num-cpus", "1", "neighbours.py", cwd=tmp_path)
    assert done.returncode == 0, done
    assert "hosts ['n1', 'n3']" in done.stdout, done
    shown = slurm_cluster.srun(["printenv", "SLURM_TOPOLOGY_ADDR"])
    assert sorted(shown.stdout.split()) == ["spine.leaf0.n1", "spine.leaf0.n3", "spine.leaf1.n2"], shown
