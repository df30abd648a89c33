"""What ranks tell of tasks, actors and processes to `hpcray.util.state`. Pure; nothing that is over is in here."""

from __future__ import annotations

import msgspec

PENDING_ARGS = "PENDING_ARGS_AVAIL"
PENDING_NODE = "PENDING_NODE_ASSIGNMENT"
PENDING_FETCH = "PENDING_ARGS_FETCH"
PENDING_ORDER = "PENDING_ACTOR_TASK_ORDERING_OR_CONCURRENCY"
SUBMITTED = "SUBMITTED_TO_WORKER"
RUNNING = "RUNNING"
IN_GET = "RUNNING_IN_RAY_GET"
IN_WAIT = "RUNNING_IN_RAY_WAIT"
STAGES = (PENDING_ARGS, PENDING_NODE, PENDING_FETCH, PENDING_ORDER, SUBMITTED, RUNNING, IN_GET, IN_WAIT)
"""States of a task under Ray's names, in order: of what several ranks say, the last one holds."""

TASK, CREATION, CALL = "NORMAL_TASK", "ACTOR_CREATION_TASK", "ACTOR_TASK"
"""Kinds of tasks under Ray's names."""


class TaskReport(msgspec.Struct, frozen=True, kw_only=True):
    """A task, actor creation or call, as one rank knows it."""

    id: bytes
    rank: int
    state: str
    kind: str
    name: str
    job: str
    attempt: int = 0
    actor: bytes = b""
    runs_on: int = -1
    """The rank that it was given to; -1: none."""
    worker: str = ""
    pid: int = 0
    resources: dict[str, float] = {}
    group: bytes = b""


class ActorReport(msgspec.Struct, frozen=True, kw_only=True):
    """An actor: as the GCS knows it, or, with `is_part`, what another rank adds."""

    id: bytes
    state: str
    class_name: str
    job: str
    name: str = ""
    namespace: str = ""
    rank: int = -1
    pid: int = 0
    restarts: int = 0
    is_detached: bool = False
    is_part: bool = False
    resources: dict[str, float] = {}
    group: bytes = b""


class ProcessReport(msgspec.Struct, frozen=True, kw_only=True):
    """A driver or worker."""

    id: str
    rank: int
    pid: int
    is_driver: bool
    job: str
    namespace: str = ""
