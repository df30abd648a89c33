"""The arguments of a call: packed by the caller, unpacked by the worker.

References that are themselves arguments are *dependencies*: the worker gets their values. References inside
other values stay references. Large plain arguments are put into the store first and so become dependencies
too; what is left is pickled as one payload, with a slot where each dependency goes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hpcray.client import Client
from hpcray.object_ref import ObjectRef
from hpcray.protocol import messages as m
from hpcray.worker.inspection import explain
from hpcray.worker.serialization import deserialize, serialize


class Slot:
    """Stands for the `index`-th dependency in pickled arguments."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index

    def __reduce__(self) -> Any:
        return Slot, (self.index,)


class PackedArguments:
    """What a message says of its arguments, and the references that must live until it is sent."""

    __slots__ = ("data", "dependencies", "keep", "nested")

    def __init__(self, data: bytes, dependencies: list[bytes], nested: list[bytes], keep: list[Any]) -> None:
        self.data = data
        self.dependencies = dependencies
        self.nested = nested
        self.keep = keep


NO_ARGUMENTS = PackedArguments(b"", [], [], [])


def pack_arguments(client: Client, name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> PackedArguments:
    """Pickle the arguments of a call to `name`.

    Raises:
        TypeError: An argument cannot be pickled; the message names it and what in it is to blame.
    """
    if not arguments and not options:
        return NO_ARGUMENTS
    dependencies: list[bytes] = []
    keep: list[Any] = []

    def place(value: Any) -> Any:
        if isinstance(value, ObjectRef):
            ref = value
        elif _is_large(value, client.inline_limit):
            ref = client.put(serialize(value))
        else:
            return value
        keep.append(ref)
        dependencies.append(ref.binary())
        return Slot(len(dependencies) - 1)

    packed = (
        tuple(place(value) for value in arguments),
        {key: place(value) for key, value in options.items()},
    )
    try:
        serialized = serialize(packed)
    except Exception as error:
        raise _name_the_culprit(name, arguments, options, error) from error
    if serialized.size <= client.inline_limit:
        return PackedArguments(serialized.to_bytes(), dependencies, serialized.nested, keep)
    whole = client.put(serialized)
    keep.append(whole)
    dependencies.append(whole.binary())
    # The payload itself is the last dependency; the references inside it are held by the object that it has
    # become.
    return PackedArguments(b"\xff", dependencies, [], keep)


def unpack_arguments(
    data: bytes, values: list[m.Value], load: Callable[[m.Value], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, with every slot filled by `load(value)`."""
    if data == b"\xff":
        arguments, options = load(values[-1])
        values = values[:-1]
    else:
        arguments, options = deserialize(data)
    if not values:
        return arguments, options

    def fill(value: Any) -> Any:
        return load(values[value.index]) if type(value) is Slot else value

    return tuple(fill(value) for value in arguments), {key: fill(value) for key, value in options.items()}


def _is_large(value: Any, limit: int) -> bool:
    if isinstance(value, (bytes, bytearray, memoryview, str)):
        return len(value) > limit
    size = getattr(type(value), "nbytes", None)
    return size is not None and isinstance(value.nbytes, int) and value.nbytes > limit


def _name_the_culprit(name: str, arguments: tuple[Any, ...], options: dict[str, Any], error: Exception) -> TypeError:
    for value in (*arguments, *options.values()):
        try:
            serialize(value)
        except Exception as own:
            return TypeError(f"could not serialize the argument {value!r} of {name}: {explain(value, own)}")
    return TypeError(f"could not serialize the arguments of {name}: {error}")
