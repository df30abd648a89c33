"""Virtual environments on disk: built once, whole or not at all, and removed when nobody uses them."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpcray.environments import venvs
from hpcray.environments.venvs import Request, find_or_build
from hpcray.exceptions import RuntimeEnvSetupError
from tests.process.wheels import make_wheel


@pytest.fixture
def cache(tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    return cache


def request_for(*packages, installer="pip", timeout=None, **fields):
    spec = {"packages": list(map(str, packages)), f"{installer}_check": False, **fields}
    return Request(installer, spec, os.environ, None, timeout)


def directories(cache):
    return [path for path in cache.iterdir() if path.is_dir() and not path.is_symlink()]


def python(found, code):
    return subprocess.run([found.python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def builder(cache, wheel, *, pip=""):
    """Another process that wants the same environment; it prints where that is."""
    code = f"""
import os, sys
from pathlib import Path
from hpcray.environments import venvs
{pip}
request = venvs.Request("pip", {{"packages": [{str(wheel)!r}], "pip_check": False}}, os.environ, None, None)
print(venvs.find_or_build(Path({str(cache)!r}), request).path, flush=True)
"""
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_it_has_its_packages_and_those_of_the_job(cache, tmp_path):
    wheel = make_wheel(tmp_path, "hpcray_probe")
    with_check = request_for(wheel, pip_check=False)
    found = find_or_build(cache, with_check)
    assert python(found, "import hpcray_probe, msgspec, numpy; print(hpcray_probe.version)") == "1.0"
    script = found.path / "bin" / "hpcray_probe-script"
    assert subprocess.run([script], capture_output=True, text=True, check=True).stdout == "version 1.0\n"
    again = find_or_build(cache, with_check)
    assert again.path == found.path
    assert len(directories(cache)) == 1
    for each in (found, again):
        os.close(each.lock)


def test_other_contents_are_another_environment(cache, tmp_path):
    first = find_or_build(cache, request_for(make_wheel(tmp_path, "hpcray_probe")))
    second = find_or_build(cache, request_for(make_wheel(tmp_path, "hpcray_probe", "2.0")))
    assert [python(each, "import hpcray_probe; print(hpcray_probe.version)") for each in (first, second)] == [
        "1.0",
        "2.0",
    ]
    for each in (first, second):
        os.close(each.lock)


def test_several_that_want_one_at_a_time_build_it_once(cache, tmp_path):
    wheel = make_wheel(tmp_path, "hpcray_probe")
    count = tmp_path / "count"
    counting = f"real = venvs._build; venvs._build = lambda *a: (open({str(count)!r}, 'a').write('x'), real(*a))"
    builders = [builder(cache, wheel, pip=counting) for _ in range(3)]
    paths = {process.communicate(timeout=60)[0] for process in builders}
    assert len(paths) == 1
    assert Path(paths.pop().strip()).is_dir()
    assert count.read_text() == "x"


def test_a_builder_that_is_killed_leaves_nothing_that_is_taken_for_finished(cache, tmp_path):
    wheel = make_wheel(tmp_path, "hpcray_probe")
    hanging = "venvs._install_by_pip = lambda *a: (print('installing', flush=True), __import__('time').sleep(600))"
    process = builder(cache, wheel, pip=hanging)
    assert process.stdout.readline() == "installing\n"
    (half,) = directories(cache)
    second = builder(cache, wheel)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    built = Path(second.communicate(timeout=60)[0].strip())
    assert built.is_dir()
    assert built != half
    assert directories(cache) == [built]


def test_an_installer_does_not_outlive_its_builder(tmp_path):
    pid_file = tmp_path / "pid"
    code = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    boot = (
        "import os, sys; from pathlib import Path; from hpcray.environments import venvs\n"
        f"venvs._run((sys.executable, '-c', {code!r}), Path('/'), os.environ, None)"
    )
    process = subprocess.Popen([sys.executable, "-c", boot])
    deadline = time.monotonic() + 30
    while not (pid_file.exists() and pid_file.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    stat = Path(f"/proc/{pid_file.read_text()}/stat")
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_failure_is_told_with_the_installers_words_and_believed_for_a_while(cache, tmp_path, monkeypatch):
    wheel = tmp_path / "hpcray_probe-1.0-py3-none-any.whl"
    request = request_for(wheel)
    with pytest.raises(RuntimeEnvSetupError, match="hpcray_probe"):
        find_or_build(cache, request)
    assert directories(cache) == []
    make_wheel(tmp_path, "hpcray_probe")
    with pytest.raises(RuntimeEnvSetupError, match="hpcray_probe"):
        find_or_build(cache, request)
    monkeypatch.setattr(venvs, "FAILURE_SECONDS", 0.0)
    found = find_or_build(cache, request)
    os.close(found.lock)
    assert not list(cache.glob("*.failed"))


def test_an_installation_may_take_only_so_long(cache, tmp_path):
    with pytest.raises(RuntimeEnvSetupError, match="setup_timeout_seconds"):
        find_or_build(cache, request_for(make_wheel(tmp_path, "hpcray_probe"), timeout=0.01))
    assert directories(cache) == []


def test_conflicts_are_found_where_that_is_asked_for(cache, tmp_path):
    make_wheel(tmp_path, "hpcray_needed", "1.0")
    wheel = make_wheel(tmp_path, "hpcray_probe", requires="hpcray_needed>=2")
    options = ["--no-deps", "--no-index"]
    found = find_or_build(cache, request_for(wheel, pip_install_options=options))
    os.close(found.lock)
    with pytest.raises(RuntimeEnvSetupError, match=r"hpcray[-_]needed"):
        find_or_build(cache, request_for(wheel, pip_install_options=options, pip_check=True))


def test_another_hpcray_is_refused(cache, tmp_path):
    request = request_for(make_wheel(tmp_path, "hpcray", "9.9"))
    as_installed = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with pytest.raises(RuntimeEnvSetupError, match="hpcray"):
        find_or_build(cache, dataclasses.replace(request, env=as_installed))


def test_unused_ones_are_removed_and_used_ones_stay(cache, tmp_path, monkeypatch):
    used = find_or_build(cache, request_for(make_wheel(tmp_path, "hpcray_used")))
    unused = find_or_build(cache, request_for(make_wheel(tmp_path, "hpcray_unused")))
    os.close(unused.lock)
    monkeypatch.setattr(venvs, "UNUSED_SECONDS", -1.0)
    new = find_or_build(cache, request_for(make_wheel(tmp_path, "hpcray_new")))
    assert set(directories(cache)) == {used.path, new.path}
    assert len([path for path in cache.iterdir() if path.is_symlink()]) == 2
    for each in (used, new):
        os.close(each.lock)


def test_without_uv_the_error_says_so(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(venvs.shutil, "which", lambda *_, **__: None)
    with pytest.raises(RuntimeEnvSetupError, match="pip install uv"):
        find_or_build(cache, request_for(make_wheel(tmp_path, "hpcray_probe"), installer="uv"))


@pytest.mark.skipif(not venvs.shutil.which("uv"), reason="the program uv is not installed")
def test_uv_installs_as_pip_does(cache, tmp_path):
    found = find_or_build(cache, request_for(make_wheel(tmp_path, "hpcray_probe"), installer="uv", uv_check=True))
    assert python(found, "import hpcray_probe, msgspec; print(hpcray_probe.version)") == "1.0"
    os.close(found.lock)
