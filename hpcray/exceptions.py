"""What hpcray raises, under Ray's names.

Each class keeps its facts in fields, makes its text from them, and survives pickling. `RayTaskError` is special: what a
caller catches is an instance of both `RayTaskError` and the user's own exception class.
"""

from __future__ import annotations

import functools
from typing import Any


class RayError(Exception):
    """Base of all errors that hpcray raises for what happens in a job."""


class InternalError(RayError):
    """A bug in hpcray: its own tables disagree."""


class RayTaskError(RayError):
    """A task or actor method raised.

    Attributes:
        function_name: The remote function or `Class.method`.
        traceback_str: The remote traceback as text.
        cause: The user's exception, or None where it could not be pickled.
        pid: The worker's process.
        host: The worker's host.
    """

    def __init__(self, function_name: str, traceback_str: str, cause: BaseException | None, pid: int, host: str) -> None:
        super().__init__(function_name, traceback_str, cause, pid, host)
        self.function_name = function_name
        self.traceback_str = traceback_str
        self.cause = cause
        self.pid = pid
        self.host = host
        if cause is not None:
            self.__cause__ = cause.__cause__

    def __str__(self) -> str:
        return f"{self.function_name} (pid={self.pid}, host={self.host}) raised:\n{self.traceback_str.rstrip()}"

    def __reduce__(self) -> Any:
        return RayTaskError, (self.function_name, self.traceback_str, self.cause, self.pid, self.host)

    def as_instanceof_cause(self) -> RayTaskError:
        """This error as an instance of the user's exception class too, where that class can be subclassed so."""
        if self.cause is None or isinstance(self.cause, RayError):
            return self
        try:
            combined = _combined_class(type(self.cause))
            error = combined.__new__(combined, *self.cause.args)
            BaseException.__init__(error, *self.cause.args)
            error.__dict__.update(getattr(self.cause, "__dict__", {}))
            error.__dict__.update(self.__dict__)
        except Exception:  # a metaclass or slots layout of the user's that admits no second base
            return self
        return error


@functools.lru_cache(maxsize=256)
def _combined_class(cause_class: type[BaseException]) -> type[RayTaskError]:
    def reduce(self: RayTaskError) -> Any:
        return _rebuild, (self.function_name, self.traceback_str, self.cause, self.pid, self.host)

    def init(self: RayTaskError, *args: Any) -> None:
        BaseException.__init__(self, *args)

    return type(
        f"RayTaskError({cause_class.__name__})",
        (RayTaskError, cause_class),
        {"__reduce__": reduce, "__init__": init, "__str__": RayTaskError.__str__, "__module__": __name__},
    )


def _rebuild(*fields: Any) -> RayTaskError:
    return RayTaskError(*fields).as_instanceof_cause()


class UnserializableException(RayError):
    """A task raised an exception that could not be unpickled here; the text holds what is known of it."""


class ActorAlreadyExistsError(ValueError, RayError):
    """The name is taken by a living actor of the namespace."""


class TaskCancelledError(RayError):
    """The task was cancelled before it finished."""

    def __init__(self, task_id: str | None = None) -> None:
        super().__init__(task_id)
        self.task_id = task_id

    def __str__(self) -> str:
        return "This task or its dependency was cancelled" + (f": {self.task_id}" if self.task_id else "")


class GetTimeoutError(RayError, TimeoutError):
    """`get` ran out of time; the objects may still come, and may be asked for again."""


class TaskUnschedulableError(RayError):
    """The task can never be placed in this job."""


class ActorUnschedulableError(RayError):
    """The actor can never be placed in this job."""


class WorkerCrashedError(RayError):
    """The process that ran the task died, and no retry was left."""

    def __init__(self, message: str = "The worker died while it ran the task.") -> None:
        super().__init__(message)


class OutOfMemoryError(RayError):
    """The worker was killed because memory ran out."""


class RaySystemError(RayError):
    """hpcray itself could not do what was asked (a value could not be unpickled, a connection broke)."""


class ActorError(RayError):
    """Base of what calls to a dead or unreachable actor raise."""


class RayActorError(ActorError):
    """The actor died or could not be reached.

    Attributes:
        actor_id: Hexadecimal id, where known.
    """

    def __init__(self, message: str = "The actor died.", actor_id: str | None = None) -> None:
        super().__init__(message, actor_id)
        self.message = message
        self.actor_id = actor_id

    def __str__(self) -> str:
        return self.message


class ActorDiedError(RayActorError):
    """The actor is dead and will not be restarted."""


class ActorUnavailableError(RayActorError):
    """The actor cannot be reached now; the call may or may not have run."""


class ObjectLostError(RayError):
    """The object's value cannot be had any more.

    Attributes:
        object_ref_hex: Which object.
    """

    def __init__(self, message: str = "The object was lost.", object_ref_hex: str = "") -> None:
        super().__init__(message, object_ref_hex)
        self.message = message
        self.object_ref_hex = object_ref_hex

    def __str__(self) -> str:
        return self.message


class ObjectFetchTimedOutError(ObjectLostError):
    """No copy of the object could be fetched in time."""


class OwnerDiedError(ObjectLostError):
    """The rank that counted the object's references is gone."""


class ReferenceCountingAssertionError(ObjectLostError, AssertionError):
    """The object was already freed: a bug in hpcray, or a reference from an earlier job."""


class ObjectReconstructionFailedError(ObjectLostError):
    """The object was lost and running its task again did not bring it back."""


class ObjectStoreFullError(RayError):
    """There is no room for an object in this node's object store, and none came in time."""


class OutOfDiskError(RayError):
    """The spill directory is full."""


class RuntimeEnvSetupError(RayError):
    """A runtime environment could not be built."""


class PendingCallsLimitExceeded(RayError):
    """The actor's `max_pending_calls` is reached."""


class AsyncioActorExit(RayError):
    """Raised inside an async actor to end it."""


class CrossLanguageError(RayError):
    """Kept for programs that name it; hpcray speaks Python only."""


_RAISED_BY_RAYLETS: dict[str, type[RayError]] = {
    cls.__name__: cls
    for cls in (
        WorkerCrashedError,
        OutOfMemoryError,
        ActorDiedError,
        ActorUnavailableError,
        ObjectLostError,
        OwnerDiedError,
        ObjectStoreFullError,
        TaskCancelledError,
        RaySystemError,
        TaskUnschedulableError,
        ActorUnschedulableError,
    )
}
_RAISED_BY_RAYLETS["ValueError"] = ValueError  # type: ignore[assignment]
_RAISED_BY_RAYLETS["ActorAlreadyExistsError"] = ActorAlreadyExistsError


def from_description(name: str, arguments: list[Any]) -> Exception:
    """The exception that a raylet described (raylets make no pickles).

    Raises:
        KeyError: A raylet may not raise this class.
    """
    return _RAISED_BY_RAYLETS[name](*arguments)
