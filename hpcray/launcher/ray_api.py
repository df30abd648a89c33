"""`hpcray doctor --ray-api`: which of Ray's public names hpcray has.

The names come from the Ray that is installed, else from a list of them (`ray_names.py`).
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any, Literal, NamedTuple

from hpcray import ray_alias
from hpcray.launcher.ray_names import SAVED, Description, collect, describe
from hpcray.options import OPTIONS

Status = Literal["supported", "different", "missing"]
Api = Mapping[str, Mapping[str, Description]]
"""Names by module."""


class Row(NamedTuple):
    """One public name of Ray's."""

    module: str
    name: str
    status: Status
    detail: str = ""


def compare(api: Api) -> list[Row]:
    """Each name of Ray's, and whether hpcray has it."""
    return [_row(module, name, known) for module, names in api.items() for name, known in sorted(names.items())]


def _row(module: str, name: str, known: Description) -> Row:
    if known["kind"] == "option":
        has_it = name in OPTIONS[module.removeprefix("options of ")]
        return Row(module, name, "supported" if has_it else "missing")
    if (target := ray_alias.target_of(module)) is None:
        return Row(module, name, "missing")
    value = getattr(importlib.import_module(target), name, None)
    if value is None or (known["kind"] == "library") is not isinstance(value, ModuleType):
        return Row(module, name, "missing")
    ours = describe(value)
    if known["kind"] == "function":
        lacks = [] if _takes_any(value) else _without(known["parameters"], ours.get("parameters", []))
        return _judged(module, name, "parameters", lacks)
    if known["kind"] == "class":
        return _judged(module, name, "members", _without(known["members"], ours.get("members", [])))
    if known["kind"] == "exception":
        return _judged(module, name, "bases", _without(known["bases"], ours.get("bases", [])))
    return Row(module, name, "supported")


def _takes_any(value: Any) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(value).parameters.values())


def _without(theirs: Iterable[str], ours: Iterable[str]) -> list[str]:
    return [name for name in theirs if name not in set(ours)]


def _judged(module: str, name: str, what: str, lacks: list[str]) -> Row:
    if not lacks:
        return Row(module, name, "supported")
    return Row(module, name, "different", f"lacks the {what} {', '.join(lacks)}")


# ------------------------------------------------------------------------------------------------------- the report
def load() -> tuple[dict[str, Any], str]:
    """Ray's names, and where they come from."""
    try:
        known = collect()
    except ImportError:
        known = json.loads(SAVED.read_text())
        return known, f"Ray {known['version']} (no Ray is installed here: from hpcray's list)"
    return known, f"Ray {known['version']}, installed here"


def report() -> int:
    """Print the table; the exit code."""
    known, origin = load()
    sys.stdout.write(render(compare(known["api"]), origin))
    return 0


def render(rows: Iterable[Row], origin: str) -> str:
    """The table, and how many names have which status."""
    rows = list(rows)
    width = max(len(_full(row)) for row in rows)
    lines = [f"public names of {origin}, in hpcray:", ""]
    lines += [f"{row.status:<9}  {_full(row):<{width}}  {row.detail}".rstrip() for row in rows]
    counts = Counter(row.status for row in rows)
    told = ", ".join(f"{counts[status]} {status}" for status in ("supported", "different", "missing"))
    return "\n".join([*lines, "", f"{len(rows)} names: {told}"]) + "\n"


def _full(row: Row) -> str:
    return f"{row.name} ({row.module})" if row.module.startswith("options") else f"{row.module}.{row.name}"
