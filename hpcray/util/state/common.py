"""The entries of `hpcray.util.state`: Ray's classes, as far as their fields have a meaning here."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


class State:
    """An entry. Its fields may also be read like those of a dictionary, as in Ray."""

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def get(self, name: str, default: Any = None) -> Any:
        """The field of this name."""
        return getattr(self, name, default)

    def asdict(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]


@dataclass
class TaskState(State):
    """A task, actor creation (`type` ACTOR_CREATION_TASK) or call of a method (ACTOR_TASK)."""

    task_id: str
    attempt_number: int
    name: str
    state: str
    job_id: str
    actor_id: str | None
    type: str
    func_or_class_name: str
    node_id: str | None
    worker_id: str | None
    worker_pid: int | None
    required_resources: dict[str, float] | None = None
    placement_group_id: str | None = None


@dataclass
class ActorState(State):
    """An actor."""

    actor_id: str
    class_name: str
    state: str
    job_id: str
    name: str
    node_id: str | None
    pid: int
    ray_namespace: str
    required_resources: dict[str, float] | None = None
    is_detached: bool | None = None
    placement_group_id: str | None = None
    num_restarts: str | None = None


@dataclass
class ObjectState(State):
    """An object, once per rank that knows it."""

    object_id: str
    object_size: int
    """Bytes."""
    reference_type: str
    """LOCAL_REFERENCE: a process holds it; USED_BY_PENDING_TASK, CAPTURED_IN_OBJECT, PINNED_IN_MEMORY likewise."""
    call_site: str
    """Who made it."""
    node_id: str
    is_where: str
    """primary, copy, spilled, mapped, inline, elsewhere, or pending."""


@dataclass
class NodeState(State):
    """A node, that is, a rank."""

    node_id: str
    node_ip: str
    is_head_node: bool
    state: str
    node_name: str
    resources_total: dict[str, float] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)


@dataclass
class WorkerState(State):
    """A process of the job: a driver or a worker."""

    worker_id: str
    is_alive: bool
    worker_type: str
    node_id: str
    ip: str
    pid: int


@dataclass
class PlacementGroupState(State):
    """A placement group."""

    placement_group_id: str
    name: str
    state: str
    bundles: list[dict[str, Any]] | None = None
    stats: dict[str, Any] | None = None


@dataclass
class JobState(State):
    """The job of one driver."""

    job_id: str
    type: str
    status: str
    driver_info: dict[str, str]
