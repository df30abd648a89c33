"""`multiprocessing.Pool` on the job's nodes: put `from hpcray.util.multiprocessing import Pool` in place of the import."""

from __future__ import annotations

from multiprocessing import JoinableQueue, TimeoutError  # noqa: A004 - their names

from hpcray.util.multiprocessing.pool import Pool

__all__ = ["JoinableQueue", "Pool", "TimeoutError"]
