"""How values of certain classes are pickled. Names and semantics are Ray's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hpcray.worker.serialization import reducers


def register_serializer(cls: type, *, serializer: Callable[[Any], Any], deserializer: Callable[[Any], Any]) -> None:
    """Pickle what this process sends of the class by functions of your own; others unpickle it without being told.

    Exactly this class, not those derived from it. A worker that sends such values must register it, too.

    Args:
        cls: A class.
        serializer: Makes of an instance something that can be pickled.
        deserializer: Makes of that an instance again.
    """
    reducers[cls] = lambda value: (deserializer, (serializer(value),))


def deregister_serializer(cls: type) -> None:
    """Pickle the class as ever from now on; harmless if it was not registered."""
    reducers.pop(cls, None)
