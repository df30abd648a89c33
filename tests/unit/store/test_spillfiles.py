"""The disk itself: what is written comes back, holes and files go, and errors say where and why."""

from __future__ import annotations

import os
import resource
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hpcray.store import spillfiles
from hpcray.store.entry import Extent
from hpcray.store.memory import Block
from hpcray.store.spillfiles import PAGE, THREADS, SpillFiles, spill_directory

SIZES = [300_000, 5, 4096, 120_001]


class Disk:
    """Spill files over a bytearray, whose answers are waited for."""

    def __init__(self, directory: Path) -> None:
        self.memory = bytearray(os.urandom(1 << 20))
        self.soon: deque[Callable[[], None]] = deque()
        self.files = SpillFiles(str(directory), self._view, self.soon.append)

    def _view(self, block: Block) -> memoryview:
        return memoryview(self.memory)[block.offset : block.offset + block.size]

    def answer(self) -> None:
        while not self.soon:
            pass
        self.soon.popleft()()

    def spill(self, sizes: list[int]) -> tuple[list[Block], list[Extent], str | None]:
        offsets = [sum(sizes[:index]) for index in range(len(sizes))]
        blocks = [Block(b"%d" % offset, 0, offset, size) for offset, size in zip(offsets, sizes, strict=True)]
        told: list[tuple[list[Extent], str | None]] = []
        self.files.spill(blocks, lambda extents, error: told.append((extents, error)))
        self.answer()
        return blocks, *told[0]

    def restore(self, extent: Extent, block: Block) -> str | None:
        told: list[str | None] = []
        self.files.restore(extent, block, told.append)
        self.answer()
        return told[0]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    descriptors = len([*Path("/proc/self/fd").iterdir()])
    disk = Disk(tmp_path)
    yield disk
    disk.files.close()
    assert len([*Path("/proc/self/fd").iterdir()]) == descriptors


def descriptor(directory: Path) -> int:
    paths = [path for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    (found,) = [int(p.name) for p in paths if str(os.path.realpath(p)).startswith(str(directory))]
    return found


def test_objects_share_a_file_without_a_name_and_come_back(disk, tmp_path):
    blocks, extents, error = disk.spill(SIZES)
    assert error is None
    assert [extent.size for extent in extents] == SIZES
    assert all(extent.offset % PAGE == 0 for extent in extents)
    assert not any(tmp_path.iterdir())
    before = bytes(disk.memory)
    for block, extent in zip(blocks, extents, strict=True):
        disk.memory[block.offset : block.offset + block.size] = bytes(block.size)
        assert disk.restore(extent, block) is None
    assert disk.memory == before


def test_an_object_that_goes_leaves_a_hole_and_the_last_one_closes_the_file(disk, tmp_path):
    _, extents, _ = disk.spill(SIZES)
    fd = descriptor(tmp_path)
    full = os.fstat(fd).st_blocks
    disk.files.forget(extents[0])
    assert os.fstat(fd).st_blocks <= full - (SIZES[0] - PAGE) // 512
    for extent in extents[1:]:
        disk.files.forget(extent)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_file_that_is_being_read_stays_until_it_is_read(disk, tmp_path):
    (block,), (extent,), _ = disk.spill([500_000])
    told: list[str | None] = []
    disk.files.restore(extent, block, told.append)
    disk.files.forget(extent)
    disk.answer()
    assert told == [None]
    with pytest.raises(ValueError, match="not enough values"):
        descriptor(tmp_path)


def test_what_goes_while_its_neighbour_is_read_leaves_a_hole_at_once_and_what_is_read_afterwards(disk, tmp_path):
    blocks, (first, second, last), _ = disk.spill([300_000, 300_000, 4096])
    fd = descriptor(tmp_path)
    full = os.fstat(fd).st_blocks
    told: list[str | None] = []
    disk.files.restore(first, blocks[0], told.append)
    disk.files.forget(second)
    one_less = os.fstat(fd).st_blocks
    assert one_less <= full - (300_000 - PAGE) // 512
    disk.files.forget(first)
    assert os.fstat(fd).st_blocks == one_less, "it is still being read"
    disk.answer()
    assert told == [None]
    assert os.fstat(fd).st_blocks <= one_less - (300_000 - PAGE) // 512
    assert disk.restore(last, blocks[2]) is None


def test_a_write_of_which_nobody_was_told_leaves_no_descriptor(disk):
    disk.files.spill([Block(b"0", 0, 0, 5000)], lambda *_: None)
    while not disk.soon:
        pass
    disk.files.close()  # the fixture counts them


def test_writes_that_the_end_cuts_short_leave_no_descriptor(disk, monkeypatch):
    monkeypatch.setattr(spillfiles, "STEP", PAGE)
    write = os.pwrite
    has_begun = threading.Event()

    def wait_for_the_end(*arguments: Any) -> int:
        has_begun.set()
        while not disk.files._is_ended:
            pass
        return write(*arguments)

    monkeypatch.setattr(os, "pwrite", wait_for_the_end)
    for number in range(2 * THREADS):
        disk.files.spill([Block(b"%d" % number, 0, number * 50_000, 50_000)], lambda *_: None)
    has_begun.wait()
    disk.files.close()
    assert not disk.soon, "none was finished"


def test_a_changed_byte_and_a_file_cut_short_are_noticed(disk, tmp_path):
    (block, other), (extent, second), _ = disk.spill([5000, 5000])
    fd = descriptor(tmp_path)
    os.pwrite(fd, bytes([os.pread(fd, 1, 100)[0] ^ 128]), 100)
    error = disk.restore(extent, block)
    assert error is not None
    assert error.startswith(f"5,000 bytes at offset 0 of spill file {extent.file} in {tmp_path}: the checksum is ")
    os.ftruncate(fd, second.offset + 1000)
    error = disk.restore(second, other)
    assert error is not None
    assert error.endswith("the file ends after 1,000 of them")


def test_what_fitted_before_the_disk_was_full_is_kept(disk, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))
    try:
        blocks, extents, error = disk.spill([150_000, 150_000, 150_000])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error == f"File too large, in {tmp_path}"
    assert [extent.size for extent in extents] == [150_000, 150_000]
    for block, extent in zip(blocks[:2], extents, strict=True):
        assert disk.restore(extent, block) is None


def test_a_directory_that_is_missing_is_an_error_until_it_is_there(tmp_path):
    directory = tmp_path / "later"
    disk = Disk(directory)
    _, extents, error = disk.spill([100])
    assert (extents, error) == ([], f"No such file or directory, in {directory}")
    directory.mkdir()
    assert disk.spill([100])[2] is None
    disk.files.close()


def test_where_files_without_names_cannot_be_made_they_are_unlinked_at_once(disk, tmp_path, monkeypatch):
    real = os.open

    def refuse(path: str, flags: int, *more: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(95, "Operation not supported")
        return real(path, flags, *more)

    monkeypatch.setattr(os, "open", refuse)
    (block,), (extent,), error = disk.spill([5000])
    assert error is None
    assert not any(tmp_path.iterdir())
    assert os.fstat(descriptor(tmp_path)).st_mode & 0o777 == 0o600
    assert disk.restore(extent, block) is None


def test_the_directory_is_the_users_word_then_the_jobs_own_disk():
    env = {"SLURM_TMPDIR": "/local/17", "TMPDIR": "/scratch"}
    assert spill_directory("/nvme", env) == "/nvme"
    assert spill_directory("", env) == "/local/17"
    assert spill_directory("", {"TMPDIR": "/scratch"}) == "/scratch"
    assert Path(spill_directory("", {})).is_dir()
