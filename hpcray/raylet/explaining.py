"""What this raylet knows of something that a user asks about: `hpcray explain`. Changes nothing; for people, not for speed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

from hpcray.ids import OBJECT_ID_SIZE, TASK_ID_SIZE, home_of, shown_actor, task_of
from hpcray.observe.findings import Finding
from hpcray.raylet.clients import Work
from hpcray.raylet.tasks import NOWHERE, Task
from hpcray.store.entry import AWAY, HERE, INLINE, MAPPED, PENDING, SPILLED

if TYPE_CHECKING:
    from hpcray.raylet.core import RayletCore

SHOWN = 3
"""How many of a kind are named one by one."""
_PLACES = {
    INLINE: "it exists, in this raylet's memory",
    HERE: "it exists, in this rank's store",
    MAPPED: "it exists, in the store of another rank of this host",
    AWAY: "it exists, on another rank",
    SPILLED: "it exists, on this rank's disk",
}


def explain(core: RayletCore, asked: str) -> list[Finding]:
    """All that this raylet knows of what `asked` names: an id in hexadecimal digits, or the name of a function."""
    identifier = _identifier(asked)
    if identifier is None:
        return list(_of_name(core, asked))
    return list(_of_id(core, identifier))


def _identifier(asked: str) -> bytes | None:
    try:
        identifier = bytes.fromhex(asked)
    except ValueError:
        return None
    return identifier if len(identifier) in (TASK_ID_SIZE, OBJECT_ID_SIZE) else None


def _of_id(core: RayletCore, identifier: bytes) -> Iterator[Finding]:
    task = task_of(identifier)
    if (known := core.tasks.tasks.get(task)) is not None:
        yield _task(core, known)
    if (call := core.calls.sent.get(task)) is not None:
        story = f"was sent to its actor {shown_actor(call.message.actor).hex()}, and is not answered"
        yield Finding("call", task.hex(), f"{call.message.method}()", core.rank, story)
    for view in core.calls.views.values():
        for queue in view.queues.values():
            for position, queued in enumerate(queue):
                if queued.message.task == task:
                    name, actor = f"{queued.message.method}()", shown_actor(queued.message.actor).hex()
                    story = (
                        f"waits behind {position} calls of the same caller" if position else "is the next of its caller"
                    )
                    story += f" for actor {actor}, which is {view.state}"
                    missing = _missing(core, queued.message.dependencies)
                    yield Finding("call", task.hex(), name, core.rank, story, others=missing)
    yield from _works(core, task)
    entry = core.table.entries.get(identifier)
    if entry is not None and len(identifier) == OBJECT_ID_SIZE:
        story = _PLACES.get(entry.state, "it does not exist yet")
        if entry.state == PENDING and home_of(identifier) != core.rank:
            story += f": rank {home_of(identifier)}, its home, will tell"
        yield Finding("object", identifier.hex(), f"object {identifier.hex()}", core.rank, story)


def _task(core: RayletCore, task: Task) -> Finding:
    name = f"{core.template(task.template).name}()"
    if task.missing:
        others = _missing(core, task.dependencies)
        return Finding(
            "task", task.id.hex(), name, core.rank, f"waits for {task.missing} of its arguments", others=others
        )
    if task.runs_on == NOWHERE:
        count = len(core.tasks.queues.get(task.template, ()))
        story = f"waits for a place, as {count} of its kind do on rank {core.rank}"
        return Finding("task", task.id.hex(), name, core.rank, story, waiting=task.template)
    attempt = f" for the {task.attempt + 1}. time" if task.attempt else ""
    return Finding("task", task.id.hex(), name, core.rank, f"was given to rank {task.runs_on}{attempt}")


def _missing(core: RayletCore, dependencies: list[bytes]) -> list[str]:
    entries = core.table.entries
    return [i.hex() for i in dependencies if entries[i].state == PENDING][:SHOWN]


def _works(core: RayletCore, task: bytes) -> Iterator[Finding]:
    """What the executing side knows."""

    def finding(work: Work, story: str) -> Finding:
        name = work.method or core.template(work.template).name
        return Finding("call" if work.method else "task", task.hex(), f"{name}()", core.rank, story)

    for client in core.clients.values():
        worker = client.worker
        if worker is not None and (work := worker.tasks.get(task)) is not None:
            first = next(iter(worker.tasks))
            where = f"the worker with pid {client.pid}"
            if first != task:
                yield finding(work, f"waits behind others at {where}")
            elif worker.is_blocked:
                wanted = [i.hex() for i in islice((*client.wanted, *client.watched), SHOWN)]
                story = f"runs on {where}, which waits in get() or wait()"
                yield Finding("task", task.hex(), finding(work, "").name, core.rank, story, others=wanted)
            else:
                yield finding(work, f"runs on {where}")
    for work in core.pool.arguments.missing(lambda work: work.task == task):
        yield finding(work, "waits for its arguments to be brought here")
    for queue in core.pool.ready.values():
        for work in queue:
            if work.task == task:
                yield finding(
                    work, f"waits for a worker or for resources of this rank, one of {len(queue)} of its kind"
                )


def _of_name(core: RayletCore, name: str) -> Iterator[Finding]:
    states: dict[bytes, Counter[str]] = {}
    examples: dict[tuple[bytes, str], Task] = {}
    names = {identifier for identifier, template in core.templates.items() if _is_named(template.name, name)}
    for task in core.tasks.tasks.values():
        if task.template in names:
            state = "arguments" if task.missing else "place" if task.runs_on == NOWHERE else f"rank {task.runs_on}"
            states.setdefault(task.template, Counter())[state] += 1
            examples.setdefault((task.template, state), task)
    for template, counts in states.items():
        for state, count in sorted(counts.items()):
            if count == 1:
                yield _task(core, examples[template, state])
                continue
            one = _task(core, examples[template, state])
            story = {"arguments": "wait for arguments", "place": "wait for a place"}.get(
                state, f"were given to {state}"
            )
            yield Finding(
                "tasks", "", f"{count} tasks {one.name}", core.rank, story, waiting=one.waiting, others=one.others[:1]
            )


def _is_named(full: str, asked: str) -> bool:
    return asked in (full, full.rpartition(".")[2])
