"""The fork server with real processes: what it starts, what it reports, and that nothing outlives it."""

from __future__ import annotations

import ast
import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from hpcray.raylet.forkserver import Exited, Spawned, SpawnFailed
from hpcray.raylet.processes import Event, ForkServer, ServerEnded

WORKER = """
import os, random, signal, socket, subprocess, sys, threading, time
import numpy

def main(sock):
    while expression := sock.recv(65536).decode():
        sock.send(repr(eval(expression)).encode())
"""

LONG_LIVED = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid"
DAEMON = """subprocess.run([sys.executable, '-c', '''
import subprocess, sys
command = [sys.executable, "-c", "import time; time.sleep(600)"]
print(subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL).pid)
'''], stdout=subprocess.PIPE, check=True).stdout.decode()"""
"""An expression that starts a process which has left its parents and its session."""

SETTLE_S = 20.0


class Worker:
    """The raylet's end of a worker that evaluates expressions."""

    def __init__(self, forks: ForkServer, token: int) -> None:
        self.sock, theirs = socket.socketpair()
        self.sock.settimeout(SETTLE_S)
        out, out_write = os.pipe()
        err, err_write = os.pipe()
        with theirs:
            forks.spawn_worker(token, theirs.fileno(), out_write, err_write)
        os.close(out_write)
        os.close(err_write)
        self.out, self.err = os.fdopen(out, "rb"), os.fdopen(err, "rb")

    def eval(self, expression: str) -> Any:
        self.sock.send(expression.encode())
        reply = self.sock.recv(65536).decode()
        assert reply, self.err.read().decode()
        return ast.literal_eval(reply)

    def close(self) -> None:
        for file in (self.sock, self.out, self.err):
            file.close()


class Bench:
    """A fork server and what was started with it."""

    def __init__(self, env: dict[str, str]) -> None:
        self.forks = ForkServer.start(env, worker="eval_worker:main")
        self.events: list[Event] = []
        self._workers: list[Worker] = []

    def worker(self) -> Worker:
        self._workers.append(Worker(self.forks, len(self._workers)))
        return self._workers[-1]

    def event(self, wanted: Callable[[Event], object]) -> Any:
        """The first event that is wanted; waits for it."""
        deadline = time.monotonic() + SETTLE_S
        while not (found := [event for event in self.events if wanted(event)]):
            assert time.monotonic() < deadline, f"no such event among {self.events}"
            select.select([self.forks.fd], [], [], 0.1)
            self.events += self.forks.read()
        return found[0]

    def exit_of(self, pid: int) -> int:
        event = self.event(lambda event: isinstance(event, Exited) and event.pid == pid)
        return os.waitstatus_to_exitcode(event.status)

    def close(self) -> None:
        self.forks.close()
        for worker in self._workers:
            worker.close()


@pytest.fixture
def worker_env(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "eval_worker.py").write_text(WORKER)
    root = str(Path(__file__).parents[2])
    path = [str(tmp_path), root, os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}


@pytest.fixture
def bench(worker_env: dict[str, str]) -> Iterator[Bench]:
    bench = Bench(worker_env)
    yield bench
    bench.close()
    assert psutil.Process().children(recursive=True) == []


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_worker_has_one_thread_little_memory_and_a_session_of_its_own(bench: Bench) -> None:
    pid = bench.worker().eval("os.getpid()")
    process = psutil.Process(pid)
    assert process.num_threads() == 1
    assert process.memory_full_info().uss < 25e6
    assert os.getsid(pid) == pid
    assert process.ppid() == bench.forks.pid


def test_a_worker_holds_its_own_descriptors_only(bench: Bench) -> None:
    bench.worker().eval("1")
    worker = bench.worker()
    assert len(worker.eval("os.listdir('/proc/self/fd')")) == 5  # stdio, the socket, and the listing's own
    assert worker.eval("sys.stdin.read()") == ""


def test_what_a_worker_prints_arrives_in_its_pipes(bench: Bench) -> None:
    worker = bench.worker()
    worker.eval("(os.system('echo from C'), print('from Python', file=sys.stderr, flush=True))")
    assert worker.out.readline() == b"from C\n"
    assert worker.err.readline() == b"from Python\n"


def test_a_worker_ends_with_its_socket(bench: Bench) -> None:
    worker = bench.worker()
    pid = worker.eval("os.getpid()")
    worker.sock.shutdown(socket.SHUT_RDWR)
    assert bench.exit_of(pid) == 0
    assert worker.out.read() == b""


def test_a_worker_that_raises_says_so(bench: Bench) -> None:
    worker = bench.worker()
    pid = worker.eval("os.getpid()")
    worker.sock.send(b"1 / 0")
    assert bench.exit_of(pid) == 1
    assert b"ZeroDivisionError" in worker.err.read()


def test_exit_statuses_arrive_after_the_start_is_reported(bench: Bench) -> None:
    codes = {}
    for expression, code in {
        "os._exit(7)": 7,
        "os.kill(os.getpid(), signal.SIGSEGV)": -signal.SIGSEGV,
    }.items():
        worker = bench.worker()
        codes[worker.eval("os.getpid()")] = code
        worker.sock.send(expression.encode())
    for pid, code in codes.items():
        assert bench.exit_of(pid) == code
        mine = [event for event in bench.events if getattr(event, "pid", 0) == pid]
        assert [type(event) for event in mine] == [Spawned, Exited]


def test_only_its_own_children_are_signalled(bench: Bench) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as stranger:
        pid = bench.worker().eval("os.getpid()")
        bench.forks.signal(stranger.pid, signal.SIGKILL)
        bench.forks.signal(pid, signal.SIGKILL)
        assert bench.exit_of(pid) == -signal.SIGKILL
        bench.forks.signal(pid, signal.SIGKILL)
        assert stranger.poll() is None
        stranger.kill()


def test_workers_do_not_share_random_numbers(bench: Bench) -> None:
    numbers = {bench.worker().eval("(random.random(), float(numpy.random.random()))") for _ in range(3)}
    assert len({a for a, _ in numbers}) == 3
    assert len({b for _, b in numbers}) == 3


def test_ctrl_c_ends_no_worker_but_what_a_task_started(bench: Bench) -> None:
    worker = bench.worker()
    pid, grandchild = worker.eval("os.getpid()"), worker.eval(LONG_LIVED)
    os.kill(bench.forks.pid, signal.SIGINT)
    os.kill(bench.forks.pid, signal.SIGTERM)
    os.kill(pid, signal.SIGINT)
    assert worker.eval("1") == 1
    assert not is_gone(grandchild)
    assert worker.eval(
        "(p := subprocess.Popen(['sleep', '600']), time.sleep(.2), p.send_signal(signal.SIGINT), p.wait())[3]"
    ) == (-signal.SIGINT)


def test_close_leaves_no_process(bench: Bench) -> None:
    pids = [bench.forks.pid]
    for _ in range(3):
        worker = bench.worker()
        pids += [worker.eval("os.getpid()"), worker.eval(LONG_LIVED), int(worker.eval(DAEMON))]
    bench.forks.close()
    assert [pid for pid in pids if not is_gone(pid)] == []
    assert bench.forks.read() == []


def test_a_workers_orphans_die_with_it(bench: Bench, wait_until: Callable[..., object]) -> None:
    worker = bench.worker()
    survivor = bench.worker().eval(LONG_LIVED)
    pid, orphan = worker.eval("os.getpid()"), worker.eval(LONG_LIVED)
    bench.forks.signal(pid, signal.SIGKILL)
    bench.exit_of(pid)
    wait_until(lambda: is_gone(orphan), SETTLE_S)
    assert not is_gone(survivor)


def test_workers_die_with_the_fork_server(bench: Bench, wait_until: Callable[..., object]) -> None:
    pids = [bench.worker().eval("os.getpid()") for _ in range(3)]
    bench.event(lambda event: event == Spawned(2, pids[2]))
    os.kill(bench.forks.pid, signal.SIGKILL)
    wait_until(lambda: all(map(is_gone, pids)), SETTLE_S)
    bench.event(lambda event: isinstance(event, ServerEnded))
    bench.worker()  # asking a dead server is no error: its end was reported


RANK = """
import os, socket, subprocess, sys, time
from hpcray.raylet.processes import ForkServer

forks = ForkServer.start(os.environ, worker="eval_worker:main")
ours, theirs = socket.socketpair()
forks.spawn_worker(1, theirs.fileno(), 1, 2)
theirs.close()
pids = [forks.pid]
for expression in sys.argv[1:]:
    ours.send(expression.encode())
    pids.append(int(eval(ours.recv(1000))))
print(*pids, flush=True)
time.sleep(600)
"""


def test_nothing_survives_a_killed_rank(worker_env: dict[str, str], wait_until: Callable[..., object]) -> None:
    rank = subprocess.Popen(
        [sys.executable, "-c", RANK, "os.getpid()", LONG_LIVED, DAEMON],
        env=worker_env,
        stdout=subprocess.PIPE,
    )
    with rank:
        assert rank.stdout is not None
        pids = [int(pid) for pid in rank.stdout.readline().split()]
        assert len(pids) == 4
        rank.kill()
    wait_until(lambda: all(map(is_gone, pids)), SETTLE_S)


class Driver:
    """A driver process of a fork server."""

    def __init__(self, bench: Bench, code: str, cwd: Path, env: dict[str, str] | None = None) -> None:
        self.sock, theirs = socket.socketpair()
        self.sock.settimeout(SETTLE_S)
        with theirs:
            bench.forks.spawn_driver(99, [sys.executable, "-c", code], env, str(cwd), theirs.fileno())
        self.pid = bench.event(lambda event: isinstance(event, Spawned) and event.token == 99).pid


DRIVER_PRELUDE = """
import os, signal, socket, time
fd, inode = os.environ["HPCRAY_DRIVER"].split(":")
sock = socket.socket(fileno=int(fd))
"""


def test_the_driver_is_an_ordinary_program(bench: Bench, tmp_path: Path) -> None:
    code = DRIVER_PRELUDE + (
        "sock.send(repr((os.getcwd(), os.environ['EXTRA'], os.getpgrp(), os.getppid(),"
        "os.fstat(sock.fileno()).st_ino == int(inode), sorted(os.listdir('/proc/self/fd'))[:3],"
        "os.readlink('/proc/self/fd/0'), signal.getsignal(signal.SIGINT) is signal.default_int_handler,"
        "signal.getsignal(signal.SIGTERM))).encode()); raise SystemExit(5)"
    )
    driver = Driver(bench, code, tmp_path, {"EXTRA": "more"})
    with driver.sock:
        cwd, extra, group, parent, own_socket, fds, stdin, *handlers = ast.literal_eval(
            driver.sock.recv(65536).decode().replace("<Handlers.SIG_DFL: 0>", "0")
        )
    assert (cwd, extra, group) == (str(tmp_path), "more", os.getpgrp())
    assert (parent, own_socket, fds) == (bench.forks.pid, True, ["0", "1", "2"])
    assert stdin == str(Path("/proc/self/fd/0").readlink())
    assert handlers == [True, 0]
    assert bench.exit_of(driver.pid) == 5


@pytest.mark.parametrize(
    ("argv", "cwd", "error"),
    [
        (["/no/such/program"], "/", "/no/such/program"),
        ([sys.executable], "/no/such/folder", "/no/such/folder"),
    ],
)
def test_a_driver_that_cannot_start_is_reported(bench: Bench, argv: list[str], cwd: str, error: str) -> None:
    sock, theirs = socket.socketpair()
    with sock, theirs:
        bench.forks.spawn_driver(3, argv, None, cwd, theirs.fileno())
        failed = bench.event(lambda event: isinstance(event, SpawnFailed))
    assert failed.token == 3
    assert error in failed.error
    assert bench.worker().eval("1") == 1


def test_a_rank_that_reads_no_answers_may_go_on_asking(bench: Bench) -> None:
    sock, theirs = socket.socketpair()
    with sock, theirs:
        for token in range(400):
            bench.forks.spawn_driver(token, ["/no/such/program"], None, "/", theirs.fileno())
    bench.event(lambda event: event.token == 399)
    assert [event.token for event in bench.events] == list(range(400))


def test_the_driver_may_say_goodbye(bench: Bench, tmp_path: Path) -> None:
    code = DRIVER_PRELUDE + (
        "signal.signal(signal.SIGTERM, lambda *_: (open('goodbye', 'w').close(), os._exit(0)))\n"
        "sock.send(b'ready'); time.sleep(600)"
    )
    driver = Driver(bench, code, tmp_path)
    with driver.sock:
        assert driver.sock.recv(100) == b"ready"
        bench.forks.close()
    assert (tmp_path / "goodbye").exists()


def test_a_driver_that_ignores_sigterm_is_killed(bench: Bench, tmp_path: Path) -> None:
    code = DRIVER_PRELUDE + "signal.signal(signal.SIGTERM, signal.SIG_IGN); sock.send(b'ready'); time.sleep(600)"
    driver = Driver(bench, code, tmp_path)
    with driver.sock:
        assert driver.sock.recv(100) == b"ready"
        start = time.monotonic()
        bench.forks.close()
    assert 1.9 < time.monotonic() - start < 8
    assert is_gone(driver.pid)


# What follows needs MPI launchers: HPCRAY_PYTHON_OPENMPI and HPCRAY_PYTHON_MPICH name interpreters with one.

MPI_RANK = """
import ctypes, os, signal, socket, sys, time
from pathlib import Path
from hpcray.raylet.leftovers import find_traces
from hpcray.raylet.processes import ForkServer

ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)
forks = ForkServer.start(os.environ, worker="eval_worker:main")
from mpi4py import MPI

world = MPI.COMM_WORLD
world.sendrecv(bytes(100_000), 1 - world.rank, source=1 - world.rank)
traces = find_traces(os.environ, Path("/proc/self/maps").read_text())
forks.watch(traces)
ours, theirs = socket.socketpair()
out, err = os.pipe(), os.pipe()
forks.spawn_worker(1, theirs.fileno(), out[1], err[1])
theirs.close()
results = [os.getpid(), os.getppid(), forks.pid, [*traces.shared_files, traces.session_dir]]
for expression in sys.argv[1:]:
    ours.send(expression.encode())
    results.append(eval(ours.recv(65536)))
Path(f"rank{world.rank}.tmp").write_text(repr(results))
Path(f"rank{world.rank}.tmp").rename(f"rank{world.rank}")
while not Path("end").exists():
    time.sleep(0.02)
forks.close()
"""


@pytest.fixture(params=["HPCRAY_PYTHON_OPENMPI", "HPCRAY_PYTHON_MPICH"])
def mpi_python(request: pytest.FixtureRequest) -> str:
    python = os.environ.get(request.param)
    if python is None:
        pytest.skip(f"{request.param} does not name an interpreter")
    return python


@pytest.fixture
def run_ranks(
    mpi_python: str, worker_env: dict[str, str], tmp_path: Path, wait_until: Callable[..., object]
) -> Iterator[Callable[..., tuple[subprocess.Popen[bytes], list[list[Any]]]]]:
    launched: list[subprocess.Popen[bytes]] = []

    def run(*expressions: str) -> tuple[subprocess.Popen[bytes], list[list[Any]]]:
        env = {
            **worker_env,
            "PATH": f"{Path(mpi_python).parent}{os.pathsep}{os.environ['PATH']}",
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
            "PMIX_MCA_psec": "native",
            "TMPDIR": str(tmp_path),
        }
        mpirun = shutil.which("mpirun", path=env["PATH"])
        assert mpirun is not None
        command = [mpirun, "-n", "2", mpi_python, "-c", MPI_RANK, *expressions]
        with (tmp_path / "output").open("wb") as output:
            launched.append(
                subprocess.Popen(command, env=env, cwd=tmp_path, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
            )
        files = [tmp_path / f"rank{rank}" for rank in range(2)]
        wait_until(
            lambda: all(file.exists() for file in files),
            60,
            lambda: (tmp_path / "output").read_text(),
        )
        return launched[0], [ast.literal_eval(file.read_text()) for file in files]

    yield run
    for launcher in launched:
        with contextlib.suppress(ProcessLookupError):
            launcher.kill()
        launcher.wait()


def test_a_task_may_use_mpi_itself(
    run_ranks: Callable[..., tuple[subprocess.Popen[bytes], list[list[Any]]]], mpi_python: str, tmp_path: Path
) -> None:
    mpirun = "subprocess.run(['mpirun', '-n', '2', 'echo', 'hello'], capture_output=True, timeout=60)"
    singleton = (
        f"subprocess.run([{mpi_python!r}, '-c', 'from mpi4py import MPI; print(MPI.COMM_WORLD.size)'],"
        "capture_output=True, timeout=60)"
    )
    launcher, ranks = run_ranks(
        *(f"(r := {run}, (r.returncode, r.stdout, r.stderr))[1]" for run in (mpirun, singleton))
    )
    for rank in ranks:
        assert rank[4][:2] == (0, b"hello\nhello\n"), rank[4][2]
        assert rank[5][:2] == (0, b"1\n"), rank[5][2]
    (tmp_path / "end").touch()
    assert launcher.wait(60) == 0, (tmp_path / "output").read_text()


@pytest.mark.parametrize("victim", ["launcher", "rank"])
def test_nothing_is_left_of_a_killed_mpi_job(
    run_ranks: Callable[..., tuple[subprocess.Popen[bytes], list[list[Any]]]],
    victim: str,
    wait_until: Callable[..., object],
) -> None:
    launcher, ranks = run_ranks("os.getpid()", LONG_LIVED, f"int({DAEMON})")
    assert any(ranks[0][3])
    os.kill(launcher.pid if victim == "launcher" else ranks[1][0], signal.SIGKILL)
    pids = [pid for rank in ranks for pid in (*rank[:3], *rank[4:])]
    paths = [Path(path) for rank in ranks for path in rank[3] if path]

    def left() -> list[object]:
        return [pid for pid in pids if not is_gone(pid)] + [path for path in paths if path.exists()]

    wait_until(lambda: not left(), SETTLE_S, left)
