"""Many kinds of work at once on four ranks give the same answer each time. HPCRAY_TEST_REPEATS says how often (default: 3)."""

import os
import shutil
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "mixed_work.py"
REPEATS = int(os.environ.get("HPCRAY_TEST_REPEATS", "3"))
EACH = ["--num-cpus", "2", "--num-gpus", "2", "--resources", '{"licence": 1}']
ANSWER = "answer 647fa9403543"


@pytest.mark.timeout(60 + 60 * REPEATS)
@pytest.mark.parametrize("extra", [(), ("--bind-workers",)], ids=["", "bound"])
def test_the_answer_is_the_same_every_time(mpi, starter, fake_gpus, extra):
    fake_gpus(6)
    for number in range(REPEATS):
        marks = starter.folder / "marks"
        marks.mkdir()
        argv = ["hpcray", "run", "-n", "4", *EACH, *extra, str(PROGRAM), str(marks)]
        finished = starter.run(argv, python=mpi.python, env={"HPCRAY_CHECK": "1"})
        assert finished.code == 0, f"run {number}: {finished}"
        assert finished.out.splitlines()[-1] == ANSWER, f"run {number}: {finished}"
        shutil.rmtree(marks)
