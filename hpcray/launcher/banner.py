"""Takes Open MPI's six lines about a non-zero exit code out of its stderr. Pure.

    --------------------------------------------------------------------------
    prterun detected that one or more processes exited with non-zero status,
    thus causing the job to be terminated. The first process to do so was:

       Process name: [prterun-host-5788@1,1]
       Exit code:    3
    --------------------------------------------------------------------------

The job's exit code says it already, and where it matters the script has said more. What mpirun has to say of
signals, hosts or options stays.
"""

from __future__ import annotations

import re

_RULE = re.compile(rb"-{60,}\r?\n")
_PART_OF_RULE = re.compile(rb"-+\r?")
_HEADLINE = b"detected that one or more processes exited with non-zero status"
_LAST_FACT = b"Exit code:"
_LONGEST = 12  # lines; what has not ended by then is something else


class BannerFilter:
    """Passes bytes through, but for the banner; holds back what may be its beginning until that is clear."""

    def __init__(self) -> None:
        self._lines: list[bytes] = []  # held, whole: a rule, a headline, …
        self._unfinished = b""  # held, the beginning of a line
        self._mid_line = False  # the beginning of the current line is out already

    @property
    def holds(self) -> bool:
        """Whether bytes are held back that `flush` would give."""
        return bool(self._lines or self._unfinished)

    def feed(self, data: bytes) -> bytes:
        """What may be shown now that `data` has come."""
        if not self.holds and b"-" * 60 not in data and not data.endswith((b"-", b"-\r")):
            if data:
                self._mid_line = not data.endswith(b"\n")
            return data
        *lines, unfinished = (self._unfinished + data).split(b"\n")
        self._unfinished = b""
        out = b"".join([self._judge(line + b"\n") for line in lines])
        if not unfinished:
            return out
        if self._lines or (not self._mid_line and _PART_OF_RULE.fullmatch(unfinished)):
            self._unfinished = unfinished
            return out
        self._mid_line = True
        return out + unfinished

    def flush(self) -> bytes:
        """What is held back, after a while without more, or at the end."""
        held = b"".join(self._lines) + self._unfinished
        self._mid_line = self._mid_line or bool(self._unfinished)
        self._lines, self._unfinished = [], b""
        return held

    def _judge(self, line: bytes) -> bytes:
        """Hold this line, drop the banner that it completes, or give what is now known to be another's."""
        if self._mid_line:
            self._mid_line = False
            return line
        is_rule = _RULE.fullmatch(line) is not None
        if not self._lines:
            if not is_rule:
                return line
            self._lines = [line]
            return b""
        if len(self._lines) == 1 and _HEADLINE not in line:
            other = b"".join(self._lines)
            self._lines = []
            return other + self._judge(line)
        self._lines.append(line)
        if is_rule and any(_LAST_FACT in held for held in self._lines):
            self._lines = []
        elif is_rule or len(self._lines) > _LONGEST:
            other = b"".join(self._lines)
            self._lines = []
            return other
        return b""
