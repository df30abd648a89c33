"""How `init()` gets its connection, for every way in which a script can have been started."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

from hpcray.launcher import attach
from hpcray.launcher.environment import DRIVER_SOCKET, parse_driver_socket, scrub
from hpcray.launcher.options import JobOptions, with_environment
from hpcray.launcher.roles import detect_launch

END_TIMEOUT = 20.0
"""Seconds that `shutdown()` waits for the processes of a job that `init()` started."""


@dataclass
class Wish:
    """What `init()` was asked for."""

    address: str | None = None
    num_cpus: float | None = None
    num_gpus: int | None = None
    resources: dict[str, float] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    object_store_memory: int | None = None

    @property
    def names_resources(self) -> bool:
        """Whether it says what the job's nodes are to be."""
        return bool(self.resources or self.labels) or not (
            self.num_cpus is self.num_gpus is self.object_store_memory is None
        )

    def as_options(self) -> JobOptions:
        """The same as options of a job, completed from the environment.

        Raises:
            ValueError: A variable there is wrong.
        """
        options = JobOptions(
            num_cpus=self.num_cpus,
            num_gpus=self.num_gpus,
            resources=self.resources,
            labels=self.labels,
            object_store_memory=self.object_store_memory,
        )
        return with_environment(options, os.environ)


def _nothing() -> None:
    pass


@dataclass
class Connection:
    """A driver's socket to rank 0, and what to do after closing it."""

    sock: socket.socket
    end: Callable[[], None] = _nothing
    namespace: str | None = None
    log_to_driver: bool = True


def connect(wish: Wish) -> Connection:
    """Find the job that this process belongs to, or start one.

    Raises:
        ConnectionError: No job to attach to.
        ValueError: A bad address, or an object store larger than the memory.
        LaunchError: The job cannot start as it was launched.
    """
    # To a script that `hpcray run` started, the running job is its own.
    if wish.address in (None, "auto") and (inherited := _inherited_socket()) is not None:
        if wish.names_resources:
            print(
                "hpcray: this job's resources were given at its start; those in init() have no effect",
                file=sys.stderr,
            )
        return inherited
    if wish.address not in (None, "local"):
        assert wish.address is not None
        return Connection(attach.connect(wish.address))
    if wish.address is None:
        if start_on_ranks is not None:
            return start_on_ranks(wish.as_options())
        launch = detect_launch(os.environ)
        if launch.is_mpi and launch.size != 1 and not _JOINED:
            _JOINED.append(True)
            return _join_mpi_job(wish)
    return _start_local(wish)


start_on_ranks: Callable[[JobOptions], Connection] | None = None
"""Where the other ranks of this process's MPI job wait to serve, as often as it likes (`hpcray.testing`): starts a job there."""
_JOINED: list[bool] = []
"""Non-empty once this process's MPI job was joined: its other ranks have left by then, so the next job is local."""


def _inherited_socket() -> Connection | None:
    """The socket that `hpcray run` gave to its script; only this very process may use it, and once."""
    value = os.environ.pop(DRIVER_SOCKET, None)
    settings = json.loads(os.environ.pop(attach.DRIVER_SETTINGS, "{}"))
    if value is None:
        return None
    fd, inode = parse_driver_socket(value)
    try:
        if os.fstat(fd).st_ino != inode:
            return None
    except OSError:
        return None  # a child process of the script, started with its environment but not its socket
    os.set_inheritable(fd, False)
    silence_interrupts()
    sock = socket.socket(fileno=fd)
    return Connection(sock, namespace=settings.get("namespace"), log_to_driver=settings.get("log_to_driver", True))


def silence_interrupts() -> None:
    """Let this script end by a Ctrl-C without a traceback: its job says in one line that it was interrupted."""
    hook = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            hook(kind, error, trace)

    sys.excepthook = show


def _start_local(wish: Wish) -> Connection:
    options = wish.as_options()
    if options.object_store_memory is not None or options.num_gpus:
        # Said here, where it was asked for, as well as by the job that would not start.
        from hpcray.launcher.introductions import introduce, make_nodes

        make_nodes([introduce(options, os.environ)], 0.0)
    ours, theirs = socket.socketpair()
    arguments = {
        "fd": theirs.fileno(),
        "num_cpus": options.num_cpus,
        "num_gpus": options.num_gpus,
        "resources": dict(options.resources),
        "labels": dict(options.labels),
        "object_store_memory": options.object_store_memory,
    }
    with theirs:
        # A session of its own: the terminal's Ctrl-C is for the script, which ends the job when it ends.
        process = subprocess.Popen(
            [sys.executable, "-m", "hpcray.launcher.local", json.dumps(arguments)],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            env=scrub(os.environ),
            start_new_session=True,
        )

    def end() -> None:
        try:
            process.wait(END_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    return Connection(ours, end)


def _join_mpi_job(wish: Wish) -> Connection:
    from hpcray.launcher import bootstrap

    module = sys.modules.get("mpi4py.MPI")
    if module is not None and module.Is_initialized():
        return bootstrap.join_in_thread(wish.as_options())
    return bootstrap.join_by_fork(wish.as_options())
