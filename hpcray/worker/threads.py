"""Threads of a worker: where they run, and that numerical libraries have as many as the running task has CPUs, as in Ray."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Collection
from pathlib import Path

from hpcray.launcher.environment import thread_limits

_OPENBLAS = re.compile(r"\S*/lib(?:scipy_)?openblas\S*\.so\S*$", re.MULTILINE)
_SETTERS = ("scipy_openblas_set_num_threads64_", "scipy_openblas_set_num_threads", "openblas_set_num_threads64_",
            "openblas_set_num_threads")  # fmt: skip
"""Names under which numpy's and scipy's wheels and distributions export OpenBLAS's setter."""


def limit_threads(num_cpus: float) -> None:
    """Set `OMP_NUM_THREADS` and its kin, and what has read them already: numpy's OpenBLAS, loaded before the fork.

    A user's own setting of a variable stands.
    """
    limits = thread_limits(num_cpus)
    os.environ.update(limits)
    if "OPENBLAS_NUM_THREADS" in limits:
        for setter in _openblas_setters():
            setter(int(limits["OPENBLAS_NUM_THREADS"]))


def bind_threads(cpus: Collection[int]) -> None:
    """Have all threads of this process, those of libraries among them, run on these CPUs only."""
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(
            OSError
        ):  # it has just ended; or the CPUs were taken from the job, which knows no others
            os.sched_setaffinity(int(thread.name), cpus)


_known: list[ctypes._NamedFuncPointer] | None = None


def _openblas_setters() -> list[ctypes._NamedFuncPointer]:
    global _known
    if _known is None:
        _known = []
        for path in dict.fromkeys(_OPENBLAS.findall(Path("/proc/self/maps").read_text())):
            library = ctypes.CDLL(path)
            name = next((name for name in _SETTERS if hasattr(library, name)), None)
            if name is not None:
                _known.append(getattr(library, name))
    return _known
