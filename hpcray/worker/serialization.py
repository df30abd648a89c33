"""Values to payloads and back.

Plain values are pickled by C pickle, the rest (functions, lambdas, classes of `__main__`) by cloudpickle.
Buffers of numpy, pandas and the like go out of band (pickle protocol 5), so that large arrays are copied once
on the way in and not at all on the way out. References and actor handles inside a value are collected while
it is pickled.
"""

from __future__ import annotations

import copyreg
import io
import pickle
import threading
from collections import ChainMap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hpcray import payload
from hpcray.exceptions import (
    ActorDiedError,
    RayError,
    RaySystemError,
    RayTaskError,
    UnserializableException,
    from_description,
)

if TYPE_CHECKING:
    from hpcray.object_ref import ObjectRef


class _Context(threading.local):
    """What the pickling or unpickling at work in this thread collects."""

    pickled: list[ObjectRef[Any]] | None = None


context = _Context()


reducers: dict[type, Callable[[Any], Any]] = {}
"""How instances of classes are pickled here if the user has said so, as in `copyreg.dispatch_table`."""

_PICKLE, _RAW = bytes([payload.PICKLE]), bytes([payload.RAW])


class Serialized:
    """A pickled value as the parts of its payload, which still have to be copied together."""

    __slots__ = ("parts", "references", "size")

    def __init__(self, parts: list[bytes | memoryview], references: list[ObjectRef[Any]]) -> None:
        self.parts = parts
        self.references = references
        """Those inside the value: alive until the raylet has been told of them."""
        self.size = sum(map(len, parts))

    @property
    def nested(self) -> list[bytes]:
        """The ids of the references inside the value."""
        return [reference.binary() for reference in self.references]

    def to_bytes(self) -> bytes:
        """The payload as bytes."""
        return b"".join(self.parts)


def serialize(value: Any) -> Serialized:
    """Pickle a value for a task, an actor or the store.

    Raises:
        Exception: Whatever pickle and cloudpickle raise for it; `api` adds what the value was.
    """
    if value is None:
        return Serialized([payload.NONE], [])
    if type(value) is bytes:
        return Serialized([_RAW, value], [])
    buffers: list[pickle.PickleBuffer] = []
    data, references = pickle_value(value, buffers)
    if not buffers:
        return Serialized([_PICKLE, data], references)
    return Serialized(payload.join_buffers(data, [buffer.raw() for buffer in buffers]), references)


def pickle_value(value: Any, buffers: list[pickle.PickleBuffer] | None = None) -> tuple[bytes, list[ObjectRef[Any]]]:
    """The pickle of a value and the references inside it; buffers are appended to `buffers`, if given."""
    outer, context.pickled = context.pickled, []
    keep: Callable[[pickle.PickleBuffer], bool] | None = None
    if buffers is not None:

        def keep(buffer: pickle.PickleBuffer) -> bool:
            # Small ones too: an array is read-only whatever its size.
            try:
                buffer.raw()
            except BufferError:  # not contiguous: only in-band pickling can copy it
                return True
            buffers.append(buffer)
            return False

    try:
        try:
            data = (_dumps_reduced if reducers else pickle.dumps)(value, 5, buffer_callback=keep)
            if b"__main__" not in data:
                return data, context.pickled
        except Exception:
            pass  # cloudpickle may know better, and raises what the user should see if not
        from hpcray.worker.functions import pickle_by_value

        context.pickled = []
        if buffers:
            buffers.clear()
        data = pickle_by_value(value, keep)
        return data, context.pickled
    finally:
        context.pickled = outer


def _dumps_reduced(
    value: Any, protocol: int, *, buffer_callback: Callable[[pickle.PickleBuffer], bool] | None
) -> bytes:
    with io.BytesIO() as file:
        pickler = pickle.Pickler(file, protocol, buffer_callback=buffer_callback)
        others: Any = copyreg.dispatch_table
        pickler.dispatch_table = ChainMap(reducers, others)
        pickler.dump(value)
        return file.getvalue()


def deserialize(data: memoryview | bytes) -> Any:
    """The value of a payload; arrays in it are read-only views of `data`.

    Raises:
        Exception: The payload is that of an error: it is raised, `RayTaskError` as an instance of its cause's
            class too.
    """
    kind = data[0]
    if kind == payload.PICKLE:
        return pickle.loads(memoryview(data)[1:])
    if kind == payload.RAW:
        return bytes(data[1:])
    if kind == payload.BUFFERS:
        view = memoryview(data)
        body, buffers = payload.split_buffers(view if view.readonly else view.toreadonly())
        return pickle.loads(body, buffers=buffers)
    raise load_error(bytes(data))


def load_error(data: bytes) -> Exception:
    """The exception of an error's payload."""
    kind = data[0]
    if kind == payload.TASK_ERROR:
        return _load_task_error(data)
    if kind == payload.SYSTEM_ERROR:
        return from_description(*payload.describe_system_error(data))
    if kind == payload.DEPENDENCY_ERROR:
        name, inner = payload.describe_dependency_error(data)
        error = load_error(inner)
        if not isinstance(error, RayTaskError):
            return error
        text = f"did not run, since an argument could not be computed:\n{error}"
        return RayTaskError(name, text, error.cause, 0, "").as_instanceof_cause()
    if kind == payload.CREATION_ERROR:
        actor_id, name, inner = payload.describe_creation_error(data)
        text = f"The actor {actor_id} ({name}) died in its creation:\n{load_error(inner)}"
        return ActorDiedError(text, actor_id, actor_init_failed=True)
    return RaySystemError(f"an object's payload is damaged: unknown kind {kind}")


def _load_task_error(data: bytes) -> Exception:
    function_name, traceback_text, pickled_cause, *where = pickle.loads(data[1:])
    try:
        cause = pickle.loads(pickled_cause)
    except Exception as error:
        return UnserializableException(
            f"{function_name} raised an exception that cannot be unpickled here ({error!r}): see that its "
            f"class can be made of its own `args`, or give it a `__reduce__`. There it was:\n{traceback_text}"
        )
    return RayTaskError(function_name, traceback_text, cause, *where).as_instanceof_cause()


def dump_error(error: RayTaskError) -> bytes:
    """The payload of a task's exception; a cause that cannot be pickled travels as text."""
    try:
        cause, _ = pickle_value(error.cause)
    except Exception as reason:
        text = f"{type(error.cause).__qualname__}, which could not be pickled ({reason}); see the traceback"
        cause, _ = pickle_value(RayError(text))
    fields = (
        error.function_name,
        error.traceback_str,
        cause,
        error.pid,
        error.ip,
        error.actor_id,
        error.actor_repr,
    )
    return bytes([payload.TASK_ERROR]) + pickle.dumps(fields, 5)
