"""Processes in namespaces of their own: start, find, list."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .execution import environment

KINDS = ["--net", "--uts", "--ipc", "--pid", "--mount"]
UNSHARE = ["unshare", *KINDS, "--fork", "--kill-child", "--mount-proc"]
START_TIMEOUT = 10.0  # seconds until the namespaces exist; milliseconds are usual
END_TIMEOUT = 30.0  # seconds for the kernel to end every process of a namespace


class Process(NamedTuple):
    """A live process as /proc shows it to us; `pid` and `parent` are ours, not the namespace's."""

    pid: int
    parent: int
    name: str
    command: str


@dataclass(frozen=True)
class Space:
    """A set of namespaces and the process that holds them: if `first` dies, so does all in them."""

    starter: subprocess.Popen[bytes]
    first: int

    def enter(self) -> list[str]:
        """What to put before a command so that it runs inside."""
        return ["nsenter", "--all", "--target", str(self.first)]

    def is_alive(self) -> bool:
        return self.starter.poll() is None

    def kill(self) -> None:
        """Kill all inside and block until it is gone."""
        if self.is_alive():
            os.kill(self.first, signal.SIGKILL)
        self.starter.wait(END_TIMEOUT)


def start_space(script: Path, args: list[str], log: Path, inside: Space | None = None) -> Space:
    """Run a shell script as the first process of new namespaces; return once they exist.

    The script's end, or the death of the thread that called this, ends all processes within.
    bash, because as a first process it reaps the orphans it is given.

    Raises:
        OSError: They could not be made; the text is the log.
    """
    enter = inside.enter() if inside else ["setpriv", "--pdeathsig", "KILL"]
    command = [*enter, *UNSHARE, "bash", "-eu", str(script), *args]
    with log.open("ab") as output:
        starter = subprocess.Popen(command, env=environment(), stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline and starter.poll() is None:
        if first := _find_first(starter.pid):
            return Space(starter, first)
        time.sleep(0.005)
    starter.kill()
    starter.wait()
    raise OSError(f"could not make namespaces: {log.read_text(errors='replace')}")


def members(space: Space) -> list[Process]:
    """The live processes of a space, not those of spaces within it."""
    wanted = _pid_namespace(space.first)
    return [process for process in _all_processes() if wanted and _pid_namespace(process.pid) == wanted]


def why_impossible() -> str | None:
    """Why namespaces cannot be made here, or None."""
    trial = subprocess.run([*UNSHARE, "mount", "-t", "tmpfs", "trial", "/run"], capture_output=True, text=True)
    return None if trial.returncode == 0 else f"namespaces are not permitted here: {trial.stderr.strip()}"


def _find_first(ancestor: int) -> int | None:
    by_pid = {process.pid: process for process in _all_processes()}
    for process in by_pid.values():
        if process.name == "bash" and _innermost_pid(process.pid) == 1:
            parent = process.parent
            while parent in by_pid and parent != ancestor:
                parent = by_pid[parent].parent
            if parent == ancestor:
                return process.pid
    return None


def _all_processes() -> Iterator[Process]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                # The name is in parentheses and may itself contain spaces and parentheses.
                head, _, tail = (folder / "stat").read_text(errors="replace").rpartition(")")
                command = (folder / "cmdline").read_bytes()
            except OSError:
                continue  # it ended meanwhile
            state, parent = tail.split()[:2]
            if state not in "ZX":
                text = command.rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
                yield Process(int(folder.name), int(parent), head.partition("(")[2], text)


def _pid_namespace(pid: int) -> str | None:
    try:
        return str(Path(f"/proc/{pid}/ns/pid").readlink())
    except OSError:
        return None


def _innermost_pid(pid: int) -> int | None:
    try:
        status = Path("/proc", str(pid), "status").read_text()
    except OSError:
        return None
    return next((int(line.split()[-1]) for line in status.splitlines() if line.startswith("NSpid:")), None)
