"""What this raylet knows of tasks, actors and processes, for `hpcray.util.state`. Changes nothing; not for speed."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

import msgspec

from hpcray.ids import OBJECT_ID_SIZE
from hpcray.observe.states import (
    CALL,
    CREATION,
    IN_GET,
    IN_WAIT,
    PENDING_ARGS,
    PENDING_FETCH,
    PENDING_NODE,
    PENDING_ORDER,
    RUNNING,
    SUBMITTED,
    TASK,
    ActorReport,
    ProcessReport,
    TaskReport,
)
from hpcray.protocol.messages import JobConfig, Template
from hpcray.raylet.clients import Client, Work, Worker
from hpcray.raylet.tasks import NOWHERE
from hpcray.resources import as_floats

if TYPE_CHECKING:
    from hpcray.raylet.core import RayletCore

MOST = 10_000
"""Tasks that a raylet tells of: Ray's own limit. A million would hold up the loop."""

Report = TaskReport | ActorReport | ProcessReport


def states(core: RayletCore, kind: str) -> list[Report]:
    """Reports of "tasks", "actors" or "workers"."""
    if kind == "tasks":
        return list(islice(_tasks(core), MOST))
    return list(_actors(core) if kind == "actors" else _processes(core))


def worker_id(client: Client) -> str:
    """The id under which users see a process, as `RuntimeContext.get_worker_id` gives it."""
    return client.prefix.hex().ljust(2 * OBJECT_ID_SIZE, "0")


def job_id(core: RayletCore, definition: bytes) -> str:
    """The id under which users see the job of this configuration; empty where it has not been heard of."""
    blob = core.blobs.get(definition)
    return "" if blob is None else _job_of(blob)


@functools.lru_cache(maxsize=16)
def _job_of(blob: bytes) -> str:
    return msgspec.json.decode(blob, type=JobConfig).job


# ------------------------------------------------------------------------------------------------------------------ tasks
def _tasks(core: RayletCore) -> Iterator[TaskReport]:
    yield from _running(core)  # those first that are most likely to be looked for
    for work in core.pool.arguments.missing(lambda _: True):
        yield _work(core, work, PENDING_FETCH)
    for queue in core.pool.ready.values():
        for work in queue:
            yield _work(core, work, PENDING_NODE)
    for task in core.tasks.tasks.values():
        state = PENDING_ARGS if task.missing else PENDING_NODE if task.runs_on == NOWHERE else SUBMITTED
        yield _report(core, core.template(task.template), task.id, state, TASK, task.attempt, runs_on=task.runs_on)
    for call in core.calls.sent.values():
        view = core.calls.views.get(call.message.actor)
        yield _call(
            core, call.message.task, call.message.actor, call.message.method, SUBMITTED, view.rank if view else -1
        )
    for actor, view in core.calls.views.items():
        for queue_of_caller in view.queues.values():
            for queued in queue_of_caller:
                state = PENDING_ARGS if queued.missing else PENDING_ORDER
                yield _call(core, queued.message.task, actor, queued.message.method, state, view.rank)
    for message in core.calls.unregistered():
        template = core.template(message.template)
        yield _report(core, template, message.actor, PENDING_ARGS, CREATION, actor=message.actor)


def _running(core: RayletCore) -> Iterator[TaskReport]:
    for client in core.clients.values():
        if client.worker is not None:
            for position, work in enumerate(client.worker.tasks.values()):
                runs = not position and client.pid  # without, its process is still being forked
                yield _work(core, work, _activity(client, client.worker) if runs else SUBMITTED, client)


def _activity(client: Client, worker: Worker) -> str:
    if not worker.is_blocked:
        return RUNNING
    return IN_GET if client.wanted else IN_WAIT


def _work(core: RayletCore, work: Work, state: str, client: Client | None = None) -> TaskReport:
    kind = CALL if work.method else CREATION if work.actor else TASK
    if kind == CALL:
        hosted = core.hosted.actors.get(work.actor)
        template = core.template(hosted.template) if hosted is not None else None
    else:
        template = core.template(work.template)
    return _report(
        core, template, work.task, state, kind, work.attempt, core.rank, client, actor=work.actor, method=work.method
    )


def _call(core: RayletCore, task: bytes, actor: bytes, method: str, state: str, rank: int) -> TaskReport:
    created = core.calls.created.get(actor)
    template = core.template(created.template) if created is not None else None
    return _report(core, template, task, state, CALL, runs_on=rank, actor=actor, method=method)


def _report(
    core: RayletCore,
    template: Template | None,
    task: bytes,
    state: str,
    kind: str,
    attempt: int = 0,
    runs_on: int = NOWHERE,
    client: Client | None = None,
    *,
    actor: bytes = b"",
    method: str = "",
) -> TaskReport:
    name = template.name if template is not None else ""
    if kind == CREATION:
        name += ".__init__"
    elif kind == CALL:
        name = f"{name}.{method}" if name else method
    return TaskReport(
        id=task,
        rank=core.rank,
        state=state,
        kind=kind,
        name=name,
        job=job_id(core, template.job) if template is not None else "",
        attempt=attempt,
        actor=actor,
        runs_on=runs_on,
        worker=worker_id(client) if client is not None else "",
        pid=client.pid if client is not None else 0,
        resources=as_floats(template.resources) if template is not None and kind != CALL else {},
        group=template.group if template is not None else b"",
    )


# ------------------------------------------------------------------------------------------------------ actors, processes
def _actors(core: RayletCore) -> Iterator[ActorReport]:
    if core.gcs is not None:
        for record in core.gcs.living_actors():
            template = core.template(record.template)
            yield ActorReport(
                id=record.id,
                state=record.shown_state,
                class_name=template.name,
                job=job_id(core, template.job),
                name=record.key[1] if record.key is not None else "",
                namespace=record.key[0] if record.key is not None else "",
                rank=record.rank,
                restarts=max(0, record.incarnation - 1),
                is_detached=record.is_detached,
                resources=as_floats(template.resources),
                group=template.group,
            )
    for message in core.calls.unregistered():
        template = core.template(message.template)
        yield ActorReport(
            id=message.actor,
            state="DEPENDENCIES_UNREADY",
            class_name=template.name,
            job=job_id(core, template.job),
            name=message.name,
            namespace=message.namespace,
            is_detached=message.detached,
            resources=as_floats(template.resources),
            group=template.group,
        )
    for hosted in core.hosted.actors.values():
        if hosted.worker is not None:
            pid = hosted.worker.client.pid
            yield ActorReport(id=hosted.id, state="", class_name="", job="", rank=core.rank, pid=pid, is_part=True)


def _processes(core: RayletCore) -> Iterator[ProcessReport]:
    for client in core.clients.values():
        job = client.job if client.worker is None else client.worker.job
        yield ProcessReport(
            id=worker_id(client),
            rank=core.rank,
            pid=client.pid,
            is_driver=client.is_driver,
            job=job_id(core, job),
            namespace=client.namespace,
        )
