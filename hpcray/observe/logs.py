"""Workers' lines at the driver: their prefix, and the folding of repeated ones. Pure.

Programs that run the same function a thousand times print the same line a thousand times. A line that was
shown less than `WINDOW` ago is counted instead, and the count shown when the window is over. Between workers,
numbers aside ("epoch 3" of ten workers is one line); in the lines of one worker, numbers matter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from hpcray.protocol.messages import LogLines

WINDOW = 5.0
"""Seconds within which a repeated line is folded (Ray's)."""
MAX_KNOWN = 1000
"""Different lines that are remembered; beyond, the oldest window is closed early."""

_DIGITS = re.compile(r"\d+")


class _Repeated:
    __slots__ = ("count", "last", "lines", "own", "since", "source")

    def __init__(self, since: float, lines: LogLines, line: str) -> None:
        self.since = since
        self.count = 0
        self.source = _source(lines)
        self.own = line
        """The latest line of the worker that began."""
        self.last = line
        self.lines = lines
        """Whom the latest repetition came from."""


class LogFolder:
    """Decides what of the workers' lines a driver prints.

    Args:
        folds: False prints every line.
    """

    def __init__(self, *, folds: bool) -> None:
        self._folds = folds
        self._known: dict[str, _Repeated] = {}
        self._has_hinted = False

    def feed(self, lines: LogLines, now: float) -> list[tuple[bool, str]]:
        """What to print now, as (is it for stderr, text)."""
        printed = list(self.flush(now))
        for line in lines.lines:
            key = _DIGITS.sub("", line)
            if not lines.name or not self._folds or not key.strip():
                printed.append((lines.is_error, _with_prefix(lines, line)))
                continue
            known = self._known.get(key)
            if known is None:
                if len(self._known) >= MAX_KNOWN:
                    printed += self._close(next(iter(self._known)))
                self._known[key] = _Repeated(now, lines, line)
                printed.append((lines.is_error, _with_prefix(lines, line)))
            elif line != known.own and known.source == _source(lines):
                if known.source == _source(known.lines):
                    printed += self._report(known)
                known.own = line
                printed.append((lines.is_error, _with_prefix(lines, line)))
            else:
                known.count += 1
                known.lines = lines
                known.last = line
        return printed

    def flush(self, now: float) -> Iterator[tuple[bool, str]]:
        """What to print of windows that are over; with `now` infinite, of all."""
        while self._known:
            oldest = next(iter(self._known))
            if now - self._known[oldest].since < WINDOW:
                return
            yield from self._close(oldest)

    def _close(self, key: str) -> list[tuple[bool, str]]:
        return self._report(self._known.pop(key))

    def _report(self, known: _Repeated) -> list[tuple[bool, str]]:
        if not known.count:
            return []
        text = _with_prefix(known.lines, known.last)
        if known.count > 1:
            hint = "" if self._has_hinted else " (HPCRAY_DEDUP_LOGS=0 shows every line)"
            self._has_hinted = True
            text += f" [repeated {known.count}x across cluster]{hint}"
        known.count = 0
        return [(known.lines.is_error, text)]

    @property
    def next_flush(self) -> float | None:
        """When a window ends that has something to print."""
        return min((known.since + WINDOW for known in self._known.values() if known.count), default=None)


def _source(lines: LogLines) -> tuple[str, int]:
    return lines.host, lines.pid


def _with_prefix(lines: LogLines, line: str) -> str:
    if not lines.name:
        return f"hpcray: {line}"
    return f"({lines.name} pid={lines.pid}, host={lines.host}) {line}"
