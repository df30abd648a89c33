"""The shared memory of one raylet's objects: a memfd, mapped by its clients and by its peers on the host.

It is no file in /dev/shm, so the size limit there does not apply and nothing is left behind, even by kill -9.
The first `CONTROL_PAGE` bytes hold the raylet's `asleep` flag; objects begin after them. Offsets are those of
the memfd: the same in every process.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter

from hpcray.store.first_touch import BY_CALL, FirstTouch, split_parts

CONTROL_PAGE = 4096  # bytes
PREFAULT_STEP = 2 << 20  # bytes: measured 1.6 to 2.0 ms, at 1.0 to 1.3 GB/s for first touches

# Of Linux 5.14; older kernels answer EINVAL. Python's mmap module has no names for them.
_MADV_POPULATE_READ = 22
_MADV_POPULATE_WRITE = 23

# With huge pages, a first touch is four to six times as fast, and a mapping of touched memory costs nothing. Where this
# file says "always" or "within_size", arenas have them anyway; with "advise", who asks; by default nobody.
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")

# No process may cut the file short: the others would die of SIGBUS.
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


WRITE_STEP = 4 << 20
"""Bytes of untouched memory that are filled at a time: some 2 ms, for which others may have to wait."""
WARM_CHUNK = 2 << 20
"""Bytes of an arena that are remembered as mapped together."""


class Arena:
    """One process's mapping of an arena. Whoever made it closes it; views of it may live longer."""

    __slots__ = ("_fd", "_first_touch", "_map", "_prefaulted", "_warm", "_whole")

    def __init__(self, fd: int, length: int) -> None:
        """Map the `length` bytes of `fd`, control page included. Use `create` or `attach`.

        Raises:
            OSError: The kernel refuses the mapping; `fd` is still the caller's.
        """
        self._map: mmap.mmap | None = mmap.mmap(fd, length)
        self._fd = fd
        self._prefaulted = 0
        self._warm = bytearray(length // WARM_CHUNK)
        """Which chunks are in this mapping already: to ask the kernel again costs a tenth of a large copy."""
        # One ctypes type for all pins. A type for each size, (c_char * n), costs 26 us, not 4, when sizes
        # differ, and each type is a reference cycle that waits for the garbage collector.
        self._whole = ctypes.c_char * length
        asks_for_huge_pages = "[advise]" in _read(_HUGE_PAGES)
        if asks_for_huge_pages:
            self._map.madvise(mmap.MADV_HUGEPAGE)
        # Only a fault in advised memory gets a huge page.
        self._first_touch = FirstTouch(only_faults=asks_for_huge_pages)
        # A core dump of a crashed worker is about the worker; with the arena it might fill a disk.
        self._map.madvise(mmap.MADV_DONTDUMP)

    @classmethod
    def create(cls, size: int) -> Arena:
        """Make a new arena with room for `size` bytes of objects or, rounded up to a page, a little more.

        It takes no memory until its pages are touched. The descriptor is closed on exec.

        Raises:
            ValueError: `size` is not positive.
            OSError: The kernel refuses: out of descriptors or address space.
        """
        if size < 1:
            raise ValueError(f"an arena has room for at least one byte, not {size}")
        length = -(-(CONTROL_PAGE + size) // mmap.PAGESIZE) * mmap.PAGESIZE
        fd = os.memfd_create("hpcray", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, length)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            return cls(fd, length)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def attach(cls, fd: int, *, size: int | None = None) -> Arena:
        """Map the arena behind a received descriptor, which then belongs to this Arena.

        Args:
            fd: The descriptor.
            size: The `size` that the creator's Arena has, as a check; ``None`` takes it from the descriptor.

        Raises:
            ValueError: `fd` is not an arena, or not one of `size` bytes. It is still the caller's.
            OSError: `fd` is no descriptor, or the kernel refuses the mapping. It is still the caller's.
        """
        length = os.fstat(fd).st_size
        if length <= CONTROL_PAGE or (size is not None and length != CONTROL_PAGE + size):
            raise ValueError(f"descriptor {fd} has {length} bytes: not an arena of {size or 'any'} bytes")
        return cls(fd, length)

    @property
    def fd(self) -> int:
        """The descriptor to hand to clients and peers; -1 once closed."""
        return self._fd

    @property
    def map(self) -> mmap.mmap:
        """The shared mapping of the whole memfd, control page included; pages come in as they are touched.

        Raises:
            ValueError: The arena is closed.
        """
        if self._map is None:
            raise ValueError("the arena is closed")
        return self._map

    @property
    def size(self) -> int:
        """Bytes for objects: the offsets from `CONTROL_PAGE` to `CONTROL_PAGE + size`."""
        return len(self.map) - CONTROL_PAGE

    @property
    def asleep(self) -> bool:
        """Whether the raylet sleeps, or is about to, so that who sends it something must ring its doorbell.

        The raylet sets it before it looks for messages a last time; a sender sends, then looks at it.
        """
        return self.map[0] != 0

    @asleep.setter
    def asleep(self, asleep: bool) -> None:
        self.map[0] = asleep

    def view(self, offset: int, n: int) -> memoryview:
        """A writable view of `n` bytes of objects at `offset`; the caller knows whose bytes they are.

        Raises:
            ValueError: The range is not inside the arena's objects, or the arena is closed.
        """
        self._require_inside(offset, n)
        return memoryview(self.map)[offset : offset + n]

    def pinned_view(self, offset: int, n: int, on_release: Callable[[], None]) -> memoryview:
        """A read-only view of `n` bytes at `offset`; `on_release` is called when nobody can see them.

        The call comes once, when the view and all slices, casts and arrays over it have died, in whichever
        thread dropped the last of them and perhaps in the middle of anything: it must not block, nor refer to
        the view. It does not come at the end of the interpreter.

        Raises:
            ValueError: The range is not inside the arena's objects, or the arena is closed.
        """
        self._require_inside(offset, n)
        pin = self._whole.from_buffer(self.map)
        weakref.finalize(pin, on_release).atexit = False
        return memoryview(pin).cast("B")[offset : offset + n].toreadonly()

    def write(self, offset: int, parts: Sequence[bytes | memoryview]) -> None:
        """Lay bytes end to end from `offset` on; the caller knows that the block is as large as they are.

        Blocks for the copy: at the speed of memory where the pages are there, at some 2 GB/s where the kernel has to find
        and clear them.

        Raises:
            ValueError: The range is not inside the arena's objects, or the arena is closed.
            OSError: The kernel has no page to give.
        """
        n = sum(map(len, parts))
        self._require_inside(offset, n)
        if n == 0:
            return
        if self._is_warm(offset, n) or self._is_touched(offset + n - 1):
            self.warm(offset, n)
            self._copy(offset, parts)
            return
        for pieces in split_parts(parts, WRITE_STEP):
            size = sum(map(len, pieces))
            way = self._first_touch.choose()
            start = perf_counter()
            if way == BY_CALL:
                self._write_file(offset, pieces)
            else:
                first = offset // mmap.PAGESIZE * mmap.PAGESIZE
                self._populate(_MADV_POPULATE_WRITE, first, offset + size - first)
                self._copy(offset, pieces)
            self._first_touch.note(way, (perf_counter() - start) / size)
            offset += size

    def _copy(self, offset: int, parts: Sequence[bytes | memoryview]) -> None:
        with memoryview(self.map) as target:
            for part in parts:
                end = offset + len(part)
                target[offset:end] = part
                offset = end

    def _write_file(self, offset: int, parts: Sequence[memoryview]) -> None:
        left = deque(parts)
        while left:
            done = os.pwritev(self._fd, left, offset)
            offset += done
            while left and done >= len(left[0]):
                done -= len(left.popleft())
            if done:
                left[0] = left[0][done:]

    def warm(self, offset: int, n: int) -> None:
        """Bring the pages of a range into this mapping at once, instead of by a fault for each of them.

        Blocks while the kernel works: about 0.1 s per GB of pages that any process has touched, 0.8 s per GB
        of others, which are added. Does nothing on kernels before 5.14.

        Raises:
            ValueError: The range is not inside the arena's objects, or the arena is closed.
            OSError: The kernel has no page to give.
        """
        self._require_inside(offset, n)
        if n == 0 or self._is_warm(offset, n):
            return
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        # The read variant takes a third of the time of the other on pages that exist (it maps 16 per fault), and they may
        # be written then without a fault.
        if self._populate(_MADV_POPULATE_READ, start, offset + n - start):
            first, last = -(-offset // WARM_CHUNK), (offset + n) // WARM_CHUNK
            if first < last:
                self._warm[first:last] = b"\1" * (last - first)

    def _is_warm(self, offset: int, n: int) -> bool:
        """Whether all chunks of the range, but for its odd ends, are in this mapping; false where it is all odd ends."""
        first, last = -(-offset // WARM_CHUNK), (offset + n) // WARM_CHUNK
        return first < last and self._warm.find(0, first, last) < 0

    def prefault_step(self, max_bytes: int = PREFAULT_STEP) -> int:
        """Touch the next `max_bytes`, rounded up to pages, from low to high offsets, ahead of their use.

        Blocks for about 2 ms per `PREFAULT_STEP` bytes, less where they were touched already.

        Returns:
            Bytes done; 0 when all of the arena has been, or if the kernel is older than 5.14.

        Raises:
            ValueError: The arena is closed.
            OSError: The kernel has no page to give: the arena is larger than the memory.
        """
        start = self._prefaulted
        length = min(-(-max_bytes // mmap.PAGESIZE) * mmap.PAGESIZE, len(self.map) - start)
        if length <= 0 or not self._populate(_MADV_POPULATE_WRITE, start, length):
            return 0
        self._prefaulted += length
        return length

    def close(self) -> None:
        """Close the descriptor and, with the last view of it, the mapping. May be called again."""
        if self._map is None:
            return
        os.close(self._fd)
        self._fd = -1
        try:
            self._map.close()
        except BufferError:
            pass  # views are left: the last of them takes the mapping with it
        self._map = None

    def _require_inside(self, offset: int, n: int) -> None:
        end = len(self.map)
        if n < 0 or not CONTROL_PAGE <= offset <= end - n:
            raise ValueError(f"{n} bytes at offset {offset} are not inside {CONTROL_PAGE} to {end}")

    def _is_touched(self, offset: int) -> bool:
        # A range's last page stands for it: memory is used from low to high offsets, and a wrong guess costs
        # only time. SEEK_HOLE would be exact, but walks all touched pages up to the next hole, 50 ns each.
        page = offset // mmap.PAGESIZE * mmap.PAGESIZE
        try:
            return os.lseek(self._fd, page, os.SEEK_DATA) == page
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data from here to the end
                return False
            raise

    def _populate(self, advice: int, start: int, length: int) -> bool:
        try:
            self.map.madvise(advice, start, length)
        except OSError as error:
            if error.errno == errno.EINVAL:
                return False
            raise
        return True


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
