"""Patterns of .gitignore files: which paths of a directory are left out. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable


class Patterns:
    """The lines of one ignore file, for paths relative to its directory."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._rules = [rule for line in lines if (rule := _rule(line)) is not None]

    def match(self, path: str, *, is_dir: bool) -> bool:
        """Whether the path (with ``/`` between its parts) is left out: the last pattern that fits decides."""
        ignored = False
        for expression, only_dirs, keeps in self._rules:
            if (is_dir or not only_dirs) and expression.fullmatch(path):
                ignored = not keeps
        return ignored


_Rule = tuple[re.Pattern[str], bool, bool]
"""Expression, whether for directories only, whether what fits is kept after all."""


def _rule(line: str) -> _Rule | None:
    line = re.sub(r"(?<!\\)\s+$", "", line.rstrip("\r\n"))
    if not line or line.startswith("#"):
        return None
    keeps = line.startswith("!")
    pattern = line[1:] if keeps else line.removeprefix("\\") if line[:2] in ("\\#", "\\!") else line
    only_dirs = pattern.endswith("/")
    pattern = pattern.rstrip("/")
    # A slash in the beginning or middle ties the pattern to the file's own directory.
    anchored = "/" in pattern
    pattern = pattern.removeprefix("/")
    if not pattern:
        return None
    prefix = "" if anchored else "(?:.*/)?"
    return re.compile(prefix + _translate(pattern), re.DOTALL), only_dirs, keeps


def _translate(pattern: str) -> str:
    parts: list[str] = []
    position = 0
    while position < len(pattern):
        rest = pattern[position:]
        if rest.startswith("**/"):
            parts.append("(?:.*/)?")
            position += 3
        elif rest == "**":
            parts.append(".*")
            position += 2
        elif rest[0] == "*":
            parts.append("[^/]*")
            position += len(rest) - len(rest.lstrip("*"))
        elif rest[0] == "?":
            parts.append("[^/]")
            position += 1
        elif rest[0] == "[" and (end := rest.find("]", 2)) > 0:
            inner = rest[1:end].replace("\\", "\\\\")
            parts.append(f"[^{inner[1:]}]" if inner[0] in "!^" else f"[{inner}]")
            position += end + 1
        elif rest[0] == "\\" and len(rest) > 1:
            parts.append(re.escape(rest[1]))
            position += 2
        else:
            parts.append(re.escape(rest[0]))
            position += 1
    return "".join(parts)
