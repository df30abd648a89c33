"""What hpcray raises, under Ray's names.

Each class keeps its facts in fields, makes its text from them, and survives pickling. `RayTaskError` is
special: what a caller catches is an instance of both `RayTaskError` and the user's own exception class.
"""

from __future__ import annotations

import functools
import types
from typing import Any


class RayError(Exception):
    """Base of all errors that hpcray raises for what happens in a job."""


class InternalError(RayError):
    """A bug in hpcray: its own tables disagree."""


# ------------------------------------------------------------------------------------------------------ tasks
class RayTaskError(RayError):
    """A task or actor method raised.

    `get` raises it as an instance of the user's exception class too, named ``RayTaskError(ValueError)``; its
    `args` are ``(cause,)`` then, and attributes that it lacks are the cause's.

    Attributes:
        function_name: The remote function or `Class.method`.
        traceback_str: The remote traceback as text.
        cause: The user's exception; a `RayError` that describes it where it could not be pickled.
        pid: The worker's process; 0 for a task that never ran, since an argument of it failed.
        ip: The worker's host.
        actor_id: Hexadecimal id of the actor, for methods.
        actor_repr: What `repr` says of the actor, for methods.
    """

    def __init__(
        self,
        function_name: str,
        traceback_str: str,
        cause: BaseException,
        pid: int,
        ip: str,
        actor_id: str | None = None,
        actor_repr: str | None = None,
    ) -> None:
        super().__init__(function_name, traceback_str, cause, pid, ip, actor_id, actor_repr)
        self._keep(function_name, traceback_str, cause, pid, ip, actor_id, actor_repr)

    def _keep(self, *fields: Any) -> None:
        self._fields = fields
        (
            self.function_name,
            self.traceback_str,
            self.cause,
            self.pid,
            self.ip,
            self.actor_id,
            self.actor_repr,
        ) = fields

    def __str__(self) -> str:
        where = f" (pid={self.pid}, ip={self.ip})" if self.pid else ""
        if self.actor_id:
            where = f"{where[:-1]}, actor_id={self.actor_id}, repr={self.actor_repr})"
        return f"hpcray::{self.function_name}(){where}\n{self.traceback_str.rstrip()}"

    def __reduce__(self) -> Any:
        return RayTaskError, self._fields

    def as_instanceof_cause(self) -> RayTaskError:
        """This error as an instance of the user's exception class too, where that class admits it."""
        cause = self.cause
        cause_class: Any = type(cause)
        if issubclass(RayTaskError, cause_class):
            return self
        try:
            combined = _combined_class(cause_class)
            error = combined.__new__(combined, *cause.args)
            BaseException.__init__(error, cause)
            _copy_slots(cause, error)
            error._keep(*self._fields)
        except Exception:
            return self
        return error


@functools.lru_cache(maxsize=256)
def _combined_class(cause_class: type[BaseException]) -> type[RayTaskError]:
    def init(self: RayTaskError, *args: Any) -> None:
        BaseException.__init__(self, *args)

    def reduce(self: RayTaskError) -> Any:
        return _rebuild, self._fields

    def get_attribute_of_cause(self: RayTaskError, name: str) -> Any:
        # Not what pickle, copy and the interpreter look for: the cause's answers are not this object's.
        if name == "cause" or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)
        return getattr(self.cause, name)

    name = f"RayTaskError({cause_class.__name__})"
    namespace = {
        "__init__": init,
        "__reduce__": reduce,
        "__str__": RayTaskError.__str__,
        "__getattr__": get_attribute_of_cause,
        "__module__": __name__,
        "__qualname__": name,
    }
    return type(name, (RayTaskError, cause_class), namespace)


_SLOTS = (types.MemberDescriptorType, types.GetSetDescriptorType)


def _copy_slots(cause: BaseException, error: BaseException) -> None:
    # What is in no `__dict__`, such as `errno` of an OSError: our own would be found first, empty.
    for cls in type(cause).__mro__:
        if cls in (BaseException, object):
            continue
        for name, member in vars(cls).items():
            if isinstance(member, _SLOTS) and not name.startswith("__"):
                try:
                    setattr(error, name, getattr(cause, name))
                except (AttributeError, TypeError):
                    pass  # unset or read-only


def _rebuild(*fields: Any) -> RayTaskError:
    return RayTaskError(*fields).as_instanceof_cause()


class UserCodeException(RayError):
    """Code that the user supplied raised outside a task."""


class UnserializableException(RayError):
    """A task raised an exception that could not be unpickled here; the text holds what is known of it."""


class TaskCancelledError(RayError):
    """The task was cancelled before it finished.

    Attributes:
        task_id: Hexadecimal id, where known.
    """

    def __init__(self, task_id: str | None = None) -> None:
        super().__init__(task_id)
        self.task_id = task_id

    def __str__(self) -> str:
        return "This task or its dependency was cancelled" + (f": {self.task_id}" if self.task_id else "")


class GetTimeoutError(RayError, TimeoutError):
    """`get` ran out of time; the objects may still come, and may be asked for again."""


class TaskUnschedulableError(RayError):
    """The task can never be placed in this job."""


class TaskPlacementGroupRemoved(RayError):
    """The placement group that the task was to run in was removed."""


class WorkerCrashedError(RayError):
    """The process that ran the task died, and no retry was left."""


class OutOfMemoryError(RayError):
    """The worker was killed because memory ran out."""


class RuntimeEnvSetupError(RayError):
    """A worker could not be set up with the runtime environment of a task or actor.

    Attributes:
        error_message: What happened, with the last lines of the installer where there is one.
    """

    def __init__(self, error_message: str | None = None) -> None:
        super().__init__(error_message)
        self.error_message = error_message

    def __str__(self) -> str:
        return "Failed to set up the runtime environment." + (f"\n{self.error_message}" if self.error_message else "")


# ----------------------------------------------------------------------------------------------------- actors
class RayActorError(RayError):
    """The actor died or could not be reached.

    Attributes:
        error_msg: What happened.
        actor_id: Hexadecimal id, where known.
        actor_init_failed: Whether it never came to life, because its constructor or an argument of it failed.
    """

    def __init__(
        self, error_msg: str = "The actor died.", actor_id: str | None = None, actor_init_failed: bool = False
    ) -> None:
        super().__init__(error_msg, actor_id, actor_init_failed)
        self.error_msg = error_msg
        self.actor_id = actor_id
        self.actor_init_failed = actor_init_failed

    def __str__(self) -> str:
        return self.error_msg


class ActorDiedError(RayActorError):
    """The actor is dead and will not be restarted."""


class ActorUnavailableError(RayActorError):
    """The actor cannot be reached now; the call may or may not have run."""


class ActorUnschedulableError(RayError):
    """The actor can never be placed in this job."""


class ActorPlacementGroupRemoved(RayError):
    """The placement group that the actor was to live in was removed."""


class ActorAlreadyExistsError(ValueError, RayError):
    """The name is taken by a living actor of the namespace."""


class ActorHandleNotFoundError(ValueError, RayError):
    """The handle is of no actor of this job."""


class PendingCallsLimitExceeded(RayError):
    """The actor's `max_pending_calls` is reached."""


class AsyncioActorExit(RayError):
    """Raised inside an async actor to end it."""


# ---------------------------------------------------------------------------------------------------- objects
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


class ObjectFreedError(ObjectLostError):
    """The object was freed by hand while references to it were left."""


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


class PlasmaObjectNotAvailable(RayError):
    """The object is not in this node's object store."""


class ObjectRefStreamEndOfStreamError(RayError):
    """The generator task has no further value."""


# ----------------------------------------------------------------------------------------------------- system
class RaySystemError(RayError):
    """hpcray itself could not do what was asked (a value could not be unpickled, a connection broke)."""


class NodeDiedError(RayError):
    """The node (rank) that ran the task is gone."""


class LocalRayletDiedError(RayError):
    """The raylet of this process's node is gone."""


class RpcError(RayError):
    """Kept for programs that name it; hpcray has no RPC library whose errors it would pass on."""


class AuthenticationError(RayError):
    """Kept for programs that name it; hpcray's processes trust their user's and no others."""


class CrossLanguageError(RayError):
    """Kept for programs that name it; hpcray speaks Python only."""


_RAISED_BY_RAYLETS: dict[str, type[Exception]] = {
    cls.__name__: cls
    for cls in (
        WorkerCrashedError,
        OutOfMemoryError,
        ActorDiedError,
        ActorUnavailableError,
        ActorAlreadyExistsError,
        ObjectLostError,
        OwnerDiedError,
        ObjectStoreFullError,
        TaskCancelledError,
        RaySystemError,
        TaskUnschedulableError,
        ActorUnschedulableError,
        TaskPlacementGroupRemoved,
        ActorPlacementGroupRemoved,
        RuntimeEnvSetupError,
        ValueError,
    )
}


def from_description(name: str, arguments: list[Any]) -> Exception:
    """The exception that a raylet described (raylets make no pickles).

    Raises:
        KeyError: A raylet may not raise this class.
    """
    return _RAISED_BY_RAYLETS[name](*arguments)
