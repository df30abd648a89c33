"""Results as they come. Names and semantics are Ray's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import hpcray
from hpcray.object_ref import ObjectRef
from hpcray.remote_function import RemoteFunction, RemoteFunctionWithOptions

CHUNK_SIZE = 10
"""How many results are waited for at a time: Ray's default."""
BACKPRESSURE_SIZE = 100
"""How many tasks are under way at most: Ray's default."""


def as_completed(
    refs: Sequence[ObjectRef[Any]], *, chunk_size: int = CHUNK_SIZE, yield_obj_refs: bool = False, **wait_options: Any
) -> Iterator[Any]:
    """The values of references, some `chunk_size` of them at a time, as they come to exist.

    Args:
        refs: Distinct references.
        chunk_size: How many to wait for before the next values are yielded.
        yield_obj_refs: Yield the references instead of their values.
        wait_options: `timeout` and `fetch_local`, for each `hpcray.wait`.

    Raises:
        ValueError: `chunk_size` is less than 1, or `num_returns` was given.
        Exception: What a task raised.
    """
    _check(chunk_size, wait_options)
    pending = list(refs)
    while pending:
        results, pending = _next(pending, chunk_size, yield_obj_refs, wait_options)
        yield from results


def map_unordered(
    fn: RemoteFunction | RemoteFunctionWithOptions,
    items: Iterable[Any],
    *,
    backpressure_size: int | None = BACKPRESSURE_SIZE,
    chunk_size: int = CHUNK_SIZE,
    yield_obj_refs: bool = False,
    **wait_options: Any,
) -> Iterator[Any]:
    """Call a remote function with each item; the results as they come. Arguments and errors as for `as_completed`.

    Args:
        fn: A remote function of one argument.
        items: May be endless: it is read as results are asked for.
        backpressure_size: How many calls are under way at most; None: any number.
        chunk_size: As for `as_completed`.
        yield_obj_refs: Likewise.
        wait_options: Likewise.

    Raises:
        ValueError: `backpressure_size` is less than 1.
    """
    if backpressure_size is not None and backpressure_size <= 0:
        raise ValueError("backpressure_size must be positive.")
    _check(chunk_size, wait_options)
    pending: list[ObjectRef[Any]] = []
    for item in items:
        ref = fn.remote(item)
        assert isinstance(ref, ObjectRef)
        pending.append(ref)
        if backpressure_size is not None and len(pending) >= backpressure_size:
            results, pending = _next(pending, chunk_size, yield_obj_refs, wait_options)
            yield from results
    yield from as_completed(pending, chunk_size=chunk_size, yield_obj_refs=yield_obj_refs, **wait_options)


def _check(chunk_size: int, wait_options: dict[str, Any]) -> None:
    if chunk_size < 1:
        raise ValueError("`chunk_size` must be >= 1")
    if "num_returns" in wait_options:
        raise ValueError("Use the `chunk_size` argument instead of `num_returns`.")


def _next(
    refs: list[ObjectRef[Any]], chunk_size: int, yield_obj_refs: bool, wait_options: dict[str, Any]
) -> tuple[list[Any], list[ObjectRef[Any]]]:
    ready, pending = hpcray.wait(refs, num_returns=min(chunk_size, len(refs)), **wait_options)
    return ready if yield_obj_refs else hpcray.get(ready), pending
