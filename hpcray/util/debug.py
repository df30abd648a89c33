"""Messages that are worth saying once. Names and semantics are Ray's."""

from __future__ import annotations

import time

PERIOD = 60.0
"""Seconds after which, with periodic logging, everything may be said again."""


class _Said:
    def __init__(self) -> None:
        self.keys: set[str] = set()
        self.at = 0.0
        self.is_disabled = False
        self.is_periodic = False


_said = _Said()


def log_once(key: str) -> bool:
    """True for the first call with this key in this process: `if log_once("slow"): logger.warning(…)`."""
    if _said.is_disabled:
        return False
    if key not in _said.keys:
        _said.keys.add(key)
        _said.at = time.time()
        return True
    if _said.is_periodic and time.time() - _said.at > PERIOD:
        _said.keys.clear()
        _said.at = time.time()
    return False


def disable_log_once_globally() -> None:
    """Have `log_once` return False from now on."""
    _said.is_disabled = True


def enable_periodic_logging() -> None:
    """Have `log_once` forget what was said once a minute."""
    _said.is_periodic = True


def reset_log_once(key: str | None = None) -> None:
    """Have `log_once` forget this key; all, for None."""
    if key is None:
        _said.keys.clear()
    else:
        _said.keys.discard(key)
