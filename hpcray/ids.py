"""Identifiers, all plain `bytes`, so that they travel and hash as fast as Python can.

    TaskId    24 bytes: home rank (2) · job nonce (8) · client (4) · counter (10), big-endian
    ObjectId  28 bytes: TaskId (24) · index (4); index 0 is a `put` or an actor's handle, returns count from 1
    ActorId   24 bytes: the TaskId of the actor's creation; users see the 16 bytes of `shown_actor`

Sizes of what users see are Ray's, since programs print and slice them.
The home of an object is read from its id, so nobody has to be asked for it. The nonce is drawn once per job:
a reference that outlived its job is recognised instead of naming some other object.
"""

from __future__ import annotations

import os
from typing import NewType

TaskId = NewType("TaskId", bytes)
ObjectId = NewType("ObjectId", bytes)
ActorId = NewType("ActorId", bytes)

TASK_ID_SIZE = 24
OBJECT_ID_SIZE = 28
PREFIX_SIZE = 14
NONCE_SIZE = 8


def new_nonce() -> bytes:
    """Random bytes that tell one job from the next."""
    return os.urandom(NONCE_SIZE)


def client_prefix(rank: int, nonce: bytes, client: int) -> bytes:
    """The first bytes of every id that this client will make."""
    return rank.to_bytes(2, "big") + nonce + client.to_bytes(4, "big")


def task_id(prefix: bytes, counter: int) -> TaskId:
    """The id of the client's `counter`-th task or put."""
    return TaskId(prefix + counter.to_bytes(10, "big"))


def object_id(task: bytes, index: int) -> ObjectId:
    """The id of a task's `index`-th return (from 1), or of a put or actor handle (0)."""
    return ObjectId(task + index.to_bytes(4, "big"))


def home_of(identifier: bytes) -> int:
    """The rank whose raylet counts the references of this object and keeps the spec of this task."""
    return (identifier[0] << 8) | identifier[1]


def prefix_of(identifier: bytes) -> bytes:
    """Which client made this id: callers of an actor are told apart by it."""
    return identifier[:PREFIX_SIZE]


def nonce_of(identifier: bytes) -> bytes:
    """The job that this id belongs to."""
    return identifier[2 : 2 + NONCE_SIZE]


def task_of(identifier: bytes) -> TaskId:
    """The task that makes this object."""
    return TaskId(identifier[:TASK_ID_SIZE])


def client_of(identifier: bytes) -> int:
    """The number of the client that made this id, at its home."""
    return int.from_bytes(identifier[2 + NONCE_SIZE : PREFIX_SIZE], "big")


def index_of(identifier: bytes) -> int:
    """Which of its task's returns the object is, from 1; 0 for a put or an actor's handle."""
    return int.from_bytes(identifier[TASK_ID_SIZE:], "big")


def shown_actor(actor: bytes) -> bytes:
    """The id of an actor as users see it: as long as Ray's, and unique in its job."""
    return actor[:2] + actor[10:14] + actor[-10:]


def node_id(nonce: bytes, rank: int) -> str:
    """The hexadecimal id under which Ray's API shows a node."""
    return (nonce + rank.to_bytes(4, "big")).hex().ljust(2 * OBJECT_ID_SIZE, "0")


def rank_of_node(node: str) -> int:
    """Inverse of `node_id`.

    Raises:
        ValueError: Not an id made by `node_id`.
    """
    if len(node) != 2 * OBJECT_ID_SIZE:
        raise ValueError(f"not a node id: {node!r}")
    return int(node[2 * NONCE_SIZE : 2 * NONCE_SIZE + 8], 16)
