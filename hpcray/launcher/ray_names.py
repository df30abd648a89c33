"""The public names of the Ray that is installed, for `hpcray doctor --ray-api`. Needs nothing but Ray.

``python hpcray/launcher/ray_names.py`` writes them to `ray_api.json` beside this file, for environments without Ray.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

SAVED = Path(__file__).with_name("ray_api.json")
MODULES = (
    "ray", "ray.actor", "ray.exceptions", "ray.runtime_context", "ray.runtime_env", "ray.types", "ray.util",
    "ray.util.accelerators", "ray.util.actor_pool", "ray.util.annotations", "ray.util.collective", "ray.util.joblib",
    "ray.util.metrics", "ray.util.multiprocessing", "ray.util.placement_group", "ray.util.queue",
    "ray.util.scheduling_strategies", "ray.util.serialization", "ray.util.state",
)  # fmt: skip
"""Modules of Ray's core whose public names are compared one by one."""
CLASSES = ("ray.ObjectRef", "ray.actor.ActorClass", "ray.actor.ActorHandle", "ray.actor.ActorMethod")
"""Public ones that their module does not list, or that are not written in Python."""
LIBRARIES = (
    "ray.air", "ray.autoscaler", "ray.dag", "ray.data", "ray.experimental", "ray.job_submission", "ray.rllib", "ray.serve",
    "ray.train", "ray.tune", "ray.util.dask", "ray.util.spark", "ray.workflow",
)  # fmt: skip
"""Modules that are there or not; what is in them is not compared."""
_UNTOLD = frozenset({"from_bytes", "to_bytes", "from_ray_exception", "from_random", "from_hex", "nil", "size"})
"""Methods with which Ray's own parts talk to each other."""

Description = Mapping[str, Any]
"""The kind of a name, and what is compared of it."""


def collect() -> dict[str, Any]:
    """The public names of the Ray that is installed.

    Raises:
        ImportError: None is.
    """
    api: dict[str, dict[str, Description]] = {}
    for module in MODULES:
        try:
            value = importlib.import_module(module)
        except ImportError:
            if module == "ray":
                raise
            continue  # what this module needs is not installed
        api[module] = {name: describe(getattr(value, name)) for name in sorted(_public_names(value))}
    for path in CLASSES:
        module, _, name = path.rpartition(".")
        api[module][name] = describe(getattr(importlib.import_module(module), name))
    api["ray"] |= {library.removeprefix("ray."): {"kind": "library"} for library in LIBRARIES}
    # The one table of them; it has no public place.
    table = importlib.import_module("ray._common.ray_option_utils")
    for kind, options in (("functions", table.task_options), ("actors", table.actor_options)):
        api[f"options of {kind}"] = {name: {"kind": "option"} for name in sorted(options) if not name.startswith("_")}
    version: str = importlib.import_module("ray").__version__
    return {"version": version, "api": api}


def _public_names(module: ModuleType) -> Iterator[str]:
    names: Iterable[str] = getattr(module, "__all__", None) or vars(module)
    for name in names:
        if name.startswith("_") or f"{module.__name__}.{name}" in LIBRARIES:
            continue
        value = getattr(module, name, None)
        if value is None or isinstance(value, (ModuleType, TypeVar)):  # Ray 2.60 lists a name that it does not have
            continue
        if hasattr(module, "__all__") or getattr(value, "__module__", None) == module.__name__:
            yield name


def describe(value: Any) -> Description:
    """What is compared: parameters of a function, bases of an exception, public methods of other classes."""
    if inspect.isclass(value):
        if issubclass(value, BaseException):
            return {
                "kind": "exception",
                "bases": [base.__name__ for base in value.__mro__ if base not in (value, object)],
            }
        members = [name for name in dir(value) if not name.startswith("_") and name not in _UNTOLD]
        return {"kind": "class", "members": members}
    if callable(value):
        try:
            parameters = inspect.signature(value).parameters.values()
        except (TypeError, ValueError):
            return {"kind": "function", "parameters": []}
        named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        return {"kind": "function", "parameters": [name for name in named if not name.startswith("_")]}
    return {"kind": "value"}


def as_json(known: Mapping[str, Any]) -> str:
    """One line for each name."""
    modules = []
    for module, names in known["api"].items():
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(description)}" for name, description in names.items())
        modules.append(f" {json.dumps(module)}: {{\n{lines}\n }}")
    return f'{{"version": {json.dumps(known["version"])}, "api": {{\n' + ",\n".join(modules) + "\n}}\n"


if __name__ == "__main__":
    SAVED.write_text(as_json(collect()))
