"""Whole programs that say `import ray`, with hpcray in its place: driver, workers, and libraries that use Ray."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.beyond_ray("Ray is Ray already")

LIBRARY = """
import ray
from ray.util.placement_group import placement_group

try:
    from ray import tune
except ImportError:
    tune = None

class OwnError(ray.exceptions.RayError):
    pass

@ray.remote
def where(x):
    from ray.exceptions import RayTaskError
    return ray.get_runtime_context().get_task_name(), RayTaskError.__module__, ray.get(x[0])

def plain(x):
    return ray.get(x[0]) + 1

@ray.remote
class Keeper:
    def fail(self):
        raise OwnError("as told")

    def module(self):
        import ray.util
        return ray.util.__name__, ray.__name__, ray.__version__.split(".")[0]
"""

PROGRAM = """
import ray
import library

@ray.remote
def nested(refs):
    import ray.exceptions
    assert isinstance(refs[0], ray.ObjectRef)
    return ray.get(ray.remote(library.plain).remote(refs))

if __name__ == "__main__":
    ray.init({init})
    ref = ray.put(41)
    assert ray.get(nested.remote([ref])) == 42
    assert ray.get(library.where.remote([ref])) == ("where", "hpcray.exceptions", 41)
    keeper = library.Keeper.remote()
    assert ray.get(keeper.module.remote()) == ("ray.util", "ray", "2")
    try:
        ray.get(keeper.fail.remote())
    except library.OwnError as error:
        assert isinstance(error, ray.exceptions.RayTaskError)
    assert library.tune is None
    print("all well", __name__)
"""


def test_a_program_and_its_library_run_unchanged_below_one_line(run_script):
    program = "import hpcray\nhpcray.as_ray()\n" + PROGRAM.format(init="num_cpus=2")
    finished = run_script(program, library=LIBRARY)
    assert finished.returncode == 0, finished.stderr
    assert "all well __main__" in finished.stdout


@pytest.mark.parametrize("init", ["", "address='auto'"])
@pytest.mark.parametrize("extra", [[], ["--num-cpus", "1"]])
def test_a_program_runs_unchanged_under_hpcray_run(tmp_path, init, extra):
    (tmp_path / "library.py").write_text(LIBRARY)
    finished = run_as_ray(tmp_path, PROGRAM.format(init=init), *extra)
    assert finished.returncode == 0, finished.stderr
    assert "all well __main__" in finished.stdout


def run_as_ray(folder: Path, program: str, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "program.py").write_text(program)
    command = [sys.executable, "-m", "hpcray", "run", "--as-ray", *options, "program.py", "argument"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def test_the_scripts_start_is_as_ever(tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / "sitecustomize.py").write_text("import builtins; builtins.customized = True")
    program = """
import subprocess, sys, ray
assert customized
assert sys.argv[1:] == ["argument"]
assert sys.path[0] == __file__.rpartition("/")[0], sys.path
assert not [path for path in sys.path if path.endswith("startup")]
print("child", subprocess.check_output([sys.executable, "-c", "import ray; print(ray.get.__module__)"], text=True))
1 / 0
"""
    path = os.pathsep.join(filter(None, [str(own), os.environ.get("PYTHONPATH")]))
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, "-m", "hpcray", "run", "--as-ray", str(tmp_path / "program.py"), "argument"]
    environment = {**os.environ, "PYTHONPATH": path}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 1
    assert "child hpcray.api" in finished.stdout, finished.stderr
    assert finished.stderr.count("File ") == 1, "the traceback is the script's own"


def test_it_comes_too_late_after_init(own_init):
    own_init.init(num_cpus=1)
    with pytest.raises(RuntimeError, match=r"before hpcray\.init"):
        own_init.as_ray()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["-m", "hpcray", "--as-ray"], "needs a script"),
        (["-E", "-m", "hpcray", "run", "--as-ray", "-m", "this"], r"call hpcray.as_ray() in it"),
    ],
)
def test_where_it_cannot_work_it_is_refused(arguments, told, tmp_path):
    package = Path(__file__).parents[2]
    finished = subprocess.run(
        [sys.executable, *arguments], cwd=package, capture_output=True, text=True, timeout=60, check=False
    )
    assert finished.returncode == 2, finished.stderr
    assert told in finished.stderr
