"""All examples, in one rank and in four."""

from pathlib import Path

import pytest

from .conftest import REPOSITORY

EXAMPLES = sorted((REPOSITORY / "examples").glob("*.py"))
QUICK = [path for path in EXAMPLES if path.stem in ("counter_actor", "array_chunks")]


def needs(example: Path) -> str:
    return "sklearn" if "sklearn" in example.read_text() else "numpy"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_in_one_rank(example, python, starter):
    starter.skip_without(needs(example), python)
    finished = starter.run([python, "-m", "hpcray", "run", str(example)], python=python, timeout=120)
    assert finished.code == 0, str(finished)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_in_four_ranks(example, any_mpi, starter):
    starter.skip_without(needs(example), any_mpi.python)
    argv = [any_mpi.python, "-m", "hpcray", "run", "-n", "4", str(example)]
    finished = starter.run(argv, python=any_mpi.python, timeout=120)
    assert finished.code == 0, str(finished)
    assert "hpcray 0" in finished.err
    assert "4 ranks on 1 host" in finished.err


@pytest.mark.parametrize(("ranks", "store", "megabytes"), [(1, "64MB", 256), (4, "24MB", 384)])
def test_a_shuffle_of_four_times_the_store_ends_right(ranks, store, megabytes, any_mpi, starter):
    example = str(REPOSITORY / "examples" / "shuffle.py")
    ranked = ["-n", str(ranks)] if ranks > 1 else []
    argv = [any_mpi.python, "-m", "hpcray", "run", *ranked, "--object-store-memory", store, example]
    finished = starter.run([*argv, "--megabytes", str(megabytes)], python=any_mpi.python, timeout=120)
    assert finished.code == 0, str(finished)
    assert "as before" in finished.out


@pytest.mark.parametrize("example", QUICK, ids=lambda path: path.stem)
def test_a_quick_example_runs_in_four_ranks_of_either_library(example, mpi, starter):
    test_an_example_runs_in_four_ranks(example, mpi, starter)
