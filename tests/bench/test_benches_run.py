"""Each bench runs and prints figures. What they are is for `run_all.py` on a quiet machine, not for a test."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RUN_ALL = Path(__file__).with_name("run_all.py")
BENCHES = list(runpy.run_path(str(RUN_ALL))["COMMANDS"])

pytestmark = pytest.mark.bench


@pytest.mark.parametrize("name", BENCHES)
def test_a_quick_run_prints_figures(name: str) -> None:
    ran = subprocess.run(
        [sys.executable, str(RUN_ALL), "--quick", "--only", name], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
    report: dict[str, Any] = json.loads(ran.stdout)[name]
    assert set(report) >= {"bench", "machine", "load", "facts", "figures", "ratios"}
    assert report["figures"]
    for figure, values in report["figures"].items():
        # The parts of an idle job's CPU time may be nothing at all; their sum is not.
        assert values["median"] > 0 or (figure.startswith("CPU, ") and values["median"] == 0), figure
    assert report["figures"].get("CPU, the whole job", {"median": 1.0})["median"] > 0
    for ratio, values in report["ratios"].items():
        assert values["median"] > 0, ratio
