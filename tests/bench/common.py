"""What the benches share: interleaved rounds, ratios to a yardstick of the same round, and the JSON they print.

The machines that this runs on are shared and noisy. So a bench takes its figures in rounds, each figure once in
each round, and reports medians. A ratio is the median of the rounds' ratios: what slows a round slows both of
its sides.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ECHO = """
import socket, sys
sock = socket.socket(fileno=int(sys.argv[1]))
while data := sock.recv(4096):
    sock.send(data)
"""
MESSAGE = bytes(200)  # about one task
LATENCIES = 500
CHILD_TIMEOUT = 120.0  # seconds; the slowest child takes a tenth of it on an idle machine


@dataclass(frozen=True)
class Ratio:
    """A figure over another of the same round, times `factor`, and what is promised of it."""

    over: str
    under: str
    factor: float = 1.0
    at_least: float | None = None
    at_most: float | None = None


class Bench:
    """Collects the rounds of one bench and prints them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.facts: dict[str, object] = {}
        """What one must know to read the figures."""
        self._units: dict[str, str] = {}
        self._values: dict[str, list[float]] = {}
        self._loads = [_load()]

    def run(self, rounds: int, measures: Mapping[str, tuple[str, Callable[[], float]]]) -> None:
        """Take each measure once in each round; `measures` has the unit and the call that gives a value. Blocks."""
        for _ in range(rounds):
            for name, (unit, measure) in measures.items():
                self.add(name, unit, measure())
            self._loads.append(_load())

    def add(self, name: str, unit: str, value: float) -> None:
        """One value of the present round."""
        self._units[name] = unit
        self._values.setdefault(name, []).append(value)

    def report(self, ratios: Mapping[str, Ratio], promised: Mapping[str, Mapping[str, float]] | None = None) -> None:
        """Print the JSON; `promised` holds `at_least` or `at_most` of figures that are no ratios."""
        self._loads.append(_load())
        figures = {name: self._summary(self._values[name], unit=unit) for name, unit in self._units.items()}
        for name, bounds in (promised or {}).items():
            figures[name] |= bounds
        print(
            json.dumps(
                {
                    "bench": self.name,
                    "machine": machine(),
                    "load": {"before": self._loads[0], "most": max(self._loads), "after": self._loads[-1]},
                    "facts": self.facts,
                    "figures": figures,
                    "ratios": {name: self._ratio(ratio) for name, ratio in ratios.items() if ratio.under in figures},
                },
                indent=2,
            ),
            flush=True,
        )

    def _ratio(self, ratio: Ratio) -> dict[str, object]:
        pairs = zip(self._values[ratio.over], self._values[ratio.under], strict=True)
        summary = self._summary([ratio.factor * over / under for over, under in pairs])
        bounds = {"at_least": ratio.at_least, "at_most": ratio.at_most}
        return {
            "of": f"{ratio.over} / {ratio.under}",
            **summary,
            **{name: bound for name, bound in bounds.items() if bound is not None},
        }

    @staticmethod
    def _summary(values: Sequence[float], **more: object) -> dict[str, Any]:
        return {
            "median": _rounded(statistics.median(values)),
            **more,
            "least": _rounded(min(values)),
            "most": _rounded(max(values)),
            "rounds": len(values),
        }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _load() -> float:
    """Processes that wanted a CPU over the last minute, this bench's own among them."""
    return round(os.getloadavg()[0], 2)


def machine() -> dict[str, object]:
    """The machine and the interpreter, without names or paths."""
    model = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "cpu": model[0] if model else platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def options(parser: argparse.ArgumentParser, rounds: int = 5) -> argparse.Namespace:
    """Parse the command line; `rounds` and `quick` are common to all benches."""
    parser.add_argument("--quick", action="store_true", help="one small round: shows that it runs, measures nothing")
    parser.add_argument("--rounds", type=int, default=rounds)
    parsed = parser.parse_args()
    if parsed.quick:
        parsed.rounds = 1
    return parsed


# ---------------------------------------------------------------------------------------------- stopwatches
def seconds(action: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def per_second(action: Callable[[], object], times: int) -> float:
    """How often a second something happens that happens `times` times in one call."""
    return times / seconds(action)


def median_us(action: Callable[[], object], times: int) -> float:
    """The median duration of a call, in microseconds."""
    return statistics.median(seconds(action) for _ in range(times)) * 1e6


@contextlib.contextmanager
def echo() -> Iterator[Callable[[], float]]:
    """The yardstick of everything that wakes a process: gives a call that returns how many round trips a second a
    small message makes to another Python process over a Unix socket (the reciprocal of the median of some hundred)."""
    ours, theirs = socket.socketpair()
    child = subprocess.Popen([sys.executable, "-c", ECHO, str(theirs.fileno())], pass_fds=[theirs.fileno()])
    theirs.close()

    def round_trip() -> None:
        ours.send(MESSAGE)
        ours.recv(4096)

    try:
        round_trip()
        yield lambda: 1e6 / median_us(round_trip, LATENCIES)
    finally:
        ours.close()
        child.wait(CHILD_TIMEOUT)


# ------------------------------------------------------------------------------------------------- children
def job_command(ranks: int, *script: str) -> list[str]:
    """The command line that starts an hpcray job of this interpreter."""
    return [sys.executable, "-m", "hpcray", "run", *(["-n", str(ranks)] if ranks > 1 else []), *script]


def output_of(command: Sequence[str], env: Mapping[str, str] | None = None) -> str:
    """What a command prints on stdout. Blocks until it ends; nothing of it is left then.

    Raises:
        RuntimeError: It failed, or took too long; the text has the end of its stderr.
    """
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True
    ) as child:
        try:
            out, err = child.communicate(timeout=CHILD_TIMEOUT)
        except BaseException as error:
            os.killpg(child.pid, signal.SIGTERM)  # mpirun takes its ranks along
            child.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise RuntimeError(f"still ran after {CHILD_TIMEOUT} s: {' '.join(command)}") from None
            raise
    if child.returncode:
        raise RuntimeError(f"exit code {child.returncode} of {' '.join(command)}\n{err[-2000:]}")
    return out
