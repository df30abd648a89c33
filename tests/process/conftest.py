"""Fixtures of the process tier: one host, real workers, no MPI.

The same tests pin Ray's semantics. With ``HPCRAY_TEST_IMPL=ray`` in the environment, the fixture `hpcray` is
Ray itself (``pip install 'ray[default]'``), so a test that passes there and fails without it shows a
difference from Ray. Where hpcray promises more than Ray, the test is marked ``beyond_ray`` with the reason.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import psutil
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ON_RAY = os.environ.get("HPCRAY_TEST_IMPL", "hpcray") == "ray"
SETTLE_S = 30.0
"""How long anything may take here. Generous, since the machine may be busy: what hangs, fails."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "beyond_ray(reason): hpcray promises this, Ray does not")
    if ON_RAY:
        config.addinivalue_line("filterwarnings", "ignore")


def pytest_runtest_setup(item: pytest.Item) -> None:
    beyond_ray = item.get_closest_marker("beyond_ray")
    if ON_RAY and beyond_ray:
        pytest.skip(f"beyond Ray: {beyond_ray.args[0]}")


RAY_AS_HPCRAY = (
    # Ray's dashboard is most of its start-up time, and nothing here looks at it.
    "import functools, ray as hpcray; hpcray.init = functools.partial(hpcray.init, include_dashboard=False)"
)


def _implementation() -> ModuleType:
    if not ON_RAY:
        return importlib.import_module("hpcray")
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    namespace: dict[str, ModuleType] = {}
    exec(RAY_AS_HPCRAY, namespace)
    return namespace["hpcray"]


@pytest.fixture(scope="session")
def hpcray() -> ModuleType:
    """The module under test, as a script sees it after ``import hpcray``."""
    return _implementation()


@pytest.fixture(scope="module")
def ray_start(request: pytest.FixtureRequest, hpcray: ModuleType) -> Iterator[ModuleType]:
    """A job that the tests of one module share: two CPUs, or what the module's `INIT` says.

    At the end of the module nothing of the job may be left.
    """
    with leaving_nothing_behind(hpcray):
        hpcray.init(**getattr(request.module, "INIT", {"num_cpus": 2}))
        yield hpcray


@pytest.fixture
def own_init(hpcray: ModuleType) -> Iterator[ModuleType]:
    """The module without a job, for tests that start their own; whatever they leave is shut down."""
    with leaving_nothing_behind(hpcray):
        yield hpcray


@contextlib.contextmanager
def leaving_nothing_behind(hpcray: ModuleType) -> Iterator[None]:
    """Shut the job down at the end; then no process and no thread may be there that was not there before."""
    hpcray.shutdown()
    children_before = set(psutil.Process().children(recursive=True))
    yield
    hpcray.shutdown()
    if ON_RAY:
        return

    def leftovers() -> list[str]:
        children = set(psutil.Process().children(recursive=True)) - children_before
        threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("hpcray")]
        return [*map(str, children), *threads]

    _wait_until(lambda: not leftovers(), timeout=10, on_timeout=lambda: f"left after shutdown: {leftovers()}")


def _wait_until(
    predicate: Callable[[], Any], timeout: float = SETTLE_S, on_timeout: Callable[[], object] | None = None
) -> Any:
    deadline = time.monotonic() + timeout
    pause = 0.001
    while not (value := predicate()):
        if time.monotonic() > deadline:
            story = on_timeout() if on_timeout else "no details"
            pytest.fail(f"did not come true within {timeout} s: {story}")
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
    return value


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., Any]:
    """``wait_until(predicate, timeout=30, on_timeout=None)`` returns the predicate's first true value.

    It fails the test after `timeout` seconds with what `on_timeout()` returns.
    """
    return _wait_until


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[SimpleNamespace]:
    """A door for tasks: ``gate.wait()`` blocks in a worker until the test calls ``gate.open()``.

    Both travel into tasks by value, as does ``gate.arrived()``, the number of workers that came to the door.
    """
    door, visitors = tmp_path / "door", tmp_path / "visitors"
    visitors.mkdir()

    def open_door() -> None:
        door.touch()

    def wait() -> None:
        (visitors / uuid.uuid4().hex).touch()
        while not door.exists():
            time.sleep(0.005)

    def arrived() -> int:
        return sum(1 for _ in visitors.iterdir())

    yield SimpleNamespace(open=open_door, wait=wait, arrived=arrived)
    open_door()


@pytest.fixture
def counter(tmp_path: Path) -> SimpleNamespace:
    """``counter.add()`` in any process adds one and returns the count, ``counter.value()`` reads it."""
    tally = tmp_path / "tally"
    tally.touch()

    def add() -> int:
        with tally.open("ab", buffering=0) as file:
            file.write(b".")
            return file.tell()

    def value() -> int:
        return tally.stat().st_size

    return SimpleNamespace(add=add, value=value)


@pytest.fixture
def run_script(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``run_script(text, *argv, **files)`` runs a script under plain Python and returns what it printed.

    `files` are modules to put beside the script, by name. Nothing of the job may outlive the script.
    """

    def run(text: str, *argv: str, timeout: float = 120, **files: str) -> subprocess.CompletedProcess[str]:
        for name, content in {"script": text, **files}.items():
            (tmp_path / f"{name}.py").write_text(_for_implementation(textwrap.dedent(content)))
        mark = uuid.uuid4().hex
        environment = {**os.environ, "HPCRAY_TEST_MARK": mark, "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, str(tmp_path / "script.py"), *argv]
        finished = subprocess.run(
            command,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if not ON_RAY:
            _wait_until(lambda: not _processes_with(mark), timeout=10, on_timeout=lambda: _processes_with(mark))
        return finished

    return run


def _for_implementation(script: str) -> str:
    if not ON_RAY:
        return script
    return script.replace("import hpcray", RAY_AS_HPCRAY, 1)


def _processes_with(mark: str) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("HPCRAY_TEST_MARK") == mark:
                found.append(f"{process.pid}: {process.cmdline()}")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found
