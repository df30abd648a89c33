"""Utilities under Ray's names."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# A module of the same name is no substitute for the function, and importing it later would put it in its place.
from hpcray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

_ORIGINS = {
    "ActorPool": "actor_pool",
    "as_completed": "helpers",
    "deregister_serializer": "serialization",
    "disable_log_once_globally": "debug",
    "enable_periodic_logging": "debug",
    "get_node_ip_address": "hosts",
    "inspect_serializability": "check_serialize",
    "list_named_actors": "hosts",
    "log_once": "debug",
    "map_unordered": "helpers",
    "register_serializer": "serialization",
}
_MODULES = ("accelerators",)

__all__ = [
    "ActorPool",
    "PlacementGroup",
    "accelerators",
    "as_completed",
    "deregister_serializer",
    "disable_log_once_globally",
    "enable_periodic_logging",
    "get_current_placement_group",
    "get_node_ip_address",
    "get_placement_group",
    "inspect_serializability",
    "list_named_actors",
    "log_once",
    "map_unordered",
    "placement_group",
    "placement_group_table",
    "register_serializer",
    "remove_placement_group",
]

if TYPE_CHECKING:
    from hpcray.util import accelerators
    from hpcray.util.actor_pool import ActorPool
    from hpcray.util.check_serialize import inspect_serializability
    from hpcray.util.debug import disable_log_once_globally, enable_periodic_logging, log_once
    from hpcray.util.helpers import as_completed, map_unordered
    from hpcray.util.hosts import get_node_ip_address, list_named_actors
    from hpcray.util.serialization import deregister_serializer, register_serializer


def __getattr__(name: str) -> Any:
    if name in _ORIGINS:
        value = getattr(importlib.import_module(f"hpcray.util.{_ORIGINS[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"hpcray.util.{name}")
    else:
        raise AttributeError(f"module 'hpcray.util' has no attribute {name!r}")
    globals()[name] = value
    return value
