"""Which part of a value cannot be pickled, for error messages."""

from __future__ import annotations

import inspect
from typing import Any

from hpcray.worker.serialization import pickle_value

MAX_DEPTH = 4


def explain(value: Any, error: Exception) -> str:
    """The error's text and, where it can be found, the attribute, item or captured variable behind it."""
    path = _find(value, "", MAX_DEPTH)
    return f"{error}" + (f" (because of {path})" if path else "")


def _find(value: Any, path: str, depth: int) -> str | None:
    for name, part in _parts(value):
        if _fails(part):
            inner = _find(part, path + name, depth - 1) if depth else None
            return inner or f"{(path + name).lstrip('.')} = {part!r:.80}"
    return None


def _parts(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [(f"[{key!r}]", part) for key, part in value.items()]
    if isinstance(value, (list, tuple, set, frozenset)):
        return [(f"[{index}]", part) for index, part in enumerate(value)]
    if inspect.isfunction(value):
        captured = inspect.getclosurevars(value)
        return [(f".{name}", part) for name, part in (*captured.nonlocals.items(), *captured.globals.items())]
    return [(f".{name}", part) for name, part in getattr(value, "__dict__", {}).items()]


def _fails(value: Any) -> bool:
    try:
        pickle_value(value)
    except Exception:
        return True
    return False
