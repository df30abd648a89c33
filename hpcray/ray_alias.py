"""`hpcray.as_ray()`: programs and libraries that say `import ray` get hpcray.

A finder at the head of `sys.meta_path` makes thin modules of Ray's names. What they hold is looked up in hpcray when it is
used; a name that Ray has and hpcray has not is refused with a text that says so. A driver's workers do as the driver does
(`protocol.messages.JobConfig`).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

RAY_VERSION = "2.60.0"
"""The Ray whose API hpcray follows: `ray.__version__`, which libraries compare with what they need."""

_MODULES = {
    "ray": "hpcray",
    "ray._raylet": "hpcray.object_ref",  # where `ObjectRef` says that it is from: libraries compare with it there
    "ray.actor": "hpcray.actor",
    "ray.cloudpickle": "cloudpickle",
    "ray.exceptions": "hpcray.exceptions",
    "ray.remote_function": "hpcray.remote_function",
    "ray.runtime_context": "hpcray.runtime_context",
    "ray.util": "hpcray.util",
}
"""Where Ray's modules are in hpcray. What lies below `ray.util` is found below `hpcray.util` without being named here."""


class NotInHpcrayError(ModuleNotFoundError):
    """The module is part of Ray, but not of hpcray. An ImportError, so that libraries for which it is optional go on."""


class NameNotInHpcrayError(AttributeError):
    """The name is part of Ray, but not of hpcray. An AttributeError, so that `hasattr` and `getattr` work."""


def as_ray() -> None:
    """Let `import ray`, here and in this driver's workers, mean hpcray, also where Ray itself is installed.

    Call it before anything imports `ray` and before `init()`; `hpcray run --as-ray` does so before the script starts.
    Calling it again is harmless.

    Raises:
        RuntimeError: Ray itself has been imported already, or this process is connected to a job.
    """
    if is_installed():
        return
    from hpcray.client import current_client

    if current_client() is not None:
        raise RuntimeError(
            "hpcray.as_ray() comes too late: call it before hpcray.init(), so that workers do as the driver"
        )
    if "ray" in sys.modules:
        origin = getattr(sys.modules["ray"], "__file__", None) or "an unknown place"
        raise RuntimeError(
            f"hpcray.as_ray() comes too late: ray has been imported already, from {origin}; call it before whatever "
            "imports ray, or start the script with: hpcray run --as-ray script.py"
        )
    install()


def install() -> None:
    """As `as_ray`, unchecked: what a worker does whose driver did."""
    if not is_installed():
        sys.meta_path.insert(0, _Finder())


def is_installed() -> bool:
    """Whether `import ray` means hpcray in this process."""
    return any(isinstance(finder, _Finder) for finder in sys.meta_path)


class _Finder:
    """Finds `ray` and all below it, and says which version it is."""

    def find_spec(self, name: str, _path: Sequence[str] | None = None, _target: ModuleType | None = None) -> Any:
        if name != "ray" and not name.startswith("ray."):
            return None
        target = target_of(name)
        if target is None:
            # With a `name`, `from ray import …` would swallow this for a text of its own.
            raise NotInHpcrayError(_refusal(name))
        spec = ModuleSpec(name, _Loader(target), origin=f"hpcray, as {target}", is_package=True)  # type: ignore[arg-type]
        spec.submodule_search_locations = []
        return spec

    def find_distributions(self, context: Any) -> list[Any]:
        """What `importlib.metadata.version("ray")` asks."""
        if context.name is None or context.name.lower() != "ray":
            return []
        from hpcray.launcher.ray_distribution import RayDistribution  # what it imports is slow, and seldom wanted

        return [RayDistribution()]


class _Loader:
    def __init__(self, target: str) -> None:
        self._target = target

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        # cloudpickle knows modules by their exact type: so this is a plain one, with functions of its own.
        name, target = module.__name__, importlib.import_module(self._target)
        module.__doc__ = target.__doc__
        names = vars(module)

        def look_up(attribute: str) -> Any:
            if attribute.startswith("__") and attribute.endswith("__") and attribute != "__all__":
                raise AttributeError(f"module {name!r} has no attribute {attribute!r}")
            if (inner := f"{name}.{attribute}") in _MODULES:
                return importlib.import_module(inner)
            if attribute not in _public_names(target):
                raise NameNotInHpcrayError(_refusal(inner))
            value = getattr(target, attribute)
            if isinstance(value, ModuleType) and target_of(inner) == value.__name__:
                value = importlib.import_module(inner)
            names[attribute] = value
            return value

        names["__getattr__"] = look_up
        names["__dir__"] = lambda: sorted({*names, *_public_names(target)})
        for attribute in _public_names(target):
            if f"{self._target}.{attribute}" in sys.modules and not isinstance(getattr(target, attribute), ModuleType):
                # A function named like its module: once that is imported, the function takes its place for good.
                importlib.import_module(f"{name}.{attribute}")
                names[attribute] = getattr(target, attribute)
        if name == "ray":
            module.__version__ = RAY_VERSION  # type: ignore[attr-defined]


def _public_names(module: ModuleType) -> set[str]:
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return {*listed, "__all__"}
    return {name for name in dir(module) if not name.startswith("_")}


def target_of(name: str) -> str | None:
    """The module of hpcray that stands in for this one of Ray's, if there is one."""
    if name in _MODULES:
        return _MODULES[name]
    if not name.startswith("ray.util.") or any(part.startswith("_") for part in name.split(".")):
        return None
    target = f"hpc{name}"
    try:
        found = find_spec(target)
    except ModuleNotFoundError:
        return None
    return target if found is not None else None


def _refusal(name: str) -> str:
    if any(part.startswith("_") for part in name.split(".")):
        return (
            f"{name} is private to Ray, and hpcray has nothing like it: programs need Ray's public API to run on hpcray"
        )
    return (
        f"{name} is not part of hpcray, which stands in for ray here ('hpcray doctor --ray-api' lists what is); "
        "what needs it needs Ray itself"
    )
