"""Where the calling code runs: job, node, task, actor."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import Any, NamedTuple

from hpcray import ids
from hpcray.client import require_client
from hpcray.protocol import messages as m
from hpcray.resources import as_floats
from hpcray.runtime_env import RuntimeEnv


@dataclass(slots=True)
class _Running:
    work: m.Run
    template: m.Template
    name: str


@dataclass(frozen=True)
class _Actor:
    id: bytes
    cls: type
    template: m.Template


class _State(threading.local):
    running: _Running | None = None


_state = _State()
_actor: _Actor | None = None
_gpus: list[str | int] = []
"""Ids of the GPUs that this worker was given."""


def enter(work: m.Run, template: m.Template, name: str) -> None:
    """The worker begins a task or call."""
    _state.running = _Running(work, template, name)


def leave() -> None:
    """The worker's task or call is over."""
    _state.running = None


def assign_gpus(message: m.AssignGpus) -> None:
    """What this worker runs next has these GPUs, and no others."""
    global _gpus
    _gpus = message.ids
    os.environ[message.variable] = ",".join(map(str, message.ids))


def gpu_ids() -> list[str | int]:
    """Ids of the GPUs that this worker was given; none in a driver."""
    return list(_gpus)


def become_actor(identifier: bytes, cls: type, template: m.Template) -> None:
    """From now on this worker is an actor."""
    global _actor
    _actor = _Actor(identifier, cls, template)


def current_group() -> bytes:
    """The placement group of the running task or actor; empty without one."""
    running = _state.running or _actor
    return running.template.group if running else b""


class Surroundings(NamedTuple):
    """Where the code that submits something runs."""

    group: bytes = b""
    """Its placement group; empty without one."""
    captures: bool = False
    """What it submits runs in there, too."""


NOWHERE = Surroundings()


def surroundings() -> Surroundings:
    """Those of the running task or actor."""
    running = _state.running or _actor
    if running is None or not running.template.group:
        return NOWHERE
    return Surroundings(running.template.group, running.template.captures)


class RuntimeContext:
    """What `get_runtime_context()` returns. Ids are hexadecimal strings, None where there is none."""

    def get_job_id(self) -> str:
        """The id of the driver's job."""
        return require_client().job.hex()

    def get_node_id(self) -> str:
        """The id of the node (rank) that this code runs on."""
        client = require_client()
        return ids.node_id(ids.nonce_of(client.prefix), client.rank)

    def get_worker_id(self) -> str:
        """The id of this process in the job."""
        return require_client().prefix.hex().ljust(2 * ids.OBJECT_ID_SIZE, "0")

    def get_task_id(self) -> str | None:
        """The running task's id; None in a driver."""
        running = _state.running
        return running.work.task.hex() if running else None

    def get_task_name(self) -> str | None:
        """The running task's name; None in a driver."""
        running = _state.running
        return running.name if running else None

    def get_task_function_name(self) -> str | None:
        """The name of the running function or method; None in a driver."""
        return self.get_task_name()

    def get_actor_id(self) -> str | None:
        """The id of the actor that this process is; None elsewhere."""
        return ids.shown_actor(_actor.id).hex() if _actor else None

    def get_actor_name(self) -> str | None:
        """The name that the actor was created under; empty without one, None outside actors."""
        return _actor.template.actor.name if _actor and _actor.template.actor else None

    def get_assigned_resources(self) -> dict[str, float]:
        """What the running task or actor holds.

        Raises:
            RuntimeError: In a driver, which holds nothing.
        """
        # Threads that an actor starts run no call of their own, and hold what the actor does.
        running = _state.running or _actor
        if running is None:
            raise RuntimeError("a driver holds no resources: call get_assigned_resources() in a task or actor")
        return as_floats(running.template.resources)

    def get_accelerator_ids(self) -> dict[str, list[str]]:
        """Ids of the accelerators that the running task or actor was given, by kind; none in a driver."""
        return {"GPU": [str(identifier) for identifier in _gpus]}

    def get_placement_group_id(self) -> str | None:
        """The placement group of the running task or actor, in hexadecimal digits; None without one."""
        group = current_group()
        return group.hex() if group else None

    def get_runtime_env_string(self) -> str:
        """The runtime environment as JSON."""
        return self.runtime_env.serialize()

    @property
    def runtime_env(self) -> RuntimeEnv:
        """What the calling code's worker was set up with; in a driver, what its job's tasks are by default."""
        return RuntimeEnv.trusted(require_client().environments.present.fields)

    @property
    def namespace(self) -> str:
        """The namespace in which this job's named actors are found."""
        return require_client().namespace

    @property
    def was_current_actor_reconstructed(self) -> bool:
        """Whether this actor has been restarted."""
        if _actor is None:
            raise RuntimeError("was_current_actor_reconstructed is known in actors only")
        return False

    @property
    def current_actor(self) -> Any:
        """A handle of the actor that this process is.

        Raises:
            RuntimeError: Not in an actor.
        """
        if _actor is None:
            raise RuntimeError("current_actor is known in actors only")
        from hpcray.actors.handle import ActorHandle, ClassDescription

        return ActorHandle.adopt(_actor.id, ClassDescription.of(_actor.cls))

    def get(self) -> dict[str, Any]:
        """All ids at once."""
        known: dict[str, Any] = {
            "job_id": self.get_job_id(),
            "node_id": self.get_node_id(),
            "namespace": self.namespace,
            "task_id": self.get_task_id(),
            "actor_id": self.get_actor_id(),
        }
        return {name: value for name, value in known.items() if value is not None}


def get_runtime_context() -> RuntimeContext:
    """The context of the calling code; a driver without a job is initialised."""
    require_client()
    return RuntimeContext()
