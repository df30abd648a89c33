"""What all tiers share: GPUs on machines that have none."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "support/libnvidia-ml.c"
HANDED_OUT = (
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "SLURM_STEP_GPUS",
    "SLURM_JOB_GPUS",
)


@pytest.fixture(scope="session")
def fake_nvml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a libnvidia-ml.so.1 that answers as `tests/support/libnvidia-ml.c` says."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (cc) to build the stand-in for NVIDIA's library: apt-get install gcc libc6-dev")
    folder = tmp_path_factory.mktemp("nvml")
    command = [compiler, "-shared", "-fPIC", "-Wall", "-Werror", "-o", folder / "libnvidia-ml.so.1", SOURCE]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture
def fake_gpus(fake_nvml: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``fake_gpus(4)``: the jobs that this test starts from now on, on whatever ranks, find four GPUs on their host.

    The UUIDs begin with ``GPU-0``, ``GPU-1``, and so on. Only other processes find them: those that hpcray, mpirun or
    `subprocess` start, since a process that runs already looks for libraries where it did at its start.

    Args:
        count: None: the library is there, but no driver.
        names: The products, the last one for all that follow. By default all are "NVIDIA H100 80GB HBM3".
        mig: For each GPU how many MIG instances it has (UUIDs ``MIG-00``, ``MIG-01``, …, ``MIG-10``); None: MIG is off.
        fails: ``"nvmlDeviceGetName:2=15"``: this function fails for GPU 2 with this number; without ":2" for all.
    """

    def pretend(
        count: int | None, *, names: Sequence[str] = (), mig: Sequence[int | None] = (), fails: str = ""
    ) -> None:
        path = os.environ.get("LD_LIBRARY_PATH")
        settings = {
            "LD_LIBRARY_PATH": os.pathsep.join([str(fake_nvml), *([path] if path else [])]),
            "FAKE_NVML_GPUS": None if count is None else str(count),
            "FAKE_NVML_NAMES": ";".join(names) or None,
            "FAKE_NVML_MIG": ",".join("-" if instances is None else str(instances) for instances in mig) or None,
            "FAKE_NVML_FAIL": fails or None,
            **dict.fromkeys(HANDED_OUT),
        }
        for name, value in settings.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)

    return pretend
