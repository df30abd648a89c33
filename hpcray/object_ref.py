"""`ObjectRef`: the promise of a value somewhere in the job."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from hpcray.ids import OBJECT_ID_SIZE, task_of
from hpcray.worker.serialization import context

if TYPE_CHECKING:
    import asyncio
    import concurrent.futures

    from hpcray.client import Client

__all__ = ["ObjectRef"]
T = TypeVar("T")


class ObjectRef(Generic[T]):
    """A reference to an object that exists or will exist; the object lives as long as somebody holds one.

    Compares and hashes by id, may be passed to tasks and actors, stored in other objects, awaited, and
    pickled (which keeps the object for the rest of the job, since hpcray cannot see where the pickle goes).
    """

    __slots__ = ("__weakref__", "_client", "_id")

    def __init__(self, identifier: bytes) -> None:
        self._client: Client | None = None
        given: Any = identifier
        if not isinstance(given, bytes) or len(given) != OBJECT_ID_SIZE:
            raise ValueError(f"an ObjectRef is made of {OBJECT_ID_SIZE} bytes, not of {given!r}")
        self._id = identifier
        from hpcray.client import current_client

        self._client = current_client()
        if self._client is not None:
            self._client.count_up(identifier)

    def __del__(self) -> None:
        client = self._client
        if client is not None:
            client.count_down(self._id)

    def binary(self) -> bytes:
        """The id as bytes."""
        return self._id

    def hex(self) -> str:
        """The id in hexadecimal digits."""
        return self._id.hex()

    def task_id(self) -> bytes:
        """The id of the task that makes the object."""
        return task_of(self._id)

    def is_nil(self) -> bool:
        """Whether this is the reference to nothing; hpcray makes none."""
        return False

    def future(self) -> concurrent.futures.Future[T]:
        """A `concurrent.futures.Future` of the value, completed by a background thread."""
        from hpcray.client import require_client

        return require_client().future(self)

    def as_future(self) -> asyncio.Future[T]:
        """An `asyncio.Future` of the value in the running event loop."""
        import asyncio  # with ssl in its train, too slow to import for those who never await

        return asyncio.wrap_future(self.future())

    def __await__(self) -> Generator[Any, None, T]:
        return self.as_future().__await__()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectRef) and other._id == self._id

    def __hash__(self) -> int:
        return hash(self._id)

    def __repr__(self) -> str:
        return f"ObjectRef({self._id.hex()})"

    def __reduce__(self) -> Any:
        collected = context.pickled
        if collected is not None:
            collected.append(self)
        elif self._client is not None:
            self._client.keep_forever(self._id)
        return _rebuild, (self._id,)


def counted(identifier: bytes, client: Client) -> ObjectRef[Any]:
    """A reference whose instance `client` has counted already."""
    ref: ObjectRef[Any] = ObjectRef.__new__(ObjectRef)
    ref._id = identifier
    ref._client = client
    return ref


_adopter: Client | None = None


def adopt_for(client: Client | None) -> None:
    """References that are unpickled from now on belong to this client; to the process's present one, if None."""
    global _adopter
    _adopter = client


def _rebuild(identifier: bytes) -> ObjectRef[Any]:
    client = _adopter
    if client is None:
        from hpcray.client import require_client

        return require_client().adopt(identifier)
    # What `adopt` does, in place: values may hold ten thousand references, and each call is a third of their time.
    client.born.append(identifier)
    ref: ObjectRef[Any] = _new(ObjectRef)
    ref._id = identifier
    ref._client = client
    return ref


_new = object.__new__
