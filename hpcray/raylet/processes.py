"""The rank's side of its fork server (`hpcray.raylet.forkserver`)."""

from __future__ import annotations

import array
import select
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

import msgspec

from hpcray.launcher.environment import scrub
from hpcray.raylet.forkserver import (
    MAX_MESSAGE,
    ChildrenEnded,
    EndChildren,
    Exited,
    Reply,
    Request,
    Signal,
    SpawnDriver,
    Spawned,
    SpawnFailed,
    SpawnWorker,
    Watch,
)
from hpcray.raylet.leftovers import JobTraces


class ServerEnded(msgspec.Struct):
    """The fork server is gone, and all workers and the driver with it; nothing follows this event."""


Event = Spawned | SpawnFailed | Exited | ServerEnded


class ForkServer:
    """One fork server process and the socket to it. Not thread-safe."""

    def __init__(self, process: subprocess.Popen[bytes], sock: socket.socket) -> None:
        self._process = process
        self._sock = sock
        self._decoder = msgspec.msgpack.Decoder(Reply)
        self._ended = False
        self._children_ended = False

    @classmethod
    def start(cls, env: Mapping[str, str], *, worker: str | None = None) -> ForkServer:
        """Start a fork server by exec, best before `MPI_Init`. Returns before it has imported its modules.

        Args:
            env: The rank's environment; the fork server gets it scrubbed.
            worker: ``module:function`` to run in workers instead of hpcray's own, for tests.

        Raises:
            OSError: No process could be started.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "hpcray.raylet.forkserver", str(theirs.fileno())]
        if worker is not None:
            command += ["--worker", worker]
        try:
            process = subprocess.Popen(command, env=scrub(env), pass_fds=(theirs.fileno(),))
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return cls(process, ours)

    @property
    def pid(self) -> int:
        """The fork server's process id, the parent of all workers."""
        return self._process.pid

    @property
    def fd(self) -> int:
        """Readable when `read` has something to return."""
        return self._sock.fileno()

    def spawn_worker(self, token: int, sock_fd: int, out_fd: int, err_fd: int) -> None:
        """Ask for a worker; `Spawned` or `SpawnFailed` with this token follows.

        The descriptors are copied, the caller closes its own. Blocks only if hundreds wait.
        """
        self._send(SpawnWorker(token), (sock_fd, out_fd, err_fd))

    def spawn_driver(
        self,
        token: int,
        argv: Sequence[str],
        env: Mapping[str, str] | None,
        cwd: str,
        sock_fd: int,
        *,
        own_group: bool = False,
    ) -> None:
        """Ask for the driver process; `Spawned` or `SpawnFailed` with this token follows.

        Args:
            token: Comes back in the answer.
            argv: Program and arguments. It gets the rank's stdin, stdout and stderr.
            env: Laid over the scrubbed environment given to `start`.
            cwd: Its working directory.
            sock_fd: The driver's socket, found by `HPCRAY_DRIVER`. Copied, the caller closes its own.
            own_group: Keep from it what is sent to the rank's process group. Not where the rank may have been
                started from a terminal: only the foreground group may read from that.

        Raises:
            OSError: The request is too large for a socket message (about 200 KB).
        """
        request = SpawnDriver(token, list(argv), None if env is None else dict(env), cwd, own_group)
        self._send(request, (sock_fd,))

    def signal(self, pid: int, signum: int) -> None:
        """Send a signal to a worker or the driver; does nothing if it has ended."""
        self._send(Signal(pid, int(signum)))

    def watch(self, traces: JobTraces) -> None:
        """Tell what to remove from this host when this process has ended or calls `close`; after `MPI_Init`."""
        self._send(Watch(traces))

    def read(self) -> list[Event]:
        """What happened since the last call, in order; never blocks."""
        events: list[Event] = []
        while not self._ended:
            try:
                message = self._sock.recv(MAX_MESSAGE, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except ConnectionError:
                message = b""
            if message:
                reply = self._decoder.decode(message)
                if isinstance(reply, ChildrenEnded):
                    self._children_ended = True
                else:
                    events.append(reply)
            else:
                self._ended = True
                events.append(ServerEnded())
        return events

    def disown(self) -> None:
        """In a forked child of the rank: leave the fork server to the parent."""
        self._ended = True
        self._sock.close()
        self._process.returncode = 0  # or its finalizer would look for a child that is none of ours

    def end_children(self, timeout: float = 15.0) -> None:
        """Kill all workers, the driver and what they started; block until they are gone. What `read` missed is lost.

        The driver gets SIGTERM and 2 seconds first. The fork server itself stays, to tidy up should the rank die
        on its further way out.
        """
        self._send(EndChildren())
        deadline = time.monotonic() + timeout
        while not (self._children_ended or self._ended):
            if not select.select([self._sock], [], [], max(0.0, deadline - time.monotonic()))[0]:
                self._process.kill()
                return
            self.read()

    def close(self, timeout: float = 15.0) -> None:
        """As `end_children`; then end the fork server too. What it watches is removed: with MPI, finalise first.

        Args:
            timeout: Seconds; after them the fork server itself is killed, and its workers with it.
        """
        self._ended = True
        self._sock.close()
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _send(self, request: Request, fds: Sequence[int] = ()) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self._sock.sendmsg([msgspec.msgpack.encode(request)], ancillary)
        except ConnectionError:
            pass  # `read` reports the end
