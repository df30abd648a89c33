"""Every way to start a script: its world is that of plain Python, and its job is all that was asked for."""

import json
from pathlib import Path

import pytest

from .conftest import ALONE, WAYS, WAYS_OF_RUN, WITH_MPI

HELPER = """
import hpcray

def double(x):
    return 2 * x

@hpcray.remote
def remote_double(x):
    return double(x)
"""

# Tells in one line of JSON how the world looks to the script and to a task.
TELL = """
import json
import os
import pathlib
import sys

import helper
import hpcray

@hpcray.remote
def look():
    import helper
    maps = pathlib.Path("/proc/self/maps").read_text()
    marks = [n for n in os.environ if n.startswith(("OMPI_COMM", "PMI_", "PMIX_RANK", "HPCRAY_DRIVER", "HPCRAY_STDIO"))]
    return {
        "doubled": helper.double(4),
        "cwd": os.getcwd(),
        "pid": os.getpid(),
        "mpi": "libmpi" in maps or "mpi4py.MPI" in sys.modules,
        "marks": marks,
    }

if __name__ == "__main__":
    hpcray.init()
    tasks = hpcray.get([look.remote() for _ in range(8)])
    marks = [n for n in os.environ if n.startswith(("OMPI_COMM", "PMI_", "PMIX_RANK", "HPCRAY_DRIVER", "HPCRAY_STDIO"))]
    told = {
        "argv": sys.argv,
        "name": __name__,
        "file": __file__,
        "cwd": os.getcwd(),
        "path": sys.path[0],
        "main": sys.modules["__main__"].__dict__ is globals(),
        "remote": hpcray.get(helper.remote_double.remote(21)),
        "nodes": len(hpcray.nodes()),
        "cpus": hpcray.cluster_resources()["CPU"],
        "tasks": tasks,
        "marks": marks,
    }
    print("told", json.dumps(told), flush=True)
    sys.exit(3)
"""


def told_by(finished):
    lines = [line for line in finished.out.splitlines() if line.startswith("told ")]
    assert len(lines) == 1, str(finished)
    return json.loads(lines[0].removeprefix("told "))


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_a_script_sees_what_it_sees_under_plain_python_and_its_exit_code_is_the_jobs(way, starter):
    starter.write(HELPER, "helper.py")
    script = starter.write(way.preamble + TELL)
    ranks = 4 if way.mpi else 1
    finished = starter.run(way.argv(ranks, script, "one", "--two", "-n", "3"), python=way.python)
    assert finished.code == 3, str(finished)
    told = told_by(finished)
    assert told["argv"] == [script, "one", "--two", "-n", "3"]
    assert told["name"] == "__main__"
    assert told["main"]
    assert told["file"] in (script, str(starter.folder / script))  # as python of this version has it
    assert told["cwd"] == told["path"] == str(starter.folder)
    assert told["remote"] == 42
    assert told["nodes"] == ranks
    assert told["cpus"] >= 1
    assert {task["doubled"] for task in told["tasks"]} == {8}
    assert {task["cwd"] for task in told["tasks"]} == {str(starter.folder)}
    assert not any(task["mpi"] or task["marks"] for task in told["tasks"]), told
    if way.name != "mpirun-late-init":  # there the script is a rank
        assert told["marks"] == []
    if "init" not in way.name and way.name != "python":
        where = f"{ranks} rank{'s' if ranks > 1 else ''} on 1 host"
        assert [line for line in finished.err.splitlines() if where in line], str(finished)
        assert "Traceback" not in finished.err


def test_a_job_of_one_rank_does_not_touch_mpi(python, starter):
    script = starter.write(
        """
        import time
        import hpcray

        hpcray.init()
        print("ready", flush=True)
        time.sleep(60)
        """
    )
    for argv in ([python, "-m", "hpcray", "run", script], [python, script]):
        job = starter.start(argv, python=python)
        job.wait_for("ready")
        mapped = {Path(m.path).name for process in job.processes() for m in process.memory_maps()}
        assert any(name.startswith("libc.so") for name in mapped)
        assert not [name for name in mapped if "mpi" in name.lower()]
        job.interrupt()
        job.wait()


@pytest.mark.parametrize("way", WAYS_OF_RUN, indirect=True)
def test_a_module_of_a_package_runs_with_relative_imports(way, starter):
    starter.write("", "package/__init__.py")
    starter.write("LIMIT = 7\n", "package/limits.py")
    starter.write(
        """
        import sys
        import hpcray
        from .limits import LIMIT

        @hpcray.remote
        def limit():
            return LIMIT, __name__

        if __name__ == "__main__":
            hpcray.init()
            print("limit", hpcray.get(limit.remote()), sys.argv[1:], __package__, flush=True)
        """,
        "package/module.py",
    )
    finished = starter.run(way.argv(2, "-m", "package.module", "-m", "x"), python=way.python)
    assert finished.code == 0, str(finished)
    assert "limit (7, '__main__') ['-m', 'x'] package" in finished.out


READ_STDIN = """
import sys
import hpcray

hpcray.init()
text = sys.stdin.read() if {to_end} else sys.stdin.readline()
print("read", len(text), text[:5], text[-5:], flush=True)
"""


@pytest.mark.parametrize("way", [*ALONE, *(way for way in WITH_MPI if "late" not in way)], indirect=True)
def test_stdin_is_the_scripts(way, starter):
    # Open MPI's own mpirun never passes the end of stdin on; MPICH's ends the job if it cannot pass it on at once.
    to_end = not (way.is_users_mpirun and way.mpi == "openmpi")
    lines = 10 if way.is_users_mpirun else 100_000
    text = b"hello" + lines * b"0123456789\n" + b"world" if to_end else b"hello\n"
    script = starter.write(way.preamble + READ_STDIN.format(to_end=to_end))
    finished = starter.run(way.argv(2, script), python=way.python, stdin=text)
    assert finished.code == 0, str(finished)
    assert f"read {len(text)} hello {text[-5:].decode()}" in finished.out, str(finished)


SESSION = """
import hpcray
_ = hpcray.init(num_cpus=1)
@hpcray.remote
def double(x):
    return 2 * x

print("first", hpcray.get(double.remote(2)), hpcray.cluster_resources()["CPU"])
hpcray.shutdown()
_ = hpcray.init(num_cpus=3, resources={"licence": 2})
print("second", hpcray.get(double.remote(3)), hpcray.cluster_resources()["CPU"], hpcray.cluster_resources()["licence"])
hpcray.shutdown()
hpcray.shutdown()
with hpcray.init(num_cpus=2):
    print("third", hpcray.get(double.remote(4)))

print("over", hpcray.is_initialized())
"""
SEEN_IN_SESSION = ["first 4 1.0", "second 6 3.0 2.0", "third 8", "over False"]


def test_an_interactive_session_starts_jobs_one_after_the_other(python, starter):
    finished = starter.run([python, "-i"], python=python, stdin=SESSION.encode())
    assert finished.code == 0, str(finished)
    assert [line for line in finished.out.splitlines() if line] == SEEN_IN_SESSION


def test_a_notebooks_cells_start_jobs_one_after_the_other(python, starter):
    script = starter.write(
        f"""
        import code

        cells = {SESSION!r}.replace("\\n\\n", "\\n\\0").split("\\0")
        interpreter = code.InteractiveInterpreter({{"__name__": "__main__"}})
        for cell in cells:
            interpreter.runsource(cell, "<cell>", "exec")
        """
    )
    finished = starter.run([python, script], python=python)
    assert finished.code == 0, str(finished)
    assert finished.out.splitlines() == SEEN_IN_SESSION, str(finished)


def test_two_jobs_at_a_time_do_not_meet(python, starter):
    script = starter.write(
        """
        import time
        import hpcray

        hpcray.init(num_cpus=1)
        print("up", flush=True)
        time.sleep(1)
        print("nodes", len(hpcray.nodes()), hpcray.cluster_resources()["CPU"])
        """
    )
    first = starter.start([python, script], python=python)
    second = starter.start([python, script], python=python)
    for job in (first, second):
        assert "nodes 1 1.0" in job.wait().out
