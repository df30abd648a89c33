"""Programs on the cluster, started from outside of it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping

END_GRACE = 10.0  # seconds from SIGTERM to SIGKILL for an srun that ran past its time-out

# Root's PATH has the daemons on Debian; that of a CI step or a virtual environment may not.
SEARCH_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


def start(command: list[str], env: Mapping[str, str] | None) -> subprocess.Popen[str]:
    """Start a program with pipes for stdin, stdout and stderr; `env` is added to our environment."""
    pipe = subprocess.PIPE
    # A session of its own, so that nsenter and the program it starts can be signalled together.
    return subprocess.Popen(
        command,
        env=environment(env),
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], stdin: str, timeout: float) -> subprocess.CompletedProcess[str]:
    """Block until a program that `start` returned has ended.

    Raises:
        subprocess.TimeoutExpired: After `timeout` seconds it was terminated, at last killed; has the output.
    """
    try:
        out, err = process.communicate(stdin, timeout)
    except subprocess.TimeoutExpired as expired:
        os.killpg(process.pid, signal.SIGTERM)  # srun then ends its step
        try:
            out, err = process.communicate(timeout=END_GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
        raise subprocess.TimeoutExpired(process.args, timeout, out, err) from expired
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def environment(added: Mapping[str, str] | None = None) -> dict[str, str]:
    """Ours, with the daemons on the PATH and without what an outer Slurm job has set, plus `added`."""
    outer = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SRUN"))}
    return outer | {"PATH": SEARCH_PATH} | dict(added or {})
