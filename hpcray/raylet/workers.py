"""Worker processes as the rank sees them: socket, output pipes, exit status."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
from collections import deque
from typing import Protocol

from hpcray.protocol import messages as m
from hpcray.raylet.channel import Channel
from hpcray.raylet.clients import Client
from hpcray.raylet.processes import ForkServer
from hpcray.transport.poller import EventLoop
from hpcray.worker.output import flush, split

PIPE_READ_SIZE = 1 << 16
LINES_KEPT = 20
"""Last lines of a worker that the error of its crash shows."""
LINE_SHOWN = 500
"""Characters of each."""


class WorkersOut(Protocol):
    """What the rank does with news of workers."""

    def on_message(self, client: Client, message: m.ClientMessage) -> None: ...
    def on_worker_gone(self, client: Client, why: str) -> None: ...
    def on_output(self, lines: m.LogLines) -> None: ...


class _Pipe:
    """One output stream of a worker, cut into lines that carry the name of the task that printed them."""

    def __init__(self, process: WorkerProcess, fd: int, *, is_error: bool) -> None:
        os.set_blocking(fd, False)
        self.fd = fd
        self._process = process
        self._is_error = is_error
        self._buffer = bytearray()
        self._name = "worker"

    def read(self) -> bool:
        """Pass on what is there; False at the end of the stream."""
        try:
            chunk = os.read(self.fd, PIPE_READ_SIZE)
        except BlockingIOError:
            return True
        lines, self._name = split(self._buffer, chunk, self._name)
        self._show(lines)
        return bool(chunk)

    def finish(self) -> None:
        """Pass on a last line that has no newline."""
        self._show(flush(self._buffer, self._name))

    def _show(self, lines: list[tuple[str, bytes]]) -> None:
        names: dict[str, list[str]] = {}
        for name, line in lines:
            names.setdefault(name, []).append(line.decode(errors="backslashreplace"))
        for name, texts in names.items():
            self._process.show(name, texts, is_error=self._is_error)


class WorkerProcess:
    """One worker process, from the request to fork it until its exit status is known."""

    def __init__(self, workers: WorkerProcesses, client: Client, pipes: tuple[int, int]) -> None:
        self.client = client
        self.channel: Channel | None = None
        self.is_wanted_dead = False
        self.tokens = os.eventfd(0, os.EFD_SEMAPHORE | os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        """Shared with the process: one for each task that was sent to it behind another and not started."""
        self._last_lines: deque[str] = deque(maxlen=LINES_KEPT)
        self._workers = workers
        self._pipes = {fd: _Pipe(self, fd, is_error=index == 1) for index, fd in enumerate(pipes)}
        for fd in pipes:
            workers.loop.add_reader(fd, lambda fd=fd: self._read_pipe(fd))  # type: ignore[misc]

    def _read_pipe(self, fd: int) -> None:
        if not self._pipes[fd].read():
            self._close_pipe(fd)

    def _close_pipe(self, fd: int) -> None:
        if (pipe := self._pipes.pop(fd, None)) is not None:
            pipe.finish()
            self._workers.loop.remove_reader(fd)
            os.close(fd)

    def drain_pipes(self) -> None:
        """Pass on what the ended process has printed."""
        for fd, pipe in list(self._pipes.items()):
            while select.select([fd], [], [], 0)[0] and pipe.read():
                pass
            self._close_pipe(fd)

    def show(self, name: str, lines: list[str], *, is_error: bool) -> None:
        self._last_lines.extend(lines)
        self._workers.out.on_output(
            m.LogLines(
                self.client.worker.job if self.client.worker else b"",
                name,
                self.client.pid,
                self._workers.host,
                is_error,
                lines,
            )
        )

    def with_last_lines(self, why: str) -> str:
        """The reason of its end as a sentence, and what it printed last."""
        if not self._last_lines:
            return f"{why}."
        shown = "\n".join(f"    {line:.{LINE_SHOWN}}" for line in self._last_lines)
        return f"{why}. The last lines of its output:\n{shown}"


class WorkerProcesses:
    """All workers of one rank."""

    def __init__(self, loop: EventLoop, forks: ForkServer, host: str, out: WorkersOut) -> None:
        self.loop = loop
        self.host = host
        self.out = out
        self._forks = forks
        self._by_number: dict[int, WorkerProcess] = {}
        self._by_pid: dict[int, WorkerProcess] = {}

    def start(self, client: Client) -> Channel:
        """Ask for a worker process; messages may be sent to it at once."""
        ours, theirs = socket.socketpair()
        out_read, out_write = os.pipe2(os.O_CLOEXEC)
        error_read, error_write = os.pipe2(os.O_CLOEXEC)
        self._forks.spawn_worker(client.number, theirs.fileno(), out_write, error_write)
        theirs.close()
        os.close(out_write)
        os.close(error_write)
        process = WorkerProcess(self, client, (out_read, error_read))
        process.channel = Channel(self.loop, ours, client, self.out.on_message, self._on_socket_end)
        self._by_number[client.number] = process
        return process.channel

    def kill(self, client: Client) -> None:
        """End a worker's process at once; `on_worker_gone` follows."""
        process = self._by_number.get(client.number)
        if process is None:
            return
        process.is_wanted_dead = True
        if client.pid:
            self._forks.signal(client.pid, signal.SIGKILL)

    def tokens_of(self, client: Client) -> int:
        """The descriptor of a worker's tokens."""
        return self._by_number[client.number].tokens

    def add_tokens(self, client: Client, count: int) -> None:
        """Let a worker start so many more of the tasks that are sent to it behind others."""
        if (process := self._by_number.get(client.number)) is not None:
            os.eventfd_write(process.tokens, count)

    def take_tokens(self, client: Client) -> int:
        """Take all tokens that a worker has left; how many they were."""
        taken = 0
        if (process := self._by_number.get(client.number)) is not None:
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.eventfd_read(process.tokens)
                    taken += 1
        return taken

    def on_spawned(self, number: int, pid: int) -> None:
        """The fork server made the process."""
        process = self._by_number.get(number)
        if process is None:
            return
        process.client.pid = pid
        self._by_pid[pid] = process
        if process.is_wanted_dead:
            self._forks.signal(pid, signal.SIGKILL)

    def on_spawn_failed(self, number: int, error: str) -> None:
        """There is no process."""
        if (process := self._by_number.get(number)) is not None:
            self._finish(process, f"its process could not be started: {error}")

    def on_exited(self, pid: int, status: int) -> bool:
        """A process of the fork server ended; False if it is none of ours."""
        process = self._by_pid.pop(pid, None)
        if process is None:
            return False
        if process.channel is not None:
            process.channel.read_all()
        self._finish(process, describe_status(pid, status))
        return True

    def _on_socket_end(self, channel: Channel) -> None:
        # Its exit status follows from the fork server, and with it the reason, unless it only closed its
        # socket.
        self.kill(channel.client)

    def _finish(self, process: WorkerProcess, why: str) -> None:
        del self._by_number[process.client.number]
        process.drain_pipes()
        os.close(process.tokens)
        if process.channel is not None:
            process.channel.close()
        self.out.on_worker_gone(process.client, process.with_last_lines(why))

    @property
    def count(self) -> int:
        return len(self._by_number)


_HINTS = {
    signal.SIGKILL: "; if not by hand, for lack of memory: run fewer tasks at a time or get more memory",
    signal.SIGSEGV: "; native code that the task called has crashed: PYTHONFAULTHANDLER=1 shows where",
    signal.SIGABRT: "; native code that the task called has given up: its output says why",
}
"""What is likely behind a signal, and what to do."""


def describe_status(pid: int, status: int) -> str:
    """A wait status in words."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"process {pid} exited with code {code}, by sys.exit() or os._exit() in the task or a library"
    try:
        signum = signal.Signals(-code)
    except ValueError:
        return f"process {pid} was killed by signal {-code}"
    return f"process {pid} was killed by signal {-code} ({signum.name}){_HINTS.get(signum, '')}"


def exit_code(status: int) -> int:
    """A wait status as a shell's exit code: 128 + n for signal n."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code
