"""joblib's backend "ray": each batch of calls is a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import joblib
from joblib.parallel import AutoBatchingMixin, ParallelBackendBase, register_parallel_backend

import hpcray
from hpcray.object_ref import ObjectRef
from hpcray.util.executor import RayExecutor

LARGE = 100_000
"""Bytes. Arrays from here on are stored once for a whole `Parallel` call, not pickled with each batch."""
_OLDEST = (1, 3)
"""The first joblib that takes results by callbacks."""


def register() -> None:
    """As `register_ray`.

    Raises:
        ImportError: joblib is too old.
    """
    if tuple(map(int, joblib.__version__.split(".")[:2])) < _OLDEST:
        raise ImportError(f"joblib {joblib.__version__} is too old for the backend 'ray': it takes 1.3 or later")
    register_parallel_backend("ray", RayBackend)


class RayBackend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]
    """Runs batches as tasks; -1 jobs are as many as the job has CPUs.

    Args:
        ray_remote_args: Options of the tasks, as for `hpcray.remote`.
        joblib_options: What joblib itself passes.
    """

    supports_retrieve_callback = True
    supports_inner_max_num_threads = False

    def __init__(self, *, ray_remote_args: Mapping[str, Any] | None = None, **joblib_options: Any) -> None:
        super().__init__(**joblib_options)
        self._remote_args = dict(ray_remote_args or {})
        self._executor: RayExecutor | None = None
        self._n_jobs = 1
        self._stored: dict[int, tuple[Any, ObjectRef[Any]]] = {}
        """Large arguments by their identity, which lasts as they are kept here."""

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """How many run at a time: below 0, all CPUs of the job but ``-1 - n_jobs``.

        Raises:
            ValueError: For 0.
        """
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        if n_jobs is None:
            return 1
        if n_jobs > 0:
            return n_jobs
        if not hpcray.is_initialized():
            hpcray.init()
        cpus = int(hpcray.cluster_resources().get("CPU", 1))
        return max(1, cpus + 1 + n_jobs)

    def configure(
        self,
        n_jobs: int = 1,
        parallel: Any = None,
        prefer: Any = None,
        require: Any = None,
        ray_remote_args: Mapping[str, Any] | None = None,
        **_more: Any,
    ) -> int:
        """joblib's call before each `Parallel` call."""
        self.parallel = parallel
        if ray_remote_args is not None:
            self._remote_args = dict(ray_remote_args)
        self._n_jobs = self.effective_n_jobs(n_jobs)
        self._executor = RayExecutor(max_workers=self._n_jobs, **self._remote_args)
        return self._n_jobs

    def submit(self, func: Any, callback: Callable[[Future[Any]], None] | None = None) -> Future[Any]:
        """joblib's call for each batch."""
        assert self._executor is not None
        future = self._executor.submit(_run, self._with_stored(func))
        if callback is not None:
            future.add_done_callback(callback)
        return future

    apply_async = submit  # what joblib before 1.5 calls it

    def retrieve_result_callback(self, out: Future[Any]) -> Any:
        """joblib's call for a batch that is done."""
        return out.result()

    def terminate(self) -> None:
        """joblib's call at the end of a `Parallel` call, or of a block of them."""
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._executor = None
        self._stored.clear()
        self.reset_batch_stats()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """joblib's call when a batch failed; what runs goes on, and nobody looks at it."""
        self.terminate()
        if ensure_ready:
            self._executor = RayExecutor(max_workers=self._n_jobs, **self._remote_args)

    def _with_stored(self, batch: Any) -> Any:
        items = getattr(batch, "items", None)
        if not isinstance(items, list):
            return batch
        batch.items = [
            (
                function,
                tuple(self._store(value) for value in arguments),
                {name: self._store(value) for name, value in options.items()},
            )
            for function, arguments, options in items
        ]
        return batch

    def _store(self, value: Any) -> Any:
        size = getattr(value, "nbytes", 0)
        if not isinstance(size, int) or size < LARGE:
            return value
        kept = self._stored.get(id(value))
        if kept is None:
            kept = self._stored[id(value)] = (value, hpcray.put(value))
        return _Stored(kept[1])


class _Stored:
    """Stands for a large argument in a batch."""

    def __init__(self, ref: ObjectRef[Any]) -> None:
        self.ref = ref


def _run(batch: Any) -> Any:
    items = getattr(batch, "items", None)
    if isinstance(items, list):
        batch.items = [
            (function, [_load(value) for value in arguments], {name: _load(value) for name, value in options.items()})
            for function, arguments, options in items
        ]
    return batch()


def _load(value: Any) -> Any:
    return hpcray.get(value.ref) if isinstance(value, _Stored) else value
