"""The job's exit code is the script's, however it ends and however it was started."""

import pytest

from .conftest import DISTINCT_WAYS

TRY = """
import os
import signal
import sys
import hpcray

@hpcray.remote
def one():
    return 1

hpcray.init()
assert hpcray.get(one.remote()) == 1
print("working", flush=True)
"""


@pytest.mark.parametrize("way", DISTINCT_WAYS, indirect=True)
def test_an_exception_gives_one_and_its_traceback_once(way, starter):
    script = starter.write(way.preamble + TRY + "raise ArithmeticError('out of numbers')\n")
    finished = starter.run(way.argv(2, script), python=way.python)
    assert finished.code == 1, str(finished)
    assert finished.err.count("ArithmeticError: out of numbers") == 1, str(finished)
    assert finished.err.count("Traceback") == 1, str(finished)


@pytest.mark.parametrize("way", DISTINCT_WAYS, indirect=True)
def test_a_script_that_ends_without_more_gives_zero(way, starter):
    script = starter.write(way.preamble + TRY)
    finished = starter.run(way.argv(2, script), python=way.python)
    assert finished.code == 0, str(finished)
    assert finished.out == "working\n"
    lines = finished.err.splitlines()
    assert all(line.startswith("hpcray 0") for line in lines), str(finished)
    assert len(lines) == (0 if "init" in way.name or way.name == "python" else 1)


# Where the script is itself a rank, its death by a signal is mpirun's to tell.
@pytest.mark.parametrize("way", [way for way in DISTINCT_WAYS if "late" not in way], indirect=True)
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_a_script_that_dies_of_a_signal_gives_128_and_its_number(way, name, starter):
    script = starter.write(way.preamble + TRY + f"os.kill(os.getpid(), signal.{name})\nsignal.pause()\n")
    finished = starter.run(way.argv(2, script), python=way.python)
    assert finished.code == {"SIGKILL": 137, "SIGTERM": 143}[name], str(finished)
    assert "Traceback" not in finished.err


@pytest.mark.parametrize("way", ["run", "python", "run-n:openmpi", "run-n:mpich"], indirect=True)
def test_an_exit_message_gives_one_and_the_message(way, starter):
    script = starter.write(TRY + "sys.exit('no such luck')\n")
    finished = starter.run(way.argv(2, script), python=way.python)
    assert finished.code == 1, str(finished)
    assert "no such luck" in finished.err
