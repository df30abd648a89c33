"""The bytes of an object: the first says how to read them. Raylets read them too: no pickle is opened.

byte 0     kind
PICKLE     the pickle follows
BUFFERS    a header (`_HEADER`), the sizes of the out-of-band buffers (u64 each), the pickle, then each buffer
           on a 64-byte boundary counted from the start of the payload
RAW        the bytes of a `bytes` object follow
TASK_ERROR a pickled exception follows
SYSTEM_ERROR  msgpack [class name, arguments] of an exception that a raylet made
DEPENDENCY_ERROR  msgpack [name of a task, payload of the error of one of its arguments]
CREATION_ERROR  msgpack [actor id in hexadecimal, class name, payload of the error of its creation]
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import msgspec

from hpcray.ids import shown_actor

PICKLE, BUFFERS, RAW, TASK_ERROR, SYSTEM_ERROR, DEPENDENCY_ERROR, CREATION_ERROR = 0, 1, 2, 16, 17, 18, 19
ALIGNMENT = 64
LARGE, PAGE = 1 << 20, 4096
"""Buffers from LARGE bytes begin on a page boundary, as large blocks of the arena do."""
NONE = bytes([PICKLE]) + b"\x80\x05N."
"""The payload of None, the most frequent result."""

_HEADER = struct.Struct("<B7xQQ")
"""Kind, number of buffers, length of the pickle."""


def is_error(payload: bytes) -> bool:
    """Whether the payload is an exception to raise rather than a value."""
    return payload[0] >= TASK_ERROR


def system_error(name: str, *arguments: Any) -> bytes:
    """The payload of an exception of hpcray's own; `name` is one of `exceptions.from_description`."""
    return bytes([SYSTEM_ERROR]) + msgspec.msgpack.encode([name, list(arguments)])


def dependency_error(name: str, inner: bytes) -> bytes:
    """The payload of a task's failure because of an argument that is an error."""
    return bytes([DEPENDENCY_ERROR]) + msgspec.msgpack.encode([name, inner])


def describe_dependency_error(payload: bytes) -> tuple[str, bytes]:
    """Inverse of `dependency_error`: the task's name and the argument's error."""
    name, inner = msgspec.msgpack.decode(payload[1:])
    return name, inner


def actor_died(actor: bytes, cls: str, why: str) -> bytes:
    """The payload of what calls to a dead actor raise.

    Args:
        actor: Its id.
        cls: The name of its class; empty where it is unknown.
        why: A sentence.
    """
    shown = shown_actor(actor).hex()
    return system_error("ActorDiedError", f"The actor {shown}{f' ({cls})' if cls else ''} died: {why}", shown)


def group_removed(group: bytes, name: str, *, is_actor: bool = False) -> bytes:
    """The payload of the failure of what was to run in a placement group that is gone."""
    # Ray's choice of classes.
    cls = "ActorUnschedulableError" if is_actor else "TaskPlacementGroupRemoved"
    return system_error(cls, f"{name} cannot run: its placement group {group.hex()} was removed")


def creation_error(actor: bytes, cls: str, inner: bytes) -> bytes:
    """The payload of what calls to an actor raise whose constructor or its arguments failed with `inner`."""
    return bytes([CREATION_ERROR]) + msgspec.msgpack.encode([shown_actor(actor).hex(), cls, inner])


def describe_creation_error(payload: bytes) -> tuple[str, str, bytes]:
    """Inverse of `creation_error`: actor id, class name, payload of the error."""
    actor_id, name, inner = msgspec.msgpack.decode(payload[1:])
    return actor_id, name, inner


def describe_system_error(payload: bytes) -> tuple[str, list[Any]]:
    """Inverse of `system_error`: class name and arguments."""
    name, arguments = msgspec.msgpack.decode(payload[1:])
    return name, arguments


def _aligned(position: int, size: int) -> int:
    # memcpy falls to a quarter of its speed where the target lies a little ahead of the source modulo the page: large
    # arrays begin 16 bytes into a page, so a page boundary is the best place for them.
    alignment = ALIGNMENT if size < LARGE else PAGE
    return -(-position // alignment) * alignment


def join_buffers(pickle: bytes, buffers: Sequence[memoryview]) -> list[bytes | memoryview]:
    """The parts of a payload of kind BUFFERS, to be laid end to end; the buffers are among them, uncopied."""
    sizes = [buffer.nbytes for buffer in buffers]
    head = _HEADER.pack(BUFFERS, len(sizes), len(pickle)) + struct.pack(f"<{len(sizes)}Q", *sizes) + pickle
    parts: list[bytes | memoryview] = [head]
    position = len(head)
    for size, buffer in zip(sizes, buffers, strict=True):
        start = _aligned(position, size)
        if start > position:
            parts.append(bytes(start - position))
        parts.append(buffer)
        position = start + size
    return parts


def split_buffers(payload: memoryview) -> tuple[memoryview, list[memoryview]]:
    """Inverse of `join_buffers`: the pickle and the buffers, all as views of the payload."""
    _, count, pickle_size = _HEADER.unpack_from(payload)
    sizes = struct.unpack_from(f"<{count}Q", payload, _HEADER.size)
    position = _HEADER.size + 8 * count
    pickle = payload[position : position + pickle_size]
    position += pickle_size
    buffers = []
    for size in sizes:
        position = _aligned(position, size)
        buffers.append(payload[position : position + size])
        position += size
    return pickle, buffers
