"""Why something cannot be pickled. Names and semantics are Ray's."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple, TextIO

from hpcray.worker.serialization import pickle_value


class FailureTuple(NamedTuple):
    """What could not be pickled, and where it was found."""

    obj: Any
    path: tuple[str, ...]
    """Names of variables and attributes that lead to it."""
    parent: Any
    """What refers to it."""

    def __hash__(self) -> int:
        return hash((id(self.obj), self.path))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FailureTuple) and other.obj is self.obj and other.path == self.path

    def __repr__(self) -> str:
        name = self.path[-1] if self.path else "unknown"
        return f"FailTuple({name} [path={' -> '.join(self.path)}, obj={self.obj}, parent={self.parent}])"


def inspect_serializability(
    base_obj: Any, name: str | None = None, depth: int = 3, print_file: TextIO | None = None
) -> tuple[bool, set[FailureTuple]]:
    """Find out, and print, what in a value keeps it from being pickled.

    Args:
        base_obj: Anything.
        name: What to call it.
        depth: How many steps from it to look.
        print_file: Where to print; None: stdout.

    Returns:
        Whether it can be pickled; if not, also what is to blame: the innermost parts found.
    """
    print(f"Checking Serializability of {base_obj!r:.200}", file=print_file)
    failures: set[FailureTuple] = set()
    error = _error_of(base_obj)
    if error is None:
        return True, failures
    _search(base_obj, () if name is None else (name,), None, depth, error, failures, print_file)
    names = ", ".join(repr(failure) for failure in failures)
    print(f"Not serializable: {names}. There may be others. Create such objects in the task instead.", file=print_file)
    return False, failures


def _search(
    value: Any,
    path: tuple[str, ...],
    parent: Any,
    depth: int,
    error: Exception,
    failures: set[FailureTuple],
    print_file: TextIO | None,
) -> None:
    print(f"{'    ' * len(path)}!!! FAIL {path[-1] if path else ''} {value!r:.100}: {error}", file=print_file)
    if depth > 0:
        for name, part in _parts(value):
            if (inner := _error_of(part)) is not None:
                _search(part, (*path, name), value, depth - 1, inner, failures, print_file)
                return  # the first one found, as in Ray
    failures.add(FailureTuple(value, path, parent))


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if inspect.isfunction(value):
        captured = inspect.getclosurevars(value)
        yield from captured.globals.items()
        yield from captured.nonlocals.items()
        return
    if isinstance(value, dict):
        yield from ((repr(key), part) for key, part in value.items())
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from ((f"[{index}]", part) for index, part in enumerate(value))
    yield from inspect.getmembers(value, inspect.isfunction)
    for name, part in inspect.getmembers(value):
        if not (name.startswith("__") and name.endswith("__")) and not inspect.isbuiltin(part):
            yield name, part


def _error_of(value: Any) -> Exception | None:
    try:
        pickle_value(value)
    except Exception as error:
        return error
    return None
