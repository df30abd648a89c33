"""Runs tasks, creates the actor, runs its calls: the inside of a worker, one thing at a time."""

from __future__ import annotations

import inspect
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import msgspec

from hpcray import payload, ray_alias, runtime_context
from hpcray.client import Client
from hpcray.exceptions import RayError, RayTaskError, TaskCancelledError
from hpcray.ids import object_id, shown_actor
from hpcray.protocol import messages as m
from hpcray.resources import UNIT
from hpcray.worker import output
from hpcray.worker.arguments import unpack_arguments
from hpcray.worker.serialization import Serialized, dump_error, serialize
from hpcray.worker.threads import limit_threads

_PACKAGE = f"{Path(__file__).parent.parent}{os.sep}"
"""Frames of files in it are ours, not the user's."""


class Executor:
    """What a worker does with each `Run`."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._functions: dict[bytes, Callable[..., Any]] = {}
        self._job: bytes | None = None
        self._actor: Any = None
        self._actor_template: m.Template | None = None
        self._returned: list[Serialized] = []
        self._threads: float | None = None
        self._announced = ""

    def run(self, work: m.Run) -> None:
        """Run one piece of work and report it; user errors are results, never exceptions here."""
        if work.method:
            template = self._actor_template
            assert template is not None
            name = f"{template.name}.{work.method}"
            self._announce(template.name)
        else:
            template = self._client.templates[work.template]
            name = template.name
            self._announce(name)
        if work.actor and not work.method:
            self._create_actor(work, template)
            return
        start = perf_counter()
        failed, retry = False, False
        runtime_context.enter(work, template, name)
        try:
            arguments, options = self._arguments(work)
            function = getattr(self._actor, work.method) if work.method else self._function(template)
            value = function(*arguments, **options)
            if inspect.iscoroutine(value):
                value = _finish(value)
            del arguments, options
            results = self._results(work, template, name, value)
        except BaseException as error:
            if isinstance(error, SystemExit):
                raise
            failed = True
            retry = _is_retried(template, error)
            data = self._describe(name, error, work.actor)
            results = [m.InlineResult(data, []) for _ in range(self._count(work, template))]
        runtime_context.leave()
        _flush_output()
        self._client.served.finish(m.TaskDone(work.task, results, failed, retry, perf_counter() - start))
        # Only now may references in the results die: their release must not overtake the reply.
        self._returned.clear()

    def _announce(self, name: str) -> None:
        if name != self._announced:
            self._announced = name
            output.announce(name)

    @staticmethod
    def _count(work: m.Run, template: m.Template) -> int:
        return work.num_returns if work.method else template.num_returns

    def _create_actor(self, work: m.Run, template: m.Template) -> None:
        self._actor_template = template
        error: bytes | None = None
        runtime_context.enter(work, template, f"{template.name}.__init__")
        try:
            arguments, options = self._arguments(work)
            cls: Any = self._function(template)
            runtime_context.become_actor(work.actor, cls, template)
            self._actor = cls(*arguments, **options)
        except BaseException as raised:
            if isinstance(raised, SystemExit):
                raise
            inner = self._describe(f"{template.name}.__init__", raised)
            error = payload.creation_error(work.actor, template.name, inner)
        runtime_context.leave()
        _flush_output()
        self._client.send(m.ActorReady(work.actor, error))

    def _function(self, template: m.Template) -> Callable[..., Any]:
        function = self._functions.get(template.function)
        if function is None:
            self._enter_job(template.job)
            function = self._functions[template.function] = pickle.loads(self._client.blobs.pop(template.function))
        self._limit_threads(template.resources.get("CPU", 0) / UNIT)
        return function

    def _limit_threads(self, cpus: float) -> None:
        if cpus != self._threads:
            self._threads = cpus
            limit_threads(cpus)

    def _enter_job(self, job: bytes) -> None:
        if self._job is not None:
            return
        self._job = self._client.job_definition = job
        config = msgspec.json.decode(self._client.blobs[job], type=m.JobConfig)
        if config.as_ray:
            ray_alias.install()
        environments = self._client.environments
        paths = [*environments.paths, *config.sys_path]
        for path in paths:
            if path not in sys.path:
                sys.path.append(path)
        # The driver's order decides which of two modules of one name is imported, after the runtime environment.
        sys.path.sort(key=lambda path: paths.index(path) if path in paths else len(sys.path))
        cwd = environments.working_dir or config.cwd
        if Path(cwd).is_dir():
            os.chdir(cwd)
        self._client.job = bytes.fromhex(config.job)
        self._client.namespace = config.namespace

    def _arguments(self, work: m.Run) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not work.arguments:
            return (), {}
        if work.template:
            self._enter_job(self._client.templates[work.template].job)
        client = self._client
        return unpack_arguments(work.arguments, work.values, client.load_argument)

    def _results(self, work: m.Run, template: m.Template, name: str, value: Any) -> list[m.Result]:
        count = self._count(work, template)
        if count == 1:
            return [self._result(work, 1, name, value)]
        if count == 0:
            return []
        if not hasattr(value, "__len__"):
            raise TypeError(
                f"{name} has num_returns={count} but returned a {type(value).__name__}, which has no length"
            )
        if len(value) != count:
            raise ValueError(f"{name} returned {len(value)} objects, but num_returns={count}")
        return [self._result(work, index, name, part) for index, part in enumerate(value, 1)]

    def _result(self, work: m.Run, index: int, name: str, value: Any) -> m.Result:
        try:
            serialized: Serialized = serialize(value)
        except Exception as error:
            from hpcray.worker.inspection import explain

            raise TypeError(f"the result of {name} cannot be serialised: {explain(value, error)}") from error
        self._returned.append(serialized)
        if serialized.size <= self._client.inline_limit:
            return m.InlineResult(serialized.to_bytes(), serialized.nested)
        self._client.write_to_arena(object_id(work.task, index), serialized)
        return m.StoredResult(serialized.size, serialized.nested)

    def _describe(self, name: str, error: BaseException, actor: bytes = b"") -> bytes:
        text = "".join(_user_traceback(error))
        cause: BaseException = error
        if isinstance(error, RayTaskError):
            cause = error.cause
        elif isinstance(error, KeyboardInterrupt):
            cause = TaskCancelledError()
        shown = (shown_actor(actor).hex(), _safe_repr(self._actor)) if actor else (None, None)
        return dump_error(RayTaskError(name, text, cause, os.getpid(), self._client.host, *shown))


def _is_retried(template: m.Template, error: BaseException) -> bool:
    wanted = template.retry_exceptions
    if wanted is None or not isinstance(error, Exception) or (isinstance(error, RayError) and wanted == b""):
        return wanted is not None and isinstance(error, RayTaskError)
    return wanted == b"" or isinstance(error, pickle.loads(wanted))


def _user_traceback(error: BaseException) -> list[str]:
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename.startswith(_PACKAGE):
        frames = frames.tb_next
    return traceback.format_exception(type(error), error, frames)


def _safe_repr(value: Any) -> str:
    try:
        return f"{value!r:.200}"
    except Exception:
        return object.__repr__(value)


def _finish(coroutine: Any) -> Any:
    import asyncio

    return asyncio.run(coroutine)


def _flush_output() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass  # the user closed it
