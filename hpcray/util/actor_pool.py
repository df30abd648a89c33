"""`ActorPool`: work for a fixed set of actors, one piece each at a time. Names and semantics are Ray's."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

import hpcray
from hpcray.actors.handle import ActorHandle
from hpcray.exceptions import ActorDiedError

V = TypeVar("V")
Function = Callable[[ActorHandle, V], Any]
"""Called with an actor and a value; submits a method call and returns its `ObjectRef` (or a list of them)."""


class ActorPool(Generic[V]):
    """Hands values to whichever actor is idle; what comes while none is waits.

    Results are had by `get_next` in the order of submission or by `get_next_unordered` as they come, and must be had: an actor
    is idle again only when its result has been fetched. Not for several threads at once.

    Args:
        actors: Handles of the actors; an iterable.
    """

    def __init__(self, actors: Iterable[ActorHandle]) -> None:
        self._idle = list(actors)
        self._busy: dict[int, tuple[Any, ActorHandle]] = {}
        """Result and actor, by the number of the submission."""
        self._submitted = 0
        self._returned = 0
        """All numbers below have been returned, or may not be asked for in order any more."""
        self._waiting: deque[tuple[Function[V], V]] = deque()

    def map(self, fn: Function[V], values: Iterable[V]) -> Iterator[Any]:
        """Apply `fn` to each value; the results in order, as they are iterated over. Drops results not fetched before.

        The iterator raises what a call raised, and may be continued.
        """
        self._drop_results(self.get_next)
        for value in values:
            self.submit(fn, value)
        return self._results(self.get_next)

    def map_unordered(self, fn: Function[V], values: Iterable[V]) -> Iterator[Any]:
        """As `map`, with the results in the order in which they come."""
        self._drop_results(self.get_next_unordered)
        for value in values:
            self.submit(fn, value)
        return self._results(self.get_next_unordered)

    def _drop_results(self, get_next: Callable[..., Any]) -> None:
        while self.has_next():
            try:
                get_next(timeout=0, ignore_if_timedout=True)
            except TimeoutError:
                pass

    def _results(self, get_next: Callable[[], Any]) -> Iterator[Any]:
        while self.has_next():
            yield get_next()

    def submit(self, fn: Function[V], value: V) -> None:
        """Have an idle actor work on `value`; with none idle, it waits for one. Does not block."""
        if not self._idle:
            self._waiting.append((fn, value))
            return
        actor = self._idle.pop()
        self._busy[self._submitted] = (fn(actor, value), actor)
        self._submitted += 1

    def has_next(self) -> bool:
        """Whether there are results that have not been returned."""
        return bool(self._busy)

    def get_next(self, timeout: float | None = None, ignore_if_timedout: bool = False) -> Any:
        """The next result in the order of submission. Blocks until it exists.

        Args:
            timeout: Seconds; None waits for ever.
            ignore_if_timedout: Give up the result, and call its actor idle, where the time runs out.

        Raises:
            StopIteration: Nothing was submitted that has not been returned.
            TimeoutError: The time is over.
            ValueError: `get_next_unordered` has returned a later one.
            Exception: What the call raised. An actor that died leaves the pool.
        """
        self._check_has_next()
        if self._returned >= self._submitted:
            raise ValueError("It is not allowed to call get_next() after get_next_unordered().")
        number = self._returned
        refs = _refs(self._busy[number][0])
        is_ready = timeout is None or not hpcray.wait(refs, num_returns=len(refs), timeout=timeout)[1]
        return self._take(number, is_ready=is_ready, ignore=ignore_if_timedout)

    def get_next_unordered(self, timeout: float | None = None, ignore_if_timedout: bool = False) -> Any:
        """The result that comes next. Arguments and errors as for `get_next`; given up is the one submitted first."""
        self._check_has_next()
        first = {_refs(future)[0]: number for number, (future, _) in self._busy.items()}
        ready, _ = hpcray.wait(list(first), num_returns=1, timeout=timeout)
        number = first[ready[0]] if ready else min(self._busy)
        return self._take(number, is_ready=bool(ready), ignore=ignore_if_timedout)

    def _check_has_next(self) -> None:
        if not self.has_next():
            raise StopIteration("No more results to get")

    def _take(self, number: int, *, is_ready: bool, ignore: bool) -> Any:
        if not is_ready and not ignore:
            raise TimeoutError("Timed out waiting for result")
        future, actor = self._busy.pop(number)
        self._returned = max(self._returned, number + 1)
        if not is_ready:
            self._take_back(actor)
            raise TimeoutError(f"Timed out waiting for result. The task {future} has been ignored.")
        try:
            result = hpcray.get(future)
        except ActorDiedError:
            self._employ()  # the others
            raise
        except BaseException:
            self._take_back(actor)
            raise
        self._take_back(actor)
        return result

    def _take_back(self, actor: ActorHandle) -> None:
        self._idle.append(actor)
        self._employ()

    def _employ(self) -> None:
        if self._waiting and self._idle:
            self.submit(*self._waiting.popleft())

    def has_free(self) -> bool:
        """Whether an actor is idle and nothing waits."""
        return bool(self._idle) and not self._waiting

    def pop_idle(self) -> ActorHandle | None:
        """Take an idle actor out of the pool; None if there is none."""
        return self._idle.pop() if self.has_free() else None

    def push(self, actor: ActorHandle) -> None:
        """Add an actor to the pool.

        Raises:
            ValueError: It is in there.
        """
        if actor in self._idle or any(actor == busy for _, busy in self._busy.values()):
            raise ValueError("Actor already belongs to current ActorPool")
        self._take_back(actor)


def _refs(future: Any) -> list[Any]:
    return future if isinstance(future, list) else [future]
