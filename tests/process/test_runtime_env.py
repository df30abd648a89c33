"""Runtime environments of jobs, tasks and actors: what the code in them finds, and what becomes of it when they cannot be had."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hpcray.environments.places import unfinished
from tests.process.wheels import make_wheel

JOB = {"env_vars": {"FROM_JOB": "job", "BOTH": "job"}}
INIT = {"num_cpus": 2, "runtime_env": JOB}


@pytest.fixture(scope="module", autouse=True)
def own_root(tmp_path_factory):
    """What is unpacked and installed goes where the test run's files go."""
    root = tmp_path_factory.mktemp("environments")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPCRAY_ENV_DIR", str(root / "root"))
        yield root / "root"
    assert not list((root / "root" / "jobs").glob("*"))


@pytest.fixture
def job(own_root, ray_start):
    return ray_start


@pytest.fixture
def variables(hpcray):
    @hpcray.remote
    def variables(*names):
        return {name: os.environ.get(name) for name in names}

    return variables


@pytest.fixture
def code(tmp_path):
    """A directory with a module, a package and a file of data."""
    code = tmp_path / "code"
    (code / "hpcray_test_package").mkdir(parents=True)
    (code / "hpcray_test_module.py").write_text("def where(): return __file__")
    (code / "hpcray_test_package" / "__init__.py").write_text("answer = 42")
    (code / "data.txt").write_text("some data")
    return code


# ------------------------------------------------------------------------------------------------------------- variables
def test_the_jobs_variables_are_those_of_its_tasks(hpcray, job, variables):
    assert hpcray.get(variables.remote("FROM_JOB", "BOTH")) == {"FROM_JOB": "job", "BOTH": "job"}
    assert "FROM_JOB" not in os.environ


def test_a_tasks_variables_are_laid_over_the_jobs(hpcray, job, variables):
    own = variables.options(runtime_env={"env_vars": {"BOTH": "task", "OWN": "task"}})
    expected = {"FROM_JOB": "job", "BOTH": "task", "OWN": "task"}
    assert hpcray.get(own.remote(*expected)) == expected
    assert hpcray.get(variables.remote(*expected)) == {"FROM_JOB": "job", "BOTH": "job", "OWN": None}


def test_options_replace_what_the_decorator_says(hpcray, job):
    @hpcray.remote(runtime_env={"env_vars": {"OWN": "decorator", "MORE": "decorator"}})
    def variables():
        return os.environ.get("FROM_JOB"), os.environ.get("OWN"), os.environ.get("MORE")

    assert hpcray.get(variables.remote()) == ("job", "decorator", "decorator")
    assert hpcray.get(variables.options(runtime_env={"env_vars": {"OWN": "options"}}).remote()) == (
        "job",
        "options",
        None,
    )
    assert hpcray.get(variables.options(num_cpus=1).remote()) == ("job", "decorator", "decorator")
    assert hpcray.get(variables.options(runtime_env={}).remote()) == ("job", "decorator", "decorator")


def test_children_inherit(hpcray, job, variables):
    @hpcray.remote
    def parent(options):
        return hpcray.get(variables.options(**options).remote("FROM_JOB", "BOTH", "OWN"))

    outer = parent.options(runtime_env={"env_vars": {"BOTH": "parent", "OWN": "parent"}})
    assert hpcray.get(outer.remote({})) == {"FROM_JOB": "job", "BOTH": "parent", "OWN": "parent"}
    inner = {"runtime_env": {"env_vars": {"OWN": "child"}}}
    assert hpcray.get(outer.remote(inner)) == {"FROM_JOB": "job", "BOTH": "parent", "OWN": "child"}


def test_an_actor_has_its_environment_and_so_have_its_children(hpcray, job, variables):
    @hpcray.remote(runtime_env={"env_vars": {"BOTH": "actor"}})
    class Actor:
        def own(self):
            return os.environ["FROM_JOB"], os.environ["BOTH"]

        def childs(self):
            return hpcray.get(variables.remote("FROM_JOB", "BOTH"))

    actor = Actor.remote()
    assert hpcray.get(actor.own.remote()) == ("job", "actor")
    assert hpcray.get(actor.childs.remote()) == {"FROM_JOB": "job", "BOTH": "actor"}
    other = Actor.options(runtime_env={"env_vars": {"BOTH": "options"}}).remote()
    assert hpcray.get(other.own.remote()) == ("job", "options")


def test_variables_may_refer_to_others(hpcray, job, variables):
    env = {"env_vars": {"OWN": "${HOME}/x", "PATH": "/own/bin:${PATH}", "NOTHING": "a${NOT_SET_ANYWHERE}b"}}
    found = hpcray.get(variables.options(runtime_env=env).remote("OWN", "PATH", "NOTHING"))
    assert found["OWN"] == f"{os.environ['HOME']}/x"
    assert found["PATH"].startswith("/own/bin:")
    assert len(found["PATH"]) > len("/own/bin:")
    assert found["NOTHING"] == "ab"


def test_variables_that_python_reads_at_its_start_take_effect(hpcray, job, code):
    @hpcray.remote(runtime_env={"env_vars": {"PYTHONPATH": str(code), "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "3"}})
    def look():
        import hpcray_test_module

        return hpcray_test_module.where(), hash("text"), os.environ["OMP_NUM_THREADS"]

    seven = subprocess.run(
        [sys.executable, "-c", "print(hash('text'))"], env={"PYTHONHASHSEED": "7"}, capture_output=True, check=True
    )
    assert hpcray.get(look.remote()) == (str(code / "hpcray_test_module.py"), int(seven.stdout), "3")


def test_tasks_of_one_environment_share_workers_and_no_others(hpcray, job):
    @hpcray.remote
    def pid():
        return os.getpid()

    def pids(value):
        other = pid.options(runtime_env={"env_vars": {"OWN": value}})
        return {hpcray.get(other.remote()) for _ in range(3)}

    first, second = pids("1"), pids("2")
    assert len(first) == len(second) == 1
    assert not first & second


# -------------------------------------------------------------------------------------------------------------- the context
def test_the_context_knows_the_environment(hpcray, job):
    @hpcray.remote
    def look():
        context = hpcray.get_runtime_context()
        return context.runtime_env, context.get_runtime_env_string()

    assert hpcray.get_runtime_context().runtime_env["env_vars"] == JOB["env_vars"]
    env, text = hpcray.get(look.options(runtime_env={"env_vars": {"BOTH": "task"}}).remote())
    assert type(env).__name__ == "RuntimeEnv"
    assert env["env_vars"] == {"FROM_JOB": "job", "BOTH": "task"}
    assert json.loads(text)["env_vars"] == env["env_vars"]


@pytest.mark.beyond_ray("directories of tasks")
def test_an_environment_that_a_task_reads_may_be_passed_on(hpcray, job, code):
    @hpcray.remote
    def child():
        return os.environ.get("OWN"), Path("data.txt").read_text()

    @hpcray.remote
    def parent():
        present = hpcray.get_runtime_context().runtime_env
        return hpcray.get(child.options(runtime_env={**present, "env_vars": {"OWN": "child"}}).remote())

    assert hpcray.get(parent.options(runtime_env={"working_dir": str(code)}).remote()) == ("child", "some data")
    made_up = f"hpcray://{bytes(16).hex()}/code.zip"
    with pytest.raises(ValueError, match="no package of this process"):
        child.options(runtime_env={"working_dir": made_up}).remote()


# ------------------------------------------------------------------------------------------------------------- directories
@pytest.mark.parametrize("form", ["directory", "zip"])
def test_a_working_dir_of_the_job(run_script, code, form):
    if form == "zip":
        archive = code.parent / "packed.zip"
        subprocess.run([sys.executable, "-m", "zipfile", "-c", str(archive), *map(str, code.iterdir())], check=True)
        code = archive
    script = f"""
        import os
        from pathlib import Path
        import hpcray

        hpcray.init(num_cpus=1, runtime_env={{"working_dir": {str(code)!r}}})

        @hpcray.remote
        def look():
            import hpcray_test_module, hpcray_test_package
            here = Path(hpcray_test_module.where()).parent == Path.cwd()
            return Path("data.txt").read_text(), here, hpcray_test_package.answer

        print(hpcray.get(look.remote()))
    """
    finished = run_script(script)
    assert finished.stdout.strip().splitlines()[-1:] == ["('some data', True, 42)"], finished.stderr


@pytest.mark.beyond_ray("directories of tasks")
def test_a_task_runs_in_a_copy_of_its_working_dir(hpcray, job, code):
    @hpcray.remote(runtime_env={"working_dir": str(code)})
    def look():
        import hpcray_test_module
        import hpcray_test_package

        Path("written").touch()
        child = subprocess.run(
            [sys.executable, "-c", "import hpcray_test_package as p; print(p.answer)"], capture_output=True
        )
        return Path("data.txt").read_text(), hpcray_test_module.where(), hpcray_test_package.answer, int(child.stdout)

    data, where, answer, in_child = hpcray.get(look.remote())
    assert (data, answer, in_child) == ("some data", 42, 42)
    assert not Path(where).is_relative_to(code)
    assert not (code / "written").exists()


@pytest.mark.beyond_ray("directories of tasks")
def test_py_modules_of_all_kinds(hpcray, job, code, tmp_path):
    archive = tmp_path / "packed.zip"
    subprocess.run([sys.executable, "-m", "zipfile", "-c", archive, code / "hpcray_test_module.py"], check=True)
    wheel = make_wheel(tmp_path, "hpcray_test_wheel", "3.0")
    single = tmp_path / "hpcray_test_single.py"
    single.write_text("import hpcray_test_package\nanswer = hpcray_test_package.answer + 1")

    @hpcray.remote(runtime_env={"py_modules": [str(code / "hpcray_test_package"), archive, str(wheel), single]})
    def look():
        import hpcray_test_module
        import hpcray_test_single
        import hpcray_test_wheel

        return hpcray_test_module.where(), hpcray_test_single.answer, hpcray_test_wheel.version, str(Path.cwd())

    where, answer, version, cwd = hpcray.get(look.remote())
    assert where.endswith("hpcray_test_module.py")
    assert (answer, version, cwd) == (43, "3.0", str(Path.cwd()))


@pytest.mark.beyond_ray("directories of tasks")
def test_a_module_travels_as_it_is_now_and_wins_over_the_drivers(hpcray, job, code, monkeypatch):
    monkeypatch.syspath_prepend(str(code))
    import hpcray_test_package

    @hpcray.remote(runtime_env={"py_modules": [hpcray_test_package]})
    def look():
        import hpcray_test_package

        return hpcray_test_package.__file__

    assert not Path(hpcray.get(look.remote())).is_relative_to(code)


@pytest.mark.beyond_ray("directories of tasks")
def test_a_childs_working_dir_replaces_its_parents(hpcray, job, code, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "data.txt").write_text("other data")

    @hpcray.remote
    def read():
        return Path("data.txt").read_text()

    @hpcray.remote(runtime_env={"working_dir": str(code)})
    def parent():
        return hpcray.get([read.remote(), read.options(runtime_env={"working_dir": str(other)}).remote()])

    assert hpcray.get(parent.remote()) == ["some data", "other data"]


@pytest.mark.beyond_ray("where it is unpacked")
def test_what_was_unpacked_goes_with_the_job(own_root, run_script, code):
    finished = run_script(
        f"""
        import os, hpcray
        hpcray.init(num_cpus=2, runtime_env={{"working_dir": {str(code)!r}}})
        print(hpcray.get(hpcray.remote(lambda: os.getcwd()).remote()))
        """
    )
    directory = Path(finished.stdout.strip())
    assert directory.is_relative_to(own_root / "jobs")
    assert not directory.exists()
    assert not directory.parent.exists()


@pytest.mark.beyond_ray("where it is unpacked")
def test_what_a_killed_job_left_goes_with_the_next_one(own_root, run_script, code):
    text = f"""
        import os, sys
        import hpcray, psutil
        hpcray.init(num_cpus=1, runtime_env={{"working_dir": {str(code)!r}}})

        @hpcray.remote
        def place():
            return os.getcwd()

        print(hpcray.get(place.remote()), flush=True)
        if sys.argv[1:]:
            for process in [*psutil.Process().children(recursive=True), psutil.Process()]:
                process.suspend() if process.pid != os.getpid() else None
            for process in [*psutil.Process().children(recursive=True), psutil.Process()]:
                process.kill()
        """
    left = Path(run_script(text, "die").stdout.strip())
    assert left.exists()
    assert not Path(run_script(text).stdout.strip()).exists()
    assert not left.exists()


# ------------------------------------------------------------------------------------------------------------ installations
@pytest.fixture
def hanging():
    """An environment whose installer waits for an index that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        options = ["--index-url", url, "--timeout", "600", "--proxy", ""]
        variables = {"PIP_CONFIG_FILE": "/dev/null", "no_proxy": "127.0.0.1"}
        yield {"env_vars": variables, "pip": {"packages": ["hpcray-never-there"], "pip_install_options": options}}


@pytest.mark.beyond_ray("on Ray, too slow")
def test_tasks_find_what_pip_installed_for_them_once(hpcray, job, own_root, tmp_path):
    wheel = make_wheel(tmp_path, "hpcray_test_wheel")
    env = {"pip": [str(wheel)]}

    @hpcray.remote(runtime_env=env)
    def look(seconds):
        import hpcray_test_wheel

        time.sleep(seconds)
        script = subprocess.run(["hpcray_test_wheel-script"], capture_output=True, text=True, check=True)
        return hpcray_test_wheel.__file__, script.stdout, sys.prefix, os.getpid()

    @hpcray.remote
    class Actor:
        def look(self):
            import hpcray_test_wheel

            return hpcray_test_wheel.__file__

    found = hpcray.get([look.remote(0.5), look.remote(0.5)])
    assert len({pid for *_, pid in found}) == 2
    assert len({tuple(rest) for *rest, _ in found}) == 1
    file, printed, prefix, _ = found[0]
    assert printed == "version 1.0\n"
    assert file.startswith(prefix)
    assert Path(prefix).is_relative_to(own_root / "venvs")
    assert hpcray.get(Actor.options(runtime_env=env).remote().look.remote()) == file
    with pytest.raises(ImportError):
        hpcray.get(look.options(runtime_env={"env_vars": {"OTHER": "1"}}).remote(0))


@pytest.mark.beyond_ray("on Ray, too slow")
def test_another_version_than_the_jobs_own_is_the_one_that_is_imported(hpcray, job, tmp_path):
    wheel = make_wheel(tmp_path, "iniconfig", "99.0")

    @hpcray.remote
    def version():
        import iniconfig

        return getattr(iniconfig, "version", None)

    assert hpcray.get(version.options(runtime_env={"pip": [str(wheel)]}).remote()) == "99.0"
    assert hpcray.get(version.remote()) != "99.0"


@pytest.mark.beyond_ray("on Ray, too slow")
def test_requirements_may_lie_in_the_working_dir(hpcray, job, tmp_path, code):
    (code / "requirements.txt").write_text(str(make_wheel(tmp_path, "hpcray_test_wheel", "5.0")))
    env = {"working_dir": str(code), "pip": ["-r ${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/requirements.txt"]}

    @hpcray.remote(runtime_env=env)
    def look():
        import hpcray_test_wheel

        return hpcray_test_wheel.version, Path("data.txt").read_text()

    assert hpcray.get(look.remote()) == ("5.0", "some data")


@pytest.mark.beyond_ray("on Ray, too slow")
def test_other_tasks_go_on_while_something_is_installed(hpcray, job, variables, hanging):
    slow = variables.options(runtime_env=hanging).remote()
    for _ in range(20):
        assert hpcray.get(variables.remote("FROM_JOB")) == {"FROM_JOB": "job"}
    assert hpcray.wait([slow], timeout=0)[0] == []


# ------------------------------------------------------------------------------------------------------------------ errors
@pytest.fixture
def impossible(hpcray, tmp_path):
    """An environment that cannot be installed."""
    return {"pip": [str(tmp_path / "hpcray_nowhere-1.0-py3-none-any.whl")]}


def test_a_failed_installation_is_the_error_of_the_task(hpcray, job, variables, impossible):
    broken = variables.options(runtime_env=impossible)
    with pytest.raises(hpcray.exceptions.RuntimeEnvSetupError, match="hpcray_nowhere"):
        hpcray.get(broken.remote())
    with pytest.raises(hpcray.exceptions.RuntimeEnvSetupError):
        hpcray.get(variables.remote(broken.remote()))
    assert hpcray.get(variables.remote("FROM_JOB")) == {"FROM_JOB": "job"}


def test_a_failed_installation_is_the_error_of_an_actors_calls(hpcray, job, impossible):
    @hpcray.remote
    class Actor:
        def f(self):
            pass

    actor = Actor.options(runtime_env=impossible).remote()
    with pytest.raises(hpcray.exceptions.RuntimeEnvSetupError, match="hpcray_nowhere"):
        hpcray.get(actor.f.remote())


@pytest.mark.beyond_ray("many fail")
def test_many_tasks_fail_soon(hpcray, job, variables, impossible):
    refs = [variables.options(runtime_env=impossible).remote() for _ in range(20)]
    for ref in refs:
        with pytest.raises(hpcray.exceptions.RuntimeEnvSetupError):
            hpcray.get(ref)


def test_wrong_environments_are_refused_by_init(own_init):
    for env, error in [
        ({"working_dir": "/not/there"}, ValueError), ({"env_vars": {"A": 1}}, TypeError), ({"pip": 3}, TypeError),
        ({"pip": ["a"], "uv": ["b"]}, ValueError), ({"env_vars": [1]}, TypeError),
    ]:  # fmt: skip
        with pytest.raises(error):
            own_init.init(num_cpus=1, runtime_env=env)
        assert not own_init.is_initialized()


def test_wrong_environments_are_refused_where_they_are_named(hpcray, job, variables):
    for env, error in [
        ({"working_dir": "/not/there"}, ValueError), ({"env_vars": {"A": 1}}, TypeError), ({"pip": 3}, TypeError),
        ({"pip": ["a"], "uv": ["b"]}, ValueError), ({"py_modules": "x"}, TypeError), ("env", TypeError),
    ]:  # fmt: skip
        with pytest.raises(error):
            variables.options(runtime_env=env)
        with pytest.raises(error):
            hpcray.remote(runtime_env=env)(lambda: None)


@pytest.mark.beyond_ray("its own limit")
def test_a_directory_that_is_too_large_is_refused_and_leaves_no_job(own_init, tmp_path):
    with open(tmp_path / "large", "wb") as file:  # noqa: PTH123
        file.truncate(300 << 20)
    with pytest.raises(ValueError, match="excludes"):
        own_init.init(num_cpus=1, runtime_env={"working_dir": str(tmp_path)})
    assert not own_init.is_initialized()
    with own_init.init(num_cpus=1, runtime_env={"working_dir": str(tmp_path), "excludes": ["large"]}):
        assert own_init.get(own_init.remote(lambda: os.listdir()).remote()) == []  # noqa: PTH208


@pytest.mark.beyond_ray("processes that it starts")
def test_the_end_of_the_job_ends_its_installers(own_root, own_init, wait_until, hanging):

    url = hanging["pip"]["pip_install_options"][1]

    def installers():
        return [process for process in psutil.process_iter() if url in _command(process)]

    own_init.init(num_cpus=1)
    slow = own_init.remote(runtime_env=hanging)(lambda: None).remote()
    wait_until(installers)
    assert unfinished(own_root / "venvs")
    assert own_init.wait([slow], timeout=0)[0] == []
    own_init.shutdown()
    wait_until(lambda: not installers(), timeout=5)
    wait_until(lambda: not unfinished(own_root / "venvs"))


def _command(process):
    try:
        return process.cmdline()
    except psutil.Error:
        return []
