"""The disk of one raylet's object store: files without names, and the threads that write and read them.

Rules:
  1. A spill file has no name (O_TMPFILE; where the file system has none, it is unlinked at once): nothing is left however the
     job ends, and nobody else can open it. What is written stays readable even if its directory is removed.
  2. A file's space is given back with its last object. Before that, each object that goes leaves a hole, where the file system
     can make one, so that a long-lived neighbour does not keep dead space. What is being read goes when it has been read.
  3. Threads exist from the first write on. They touch descriptors, the arena and nothing else; what came of it is told in the
     thread of the event loop. Reads go before writes: somebody waits for each of them.
  4. A checksum is taken while writing and compared while reading: what the disk does to the bytes is noticed.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import queue
import resource
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from zlib import crc32

from hpcray.store.entry import Extent
from hpcray.store.memory import Block

STEP = 8 << 20
"""Bytes written or read at a time: between two, a thread sees that the job ends."""
THREADS = 4
CLOSE_TIMEOUT = 5.0
"""Seconds for all threads together."""
PAGE = 4096
"""Objects begin at multiples of it: holes are made of whole pages."""

_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2
_READ, _WRITE, _END = range(3)
"""What goes first."""

_Job = tuple[int, int, Callable[[], None] | None]


def spill_directory(chosen: str, env: Mapping[str, str]) -> str:
    """Where this node's spilled objects go: the user's word, the job's own local disk, or what all programs use (/tmp)."""
    return chosen or env.get("SLURM_TMPDIR") or env.get("TMPDIR") or tempfile.gettempdir()


class _Ended(Exception):
    """The job is over; what was being written or read is of no interest any more."""


@dataclass
class _File:
    descriptor: int
    extents: set[Extent] = field(default_factory=set)
    """Objects in it that are still needed."""
    readers: dict[Extent, int] = field(default_factory=dict)
    """Reads under way, by object: it must stay, and so must the descriptor, or another file would be read."""


class SpillFiles:
    """What lies on disk. All methods are for the thread of the event loop.

    Args:
        directory: Where files are made. It is looked at when something is to be written.
        view: A writable view of a block's memory.
        call_soon: Runs a callback in the thread of the event loop, from any thread.
    """

    def __init__(
        self,
        directory: str,
        view: Callable[[Block], memoryview],
        call_soon: Callable[[Callable[[], None]], None],
    ) -> None:
        self.directory = directory
        self._view = view
        self._call_soon = call_soon
        self._files: dict[int, _File] = {}
        self._new: dict[int, int] = {}
        """Descriptors of files that are being written, or of which `spill` was not told yet. Threads add to it."""
        self._numbers = itertools.count(1)
        self._jobs: queue.PriorityQueue[_Job] = queue.PriorityQueue()
        self._serials = itertools.count()
        self._threads: list[threading.Thread] = []
        self._is_ended = False

    # ---------------------------------------------------------------------------------------------- for the event loop
    def spill(self, blocks: list[Block], done: Callable[[list[Extent], str | None], None]) -> None:
        """Write blocks into a new file; `done` gets where the first of them lie, and why the others could not be written."""
        if not self._threads:
            self._start_threads()
        number = next(self._numbers)
        views = [self._view(block) for block in blocks]

        def job() -> None:
            try:
                extents, error = self._write_file(number, views)
            finally:
                for view in views:
                    view.release()
            self._call_soon(lambda: written(extents, error))

        def written(extents: list[Extent], error: str | None) -> None:
            descriptor = self._new.pop(number, None)
            if extents and descriptor is not None:
                self._files[number] = _File(descriptor, set(extents))
            elif descriptor is not None:
                os.close(descriptor)
            done(extents, error)

        self._jobs.put((_WRITE, next(self._serials), job))

    def restore(self, extent: Extent, block: Block, done: Callable[[str | None], None]) -> None:
        """Read an object into a block; `done` gets None, or what went wrong and where."""
        file = self._files[extent.file]
        file.readers[extent] = file.readers.get(extent, 0) + 1
        view = self._view(block)

        def job() -> None:
            try:
                error = self._read(file.descriptor, extent, view)
            finally:
                view.release()
            self._call_soon(lambda: read(error))

        def read(error: str | None) -> None:
            file.readers[extent] -= 1
            if not file.readers[extent]:
                del file.readers[extent]
                if extent not in file.extents:
                    self._give_back(extent)
            done(error)

        self._jobs.put((_READ, next(self._serials), job))

    def forget(self, extent: Extent) -> None:
        """Give back the disk space of an object."""
        file = self._files[extent.file]
        file.extents.remove(extent)
        if extent not in file.readers:
            self._give_back(extent)

    def _give_back(self, extent: Extent) -> None:
        file = self._files[extent.file]
        if file.extents or file.readers:
            _punch_hole(file.descriptor, extent.offset, extent.size)
        else:
            os.close(file.descriptor)
            del self._files[extent.file]

    def close(self) -> None:
        """End the threads and close all files. Blocks for what is left of one step of each thread, but not for a disk that
        does not answer: the end of the process takes such a thread and the files along."""
        self._is_ended = True
        for _ in self._threads:
            self._jobs.put((_END, next(self._serials), None))
        deadline = monotonic() + CLOSE_TIMEOUT
        for thread in self._threads:
            thread.join(max(0.0, deadline - monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            return
        self._threads.clear()
        for descriptor in (*self._new.values(), *(file.descriptor for file in self._files.values())):
            os.close(descriptor)
        self._new.clear()
        self._files.clear()

    # ------------------------------------------------------------------------------------------------------ in threads
    def _start_threads(self) -> None:
        # A file is a descriptor, and a store of a terabyte has ten thousand of them; most limits are soft ones.
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        for number in range(min(THREADS, max(2, len(os.sched_getaffinity(0))))):
            thread = threading.Thread(target=self._work, name=f"hpcray-spill-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self) -> None:
        while (job := self._jobs.get()[2]) is not None:
            with contextlib.suppress(_Ended):
                job()

    def _write_file(self, number: int, views: list[memoryview]) -> tuple[list[Extent], str | None]:
        extents: list[Extent] = []
        descriptor = -1
        offset = 0
        self._stop_if_ended()
        try:
            descriptor = self._new[number] = _create(self.directory)
            for view in views:
                checksum = self._write(descriptor, view, offset)
                extents.append(Extent(number, offset, view.nbytes, checksum))
                offset = -(-(offset + view.nbytes) // PAGE) * PAGE
        except OSError as error:
            if descriptor >= 0:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, offset)
            return extents, f"{error.strerror}, in {self.directory}"
        return extents, None

    def _write(self, descriptor: int, view: memoryview, offset: int) -> int:
        checksum = 0
        done = 0
        while done < view.nbytes:
            self._stop_if_ended()
            with view[done : done + STEP] as step:
                written = os.pwrite(descriptor, step, offset + done)
                with step[:written] as part:
                    checksum = crc32(part, checksum)
            done += written
        return checksum

    def _read(self, descriptor: int, extent: Extent, view: memoryview) -> str | None:
        checksum = 0
        done = 0
        where = f"{extent.size:,} bytes at offset {extent.offset:,} of spill file {extent.file} in {self.directory}"
        while done < extent.size:
            self._stop_if_ended()
            with view[done : min(done + STEP, extent.size)] as step:
                try:
                    read = os.preadv(descriptor, [step], extent.offset + done)
                except OSError as error:
                    return f"{where}: {error.strerror}"
                if read == 0:
                    return f"{where}: the file ends after {done:,} of them"
                with step[:read] as part:
                    checksum = crc32(part, checksum)
            done += read
        if checksum != extent.checksum:
            return f"{where}: the checksum is {checksum:08x}, not {extent.checksum:08x} as when it was written"
        return None

    def _stop_if_ended(self) -> None:
        if self._is_ended:
            raise _Ended


def _create(directory: str) -> int:
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC | os.O_EXCL, 0o600)
    except OSError as error:
        # Not every file system can: NFS, old kernels. A directory that is missing or closed to us fails again below.
        first = error
    try:
        descriptor, path = tempfile.mkstemp(prefix="hpcray-", dir=directory)
    except OSError:
        raise first from None
    Path(path).unlink()
    return descriptor


_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def _punch_hole(descriptor: int, offset: int, size: int) -> None:
    # Where it cannot be done, the space is given back with the file.
    size = -(-size // PAGE) * PAGE
    _libc.fallocate(descriptor, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, size)
