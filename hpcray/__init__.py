"""hpcray is Ray as one MPI job: tasks, actors and objects on all nodes of an `mpirun` or Slurm allocation.

Importing this package starts nothing and loads little: names are resolved when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_ORIGINS = {
    "init": "hpcray.api",
    "shutdown": "hpcray.api",
    "is_initialized": "hpcray.api",
    "remote": "hpcray.api",
    "get": "hpcray.api",
    "put": "hpcray.api",
    "wait": "hpcray.api",
    "kill": "hpcray.api",
    "get_actor": "hpcray.api",
    "nodes": "hpcray.api",
    "cluster_resources": "hpcray.api",
    "available_resources": "hpcray.api",
    "get_gpu_ids": "hpcray.api",
    "as_ray": "hpcray.ray_alias",
    "method": "hpcray.actors.actor_class",
    "get_runtime_context": "hpcray.runtime_context",
    "ObjectRef": "hpcray.object_ref",
}
_MODULES = ("actor", "exceptions", "runtime_context", "runtime_env", "util")

__all__ = [*_ORIGINS, "exceptions", "__version__"]

if TYPE_CHECKING:
    from hpcray import exceptions as exceptions
    from hpcray import runtime_env as runtime_env
    from hpcray.actors.actor_class import method as method
    from hpcray.api import (
        available_resources as available_resources,
    )
    from hpcray.api import (
        cluster_resources as cluster_resources,
    )
    from hpcray.api import (
        get as get,
    )
    from hpcray.api import (
        get_actor as get_actor,
    )
    from hpcray.api import (
        get_gpu_ids as get_gpu_ids,
    )
    from hpcray.api import (
        init as init,
    )
    from hpcray.api import (
        is_initialized as is_initialized,
    )
    from hpcray.api import (
        kill as kill,
    )
    from hpcray.api import (
        nodes as nodes,
    )
    from hpcray.api import (
        put as put,
    )
    from hpcray.api import (
        remote as remote,
    )
    from hpcray.api import (
        shutdown as shutdown,
    )
    from hpcray.api import (
        wait as wait,
    )
    from hpcray.object_ref import ObjectRef as ObjectRef
    from hpcray.ray_alias import as_ray as as_ray
    from hpcray.runtime_context import get_runtime_context as get_runtime_context


def __getattr__(name: str) -> Any:
    if name in _ORIGINS:
        value = getattr(importlib.import_module(_ORIGINS[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"hpcray.{name}")
    else:
        raise AttributeError(f"module 'hpcray' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
