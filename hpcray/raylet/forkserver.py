"""The fork server: a small process that starts a rank's workers and its driver.

A process that has called `MPI_Init` should not fork, so each rank starts one of these by exec and asks it for
children. It has the worker's modules imported, so a worker is a fork, not a start of Python.

Rules:
  1. One thread, one poll loop over the rank's socket and the signal wake-up; nothing here runs user code.
  2. Requests are answered in order, and a child's `Exited` never precedes its `Spawned`.
  3. When the rank's socket ends, for whatever reason, no descendant outlives this process. Being a child
     subreaper, it inherits the orphans of its workers, so none escapes.
  4. A worker's orphans (its session) die with the worker.

The rank's side is `hpcray.raylet.processes.ForkServer`.
"""

from __future__ import annotations

import argparse
import array
import collections
import contextlib
import gc
import importlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple, NoReturn

import msgspec

from hpcray.environments import places
from hpcray.launcher.environment import DRIVER_SOCKET, THREAD_VARIABLES, driver_socket_value
from hpcray.raylet.descendants import (
    adopt_orphans,
    children,
    close_inherited,
    descendants,
    die_with,
    has_children,
    kill,
    set_process_name,
)
from hpcray.raylet.leftovers import JobTraces, remove_mpi_leftovers
from hpcray.worker.process import become_worker, exit_after


class SpawnWorker(msgspec.Struct, tag=1, array_like=True):
    """Rank → fork server, with 3 descriptors: raylet socket, stdout pipe, stderr pipe.

    Answered by `Spawned` or `SpawnFailed`.
    """

    token: int


class SpawnDriver(msgspec.Struct, tag=2, array_like=True):
    """Rank → fork server, with 1 descriptor: the driver's raylet socket. Answered as `SpawnWorker`.

    `env` is laid over the fork server's own (scrubbed) environment; ``None`` adds nothing.
    """

    token: int
    argv: list[str]
    env: dict[str, str] | None
    cwd: str
    own_group: bool
    """Whether it leads a process group of its own; else it joins the rank's, for the terminal's sake."""


class Signal(msgspec.Struct, tag=3, array_like=True):
    """Rank → fork server: signal one of its workers or its driver; that it has ended is no error."""

    pid: int
    signum: int


class Watch(msgspec.Struct, tag=4, array_like=True):
    """Rank → fork server: what to remove when the rank has ended; the last one counts."""

    traces: JobTraces


class EndChildren(msgspec.Struct, tag=5, array_like=True):
    """Rank → fork server: end workers, driver and what they started; answered by `ChildrenEnded`."""


class Spawned(msgspec.Struct, tag=1, array_like=True):
    """Fork server → rank: the child of this request runs."""

    token: int
    pid: int


class SpawnFailed(msgspec.Struct, tag=2, array_like=True):
    """Fork server → rank: there is no child; `error` says why, for people."""

    token: int
    error: str


class Exited(msgspec.Struct, tag=3, array_like=True):
    """Fork server → rank: a worker or the driver ended; `status` as `os.waitstatus_to_exitcode` takes it."""

    pid: int
    status: int


class ChildrenEnded(msgspec.Struct, tag=4, array_like=True):
    """Fork server → rank: no descendant is left."""


Request = SpawnWorker | SpawnDriver | Signal | Watch | EndChildren
Reply = Spawned | SpawnFailed | Exited | ChildrenEnded

DRIVER_GRACE = 2.0  # seconds between SIGTERM and SIGKILL for a driver whose rank is gone
END_LIMIT = 10.0  # seconds after which unkillable (disk-sleep) processes are given up
MAX_MESSAGE = 1 << 18  # bytes; above the largest datagram that the default Unix socket buffer takes


class WorkerSeat(NamedTuple):
    """What a freshly forked worker has been given; descriptors of this process."""

    sock: int
    stdout: int
    stderr: int
    parent: int


class Server:
    """Serves the requests of one rank until its socket ends."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sock.setblocking(False)
        self._wakeup, self._wakeup_writer = socket.socketpair()
        self._wakeup.setblocking(False)
        self._wakeup_writer.setblocking(False)
        self._requests = msgspec.msgpack.Decoder(Request)
        self._replies: collections.deque[bytes] = collections.deque()
        self._workers: set[int] = set()
        self._drivers: dict[int, subprocess.Popen[bytes]] = {}
        self._ended_workers: set[int] = set()
        self._traces = JobTraces()
        # The rank's group may be the terminal's foreground group: there the driver belongs to it, while this
        # process must survive what launchers send to the whole group (Open MPI: SIGKILL), to clean up.
        self._rank_group = os.getpgrp()
        os.setpgid(0, 0)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wakeup_writer.fileno(), warn_on_full_buffer=False)

    def serve(self) -> WorkerSeat | None:
        """Block until the rank's socket ends; in a forked worker, return that worker's seat at once."""
        poller = select.poll()
        poller.register(self._wakeup, select.POLLIN)
        while True:
            poller.register(self._sock, select.POLLIN | (select.POLLOUT if self._replies else 0))
            poller.poll()
            self._drain_wakeup()
            self._reap()
            try:
                # Requests are read even if the rank reads no replies: it may be blocked in sending the next.
                with contextlib.suppress(BlockingIOError):
                    self._send_replies()
                message, fds, _, _ = socket.recv_fds(self._sock, MAX_MESSAGE, 3, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                continue
            except ConnectionError:
                return None
            if not message:
                return None
            seat = self._handle(self._requests.decode(message), fds)
            if seat is not None:
                return seat

    def end(self) -> None:
        """End every descendant, remove what they unpacked and what the rank's MPI has left. Blocks, mostly for milliseconds."""
        self._end_children()
        remove_mpi_leftovers(self._traces)
        places.clean_up()

    def _end_children(self) -> None:
        for pid in self._drivers:
            kill(pid, signal.SIGTERM)
        for pid in self._workers:
            kill(pid, signal.SIGKILL)
        now = time.monotonic()
        driver_deadline, limit = now + DRIVER_GRACE, now + END_LIMIT
        poller = select.poll()
        poller.register(self._wakeup, select.POLLIN)
        while has_children() and now < limit:
            self._reap()
            if not self._drivers or now >= driver_deadline:
                for pid in descendants(os.getpid()):
                    kill(pid, signal.SIGKILL)
            poller.poll(50)
            self._drain_wakeup()
            now = time.monotonic()

    def forget(self) -> None:
        """In a forked worker: let go of descriptors that are about to be closed by number."""
        signal.set_wakeup_fd(-1)
        for sock in (self._sock, self._wakeup, self._wakeup_writer):
            sock.detach()

    def _handle(self, request: Request, fds: array.array[int] | list[int]) -> WorkerSeat | None:
        try:
            if isinstance(request, SpawnWorker):
                return self._spawn_worker(request, list(fds))
            if isinstance(request, SpawnDriver):
                self._spawn_driver(request, list(fds))
            elif isinstance(request, Signal):
                if request.pid in self._workers or request.pid in self._drivers:
                    kill(request.pid, request.signum)
            elif isinstance(request, EndChildren):
                self._end_children()
                self._reply(ChildrenEnded())
            else:
                self._traces = request.traces
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            if not isinstance(request, SpawnWorker | SpawnDriver):
                raise
            self._reply(SpawnFailed(request.token, f"{type(error).__name__}: {error}"))
        return None

    def _spawn_worker(self, request: SpawnWorker, fds: list[int]) -> WorkerSeat | None:
        parent = os.getpid()
        try:
            sock, stdout, stderr = fds
            pid = os.fork()
        except BaseException:
            _close(fds)
            raise
        if pid == 0:
            return WorkerSeat(sock, stdout, stderr, parent)
        _close(fds)
        self._workers.add(pid)
        self._ended_workers.discard(pid)
        self._reply(Spawned(request.token, pid))
        return None

    def _spawn_driver(self, request: SpawnDriver, fds: list[int]) -> None:
        parent = os.getpid()

        def prepare() -> None:
            os.setpgid(0, 0 if request.own_group else self._rank_group)
            for signum in (*_IGNORED, signal.SIGCHLD):
                signal.signal(signum, signal.SIG_DFL)
            die_with(parent)

        try:
            (sock,) = fds
            env = {
                **os.environ,
                **(request.env or {}),
                DRIVER_SOCKET: driver_socket_value(sock, os.fstat(sock).st_ino),
            }
            driver = subprocess.Popen(request.argv, cwd=request.cwd, env=env, pass_fds=(sock,), preexec_fn=prepare)
        finally:
            _close(fds)
        self._drivers[driver.pid] = driver
        self._reply(Spawned(request.token, driver.pid))

    def _reply(self, reply: Reply) -> None:
        self._replies.append(msgspec.msgpack.encode(reply))
        with contextlib.suppress(BlockingIOError, ConnectionError):
            self._send_replies()

    def _send_replies(self) -> None:
        while self._replies:
            self._sock.send(self._replies[0])
            self._replies.popleft()

    def _drain_wakeup(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._wakeup.recv(4096):
                pass

    def _reap(self) -> None:
        reaped = False
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0] != 0:
                reaped = True
                self._on_exit(*ended)
        if reaped:
            self._kill_orphans_of_ended_workers()

    def _on_exit(self, pid: int, status: int) -> None:
        driver = self._drivers.pop(pid, None)
        if driver is not None:
            driver.returncode = os.waitstatus_to_exitcode(status)  # or Popen would wait for it again
        elif pid in self._workers:
            self._workers.remove(pid)
            self._ended_workers.add(pid)
        else:
            return
        self._reply(Exited(pid, status))

    def _kill_orphans_of_ended_workers(self) -> None:
        # No process gets a session's number while the session has members, so this cannot hit a stranger.
        for pid in children():
            if pid not in self._workers and pid not in self._drivers:
                with contextlib.suppress(ProcessLookupError):
                    if os.getsid(pid) in self._ended_workers:
                        kill(pid, signal.SIGKILL)


# What a terminal or batch system sends is the rank's to judge; it ends this process through the socket.
_IGNORED = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGTTOU,
    signal.SIGTTIN,
    signal.SIGTSTP,
)


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


def _sit_down(seat: WorkerSeat) -> socket.socket:
    os.setsid()
    die_with(seat.parent)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(seat.stdout, 1)
    os.dup2(seat.stderr, 2)
    close_inherited(seat.sock)
    for signum in (*_IGNORED, signal.SIGCHLD):
        signal.signal(signum, signal.SIG_DFL)
    become_worker()
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:  # Python's `random` reseeds itself after a fork, this one does not
        numpy_random.seed()
    gc.enable()
    return socket.socket(fileno=seat.sock)


def _work(seat: WorkerSeat, run_worker: Callable[[socket.socket], None]) -> NoReturn:
    exit_after(lambda: run_worker(_sit_down(seat)))


def _preload(worker: str) -> Callable[[socket.socket], None]:
    """Import what every worker needs, so that their pages are shared; starts no thread."""
    lent = [name for name in THREAD_VARIABLES if name not in os.environ]
    os.environ.update(dict.fromkeys(lent, "1"))
    module, _, function = worker.partition(":")
    for name in ("numpy", "cloudpickle"):
        importlib.import_module(name)
    run_worker: Callable[[socket.socket], None] = getattr(importlib.import_module(module), function)
    for name in lent:
        del os.environ[name]
    return run_worker


def main() -> None:
    """Serve the socket given on the command line until it ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("fd", type=int)
    parser.add_argument("--worker", default="hpcray.worker.main:main")
    arguments = parser.parse_args()
    close_inherited(arguments.fd)
    os.set_inheritable(arguments.fd, False)
    set_process_name("hpcray:forks")
    adopt_orphans()
    for signum in _IGNORED:
        signal.signal(signum, signal.SIG_IGN)
    server = Server(socket.socket(fileno=arguments.fd))
    run_worker = _preload(arguments.worker)
    gc.disable()
    gc.collect()
    gc.freeze()
    seat = None
    try:
        seat = server.serve()
    finally:
        if seat is None:
            server.end()
    if seat is not None:
        server.forget()
        _work(seat, run_worker)


if __name__ == "__main__":
    main()
