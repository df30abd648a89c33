"""Asks the job, and makes entries of what it says (see the package)."""

# ruff: noqa: A002, ARG001 - the parameters are Ray's

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import msgspec

import hpcray
from hpcray import ids
from hpcray.client import Client, require_client
from hpcray.ids import shown_actor
from hpcray.observe.states import STAGES, ActorReport, ProcessReport, TaskReport
from hpcray.observe.statistics import ObjectReport, ObjectsWanted
from hpcray.util.state.common import (
    ActorState,
    JobState,
    NodeState,
    ObjectState,
    PlacementGroupState,
    State,
    TaskState,
    WorkerState,
)

DEFAULT_LIMIT = 100
"""Entries of a list: Ray's default."""
DEFAULT_TIMEOUT = 30
"""Seconds in Ray; here a parameter without effect, as an answer takes milliseconds."""

Filter = tuple[str, str, Any]
"""A field, "=" or "!=", and a value: `("state", "=", "RUNNING")`. Strings are compared without regard to case."""


_S = TypeVar("_S", bound=State)


# -------------------------------------------------------------------------------------------------------------- lists
def list_tasks(
    address: str | None = None,
    filters: Sequence[Filter] | None = None,
    limit: int = DEFAULT_LIMIT,
    timeout: int = DEFAULT_TIMEOUT,
    detail: bool = False,
    raise_on_missing_output: bool = True,
) -> list[TaskState]:
    """Tasks that wait or run.

    Args:
        address: None: the job of this process. No other can be asked.
        filters: What must hold for an entry's fields.
        limit: At most so many entries.
        timeout: Without effect.
        detail: Whether the fields that default to None are filled in.
        raise_on_missing_output: Without effect: nothing is missing.

    Raises:
        ValueError: A filter that is none, or a field that there is not.
    """
    client = _client(address)
    return _selected(_tasks(client, detail=detail), TaskState, filters, limit)


def list_actors(
    address: str | None = None,
    filters: Sequence[Filter] | None = None,
    limit: int = DEFAULT_LIMIT,
    timeout: int = DEFAULT_TIMEOUT,
    detail: bool = False,
    raise_on_missing_output: bool = True,
) -> list[ActorState]:
    """Actors that live or wait. Arguments and errors as for `list_tasks`."""
    client = _client(address)
    reports = _ask(client, "actors", ActorReport)
    pids = {report.id: report.pid for report in reports if report.is_part}
    found = [
        ActorState(
            actor_id=shown_actor(report.id).hex(),
            class_name=report.class_name,
            state=report.state,
            job_id=report.job,
            name=report.name,
            node_id=_node(client, report.rank),
            pid=pids.get(report.id, 0),
            ray_namespace=report.namespace,
            required_resources=report.resources if detail else None,
            is_detached=report.is_detached if detail else None,
            placement_group_id=_hex(report.group) if detail else None,
            num_restarts=str(report.restarts) if detail else None,
        )
        for report in reports
        if not report.is_part
    ]
    return _selected(found, ActorState, filters, limit)


def list_objects(
    address: str | None = None,
    filters: Sequence[Filter] | None = None,
    limit: int = DEFAULT_LIMIT,
    timeout: int = DEFAULT_TIMEOUT,
    detail: bool = False,
    raise_on_missing_output: bool = True,
) -> list[ObjectState]:
    """Objects that something refers to, the largest first. Arguments and errors as for `list_tasks`."""
    client = _client(address)
    # Filters look at all objects, so none may be left out before.
    found = _objects(client, ObjectsWanted(limit=-1 if filters else limit))
    return _selected(sorted(found, key=lambda one: -one.object_size), ObjectState, filters, limit)


def list_nodes(
    address: str | None = None,
    filters: Sequence[Filter] | None = None,
    limit: int = DEFAULT_LIMIT,
    timeout: int = DEFAULT_TIMEOUT,
    detail: bool = False,
    raise_on_missing_output: bool = True,
) -> list[NodeState]:
    """The ranks of the job. Arguments and errors as for `list_tasks`."""
    _client(address)
    found = [
        NodeState(
            node_id=node["NodeID"],
            node_ip=node["NodeManagerAddress"],
            is_head_node=node["Rank"] == 0,
            state="ALIVE" if node["Alive"] else "DEAD",
            node_name=node["NodeName"],
            resources_total=node["Resources"],
            labels=node["Labels"],
        )
        for node in hpcray.nodes()
    ]
    return _selected(found, NodeState, filters, limit)


def list_workers(
    address: str | None = None,
    filters: Sequence[Filter] | None = None,
    limit: int = DEFAULT_LIMIT,
    timeout: int = DEFAULT_TIMEOUT,
    detail: bool = False,
    raise_on_missing_output: bool = True,
) -> list[WorkerState]:
    """Drivers and workers. Arguments and errors as for `list_tasks`."""
    client = _client(address)
    hosts = {node["Rank"]: node["NodeManagerAddress"] for node in hpcray.nodes()}
    found = [
        WorkerState(
            worker_id=report.id,
            is_alive=True,
            worker_type="DRIVER" if report.is_driver else "WORKER",
            node_id=ids.node_id(ids.nonce_of(client.prefix), report.rank),
            ip=hosts[report.rank],
            pid=report.pid,
        )
        for report in _ask(client, "workers", ProcessReport)
    ]
    return _selected(found, WorkerState, filters, limit)


def list_jobs(
    address: str | None = None,
    filters: Sequence[Filter] | None = None,
    limit: int = DEFAULT_LIMIT,
    timeout: int = DEFAULT_TIMEOUT,
    detail: bool = False,
    raise_on_missing_output: bool = True,
) -> list[JobState]:
    """Drivers that are connected: each is a job of its own. Arguments and errors as for `list_tasks`."""
    drivers = [report for report in _ask(_client(address), "workers", ProcessReport) if report.is_driver]
    found = [
        JobState(report.job, "DRIVER", "RUNNING", {"id": report.job, "pid": str(report.pid)})
        for report in sorted(drivers, key=lambda report: report.job)
    ]
    return _selected(found, JobState, filters, limit)


def list_placement_groups(
    address: str | None = None,
    filters: Sequence[Filter] | None = None,
    limit: int = DEFAULT_LIMIT,
    timeout: int = DEFAULT_TIMEOUT,
    detail: bool = False,
    raise_on_missing_output: bool = True,
) -> list[PlacementGroupState]:
    """Placement groups. Arguments and errors as for `list_tasks`."""
    found = []
    for group in _client(address).query("placement_groups", None):
        bundles = [
            {"bundle_index": index, "node_id": group["bundles_to_node_id"][index] or None, "unit_resources": resources}
            for index, resources in group["bundles"].items()
        ]
        found.append(
            PlacementGroupState(
                placement_group_id=group["placement_group_id"],
                name=group["name"],
                state=group["state"],
                bundles=bundles if detail else None,
                stats=group["stats"] if detail else None,
            )
        )
    return _selected(found, PlacementGroupState, filters, limit)


# ---------------------------------------------------------------------------------------------------------- one by its id
def get_task(id: Any, address: str | None = None, timeout: int = DEFAULT_TIMEOUT) -> TaskState | None:
    """The task of this id, or that makes this `ObjectRef`; None if it neither waits nor runs."""
    task = id.task_id().hex() if isinstance(id, hpcray.ObjectRef) else id
    return _one(task_state for task_state in _tasks(_client(address), detail=True) if task_state.task_id == task)


def get_actor(id: str, address: str | None = None, timeout: int = DEFAULT_TIMEOUT) -> ActorState | None:
    """The actor of this id; None if it does not live."""
    return _one(list_actors(address, [("actor_id", "=", id)], detail=True))


def get_node(id: str, address: str | None = None, timeout: int = DEFAULT_TIMEOUT) -> NodeState | None:
    """The node of this id; None if there is none."""
    return _one(list_nodes(address, [("node_id", "=", id)], detail=True))


def get_worker(id: str, address: str | None = None, timeout: int = DEFAULT_TIMEOUT) -> WorkerState | None:
    """The process of this id; None if it does not live."""
    return _one(list_workers(address, [("worker_id", "=", id)], detail=True))


def get_job(id: str, address: str | None = None, timeout: int = DEFAULT_TIMEOUT) -> JobState | None:
    """The job of this id; None if its driver is not connected."""
    return _one(list_jobs(address, [("job_id", "=", id)], detail=True))


def get_placement_group(
    id: str,
    address: str | None = None,
    timeout: int = DEFAULT_TIMEOUT,
) -> PlacementGroupState | None:
    """The placement group of this id; None if there is none."""
    return _one(list_placement_groups(address, [("placement_group_id", "=", id)], detail=True))


def get_objects(id: str, address: str | None = None, timeout: int = DEFAULT_TIMEOUT) -> list[ObjectState]:
    """What the ranks know of the object of this id."""
    return _objects(_client(address), ObjectsWanted(ids=[bytes.fromhex(id)]))


# -------------------------------------------------------------------------------------------------------------- summaries
def summarize_tasks(
    address: str | None = None, timeout: int = DEFAULT_TIMEOUT, raise_on_missing_output: bool = True
) -> dict[str, Any]:
    """How many tasks of each function are in which state, in Ray's form."""
    tasks = _tasks(_client(address), detail=False)
    summary: dict[str, dict[str, Any]] = {}
    for one in tasks:
        entry = summary.setdefault(
            one.func_or_class_name,
            {"func_or_class_name": one.func_or_class_name, "type": one.type, "state_counts": Counter()},
        )
        entry["state_counts"][one.state] += 1
    kinds = Counter(one.type for one in tasks)
    return _summary(
        _plain(summary),
        total_tasks=kinds["NORMAL_TASK"],
        total_actor_tasks=kinds["ACTOR_TASK"],
        total_actor_scheduled=kinds["ACTOR_CREATION_TASK"],
        summary_by="func_name",
    )


def summarize_actors(
    address: str | None = None, timeout: int = DEFAULT_TIMEOUT, raise_on_missing_output: bool = True
) -> dict[str, Any]:
    """How many actors of each class are in which state, in Ray's form."""
    actors = list_actors(address, limit=-1)
    summary: dict[str, dict[str, Any]] = {}
    for one in actors:
        entry = summary.setdefault(one.class_name, {"class_name": one.class_name, "state_counts": Counter()})
        entry["state_counts"][one.state] += 1
    return _summary(_plain(summary), total_actors=len(actors), summary_by="class")


def summarize_objects(
    address: str | None = None, timeout: int = DEFAULT_TIMEOUT, raise_on_missing_output: bool = True
) -> dict[str, Any]:
    """How many objects were made where, and how large they are, in Ray's form."""
    objects = list_objects(address, limit=-1)
    summary: dict[str, dict[str, Any]] = {}
    for one in objects:
        entry = summary.setdefault(
            one.call_site, {"total_objects": 0, "total_size_mb": 0.0, "ref_type_counts": Counter()}
        )
        entry["total_objects"] += 1
        entry["total_size_mb"] += one.object_size / 2**20
        entry["ref_type_counts"][one.reference_type] += 1
    total = sum(one.object_size for one in objects) / 2**20
    return _summary(
        _plain(summary), total_objects=len(objects), total_size_mb=total, callsite_enabled=True, summary_by="callsite"
    )


def _summary(summary: dict[str, Any], **totals: Any) -> dict[str, Any]:
    return {"cluster": {"summary": summary, **totals}}


def _plain(summary: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        key: {name: dict(value) if isinstance(value, Counter) else value for name, value in entry.items()}
        for key, entry in summary.items()
    }


# ---------------------------------------------------------------------------------------------------------------- asking
_R = TypeVar("_R", TaskReport, ActorReport, ProcessReport)


def _client(address: str | None) -> Client:
    if address not in (None, "auto"):
        raise ValueError(f"only the job of this process can be asked: leave address={address!r} out")
    return require_client()


def _ask(client: Client, kind: str, report: type[_R]) -> list[_R]:
    parts: list[list[_R]] = msgspec.convert(client.query("states", kind), list[list[report]])  # type: ignore[valid-type]
    return [one for part in parts for one in part]


def _tasks(client: Client, *, detail: bool) -> list[TaskState]:
    latest: dict[bytes, TaskReport] = {}
    names: dict[bytes, str] = {}
    for report in _ask(client, "tasks", TaskReport):
        known = latest.get(report.id)
        if known is None or STAGES.index(report.state) > STAGES.index(known.state):
            latest[report.id] = report
        # The rank that runs a call knows the actor's class; that of the caller may not.
        names[report.id] = max(names.get(report.id, ""), report.name, key=len)
    return [
        TaskState(
            task_id=report.id.hex(),
            attempt_number=report.attempt,
            name=names[report.id],
            state=report.state,
            job_id=report.job,
            actor_id=shown_actor(report.actor).hex() if report.actor else None,
            type=report.kind,
            func_or_class_name=names[report.id],
            node_id=_node(client, report.runs_on),
            worker_id=report.worker or None,
            worker_pid=report.pid or None,
            required_resources=report.resources if detail else None,
            placement_group_id=_hex(report.group) if detail else None,
        )
        for report in latest.values()
    ]


def _objects(client: Client, wanted: ObjectsWanted) -> list[ObjectState]:
    parts = msgspec.convert(client.query("objects", wanted), list[list[ObjectReport]])
    return [
        ObjectState(
            object_id=report.id.hex(),
            object_size=report.size,
            reference_type=_reference_type(report),
            call_site=report.made_by or "unknown",
            node_id=ids.node_id(ids.nonce_of(client.prefix), report.rank),
            is_where=report.state,
        )
        for part in parts
        for report in part
    ]


def _reference_type(report: ObjectReport) -> str:
    if report.clients:
        return "LOCAL_REFERENCE"
    if report.guests or report.holds:
        return "USED_BY_PENDING_TASK" if report.guests else "CAPTURED_IN_OBJECT"
    return "PINNED_IN_MEMORY" if report.pinned_by else "UNKNOWN_STATUS"


def _node(client: Client, rank: int) -> str | None:
    return ids.node_id(ids.nonce_of(client.prefix), rank) if rank >= 0 else None


def _hex(identifier: bytes) -> str | None:
    return identifier.hex() if identifier else None


def _selected(found: list[_S], kind: type[_S], filters: Sequence[Filter] | None, limit: int) -> list[_S]:
    for name, predicate, value in map(_checked, filters or ()):
        if name not in kind.__dataclass_fields__:  # type: ignore[attr-defined]
            raise ValueError(f"{kind.__name__} has no field {name!r}; filters may name {sorted(kind.__annotations__)}")
        wanted = _comparable(value)
        found = [one for one in found if (_comparable(one[name]) == wanted) is (predicate == "=")]
    return found if limit < 0 else found[:limit]


def _checked(given: Any) -> Filter:
    if not isinstance(given, (tuple, list)) or len(given) != 3 or given[1] not in ("=", "!="):
        raise ValueError(f'a filter is a tuple such as ("state", "=", "RUNNING"), with "=" or "!=", not {given!r}')
    name, predicate, value = given
    return name, predicate, value


def _comparable(value: Any) -> str:
    return str(value).lower()


def _one(found: Iterable[_S]) -> _S | None:
    return next(iter(found), None)
