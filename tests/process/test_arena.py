"""Arenas in real processes: what is shared, what is read-only, when pins end, and that nothing stays."""

from __future__ import annotations

import errno
import fcntl
import gc
import itertools
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hpcray.store.arena import CONTROL_PAGE, PREFAULT_STEP, Arena

# Receives the arena, says "ready", then does one command per line: the peer of most tests below.
PEER = """
import socket, sys
from hpcray.store.arena import Arena
channel = socket.socket(fileno=int(sys.argv[1]))
_, (fd,), _, _ = socket.recv_fds(channel, 1, 1)
arena = Arena.attach(fd, size=int(sys.argv[2]))
channel.sendall(b"ready")
while command := channel.recv(4096):
    channel.sendall(repr(eval(command)).encode())
arena.close()
"""


class Peer:
    """Another process with the arena mapped."""

    def __init__(self, arena: Arena) -> None:
        self._channel, theirs = socket.socketpair()
        self._channel.settimeout(20)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", PEER, str(theirs.fileno()), str(arena.size)],
                pass_fds=[theirs.fileno()],
            )
        socket.send_fds(self._channel, [b"x"], [arena.fd])
        assert self._channel.recv(4096) == b"ready"

    def evaluate(self, expression: str) -> object:
        self._channel.sendall(expression.encode())
        return eval(self._channel.recv(4096))

    def end(self) -> int:
        self._channel.close()
        return self.process.wait(timeout=20)


def traces_of_arenas() -> list[str]:
    """Open descriptors and mappings of arenas in this process."""
    found = [str(fd.readlink()) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
    found += Path("/proc/self/maps").read_text().splitlines()
    return [trace for trace in found if "memfd:hpcray" in trace]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    assert not traces_of_arenas()
    yield
    gc.collect()
    assert not traces_of_arenas()
    assert not list(Path("/dev/shm").glob("*hpcray*"))


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena.create(1 << 20)
    yield arena
    arena.close()


def test_two_processes_see_each_others_writes(arena: Arena) -> None:
    peer = Peer(arena)
    arena.view(CONTROL_PAGE + 100, 5)[:] = b"hello"
    assert peer.evaluate("bytes(arena.view(4096 + 100, 5))") == b"hello"
    peer.evaluate("arena.view(4096 + 200, 5).__setitem__(slice(None), b'world')")
    assert bytes(arena.view(CONTROL_PAGE + 200, 5)) == b"world"
    assert peer.end() == 0


def test_the_asleep_flag_is_shared_and_outside_the_objects(arena: Arena) -> None:
    peer = Peer(arena)
    assert not arena.asleep
    assert peer.evaluate("arena.asleep") is False
    arena.asleep = True
    assert peer.evaluate("arena.asleep") is True
    assert not any(arena.view(CONTROL_PAGE, arena.size))
    arena.asleep = False
    assert peer.evaluate("arena.asleep") is False
    assert peer.end() == 0


def test_a_killed_peer_leaves_the_arena_intact(arena: Arena) -> None:
    peer = Peer(arena)
    peer.evaluate("arena.view(4096, 4).__setitem__(slice(None), b'kept')")
    peer.process.kill()
    assert peer.end() == -signal.SIGKILL
    assert bytes(arena.view(CONTROL_PAGE, 4)) == b"kept"


def test_no_process_can_cut_the_file_short(arena: Arena) -> None:
    peer = Peer(arena)
    with pytest.raises(PermissionError):
        os.ftruncate(arena.fd, CONTROL_PAGE)
    with pytest.raises(PermissionError):
        os.ftruncate(arena.fd, 1 << 30)
    assert peer.evaluate("len(arena.map)") == CONTROL_PAGE + arena.size
    assert peer.end() == 0


def test_the_descriptor_is_closed_on_exec(arena: Arena) -> None:
    assert fcntl.fcntl(arena.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC


def test_the_size_is_rounded_up_to_pages() -> None:
    for asked, given in (
        (1, mmap.PAGESIZE),
        (mmap.PAGESIZE, mmap.PAGESIZE),
        (mmap.PAGESIZE + 1, 2 * mmap.PAGESIZE),
    ):
        arena = Arena.create(asked)
        assert arena.size >= asked
        if mmap.PAGESIZE == CONTROL_PAGE:
            assert arena.size == given
        assert os.fstat(arena.fd).st_size == CONTROL_PAGE + arena.size
        arena.close()


def test_a_new_arena_takes_no_memory() -> None:
    arena = Arena.create(1 << 40)
    assert os.fstat(arena.fd).st_blocks == 0
    arena.close()


@pytest.mark.parametrize("size", [0, -1])
def test_an_arena_without_room_is_an_error(size: int) -> None:
    with pytest.raises(ValueError, match="at least one byte"):
        Arena.create(size)


def test_attach_takes_the_size_from_the_descriptor(arena: Arena) -> None:
    other = Arena.attach(os.dup(arena.fd))
    assert other.size == arena.size
    other.close()


def test_attach_refuses_another_size_and_leaves_the_descriptor(arena: Arena) -> None:
    with pytest.raises(ValueError, match="not an arena of 12345 bytes"):
        Arena.attach(arena.fd, size=12345)
    os.fstat(arena.fd)


def test_attach_refuses_a_descriptor_without_memory() -> None:
    read_end, write_end = os.pipe()
    with pytest.raises(ValueError, match="not an arena"):
        Arena.attach(read_end)
    os.close(read_end)
    os.close(write_end)


@pytest.mark.parametrize(
    ("offset", "n"),
    [(0, 1), (CONTROL_PAGE - 1, 1), (CONTROL_PAGE, -1), (CONTROL_PAGE + (1 << 20), 1), (-1, 1)],
)
def test_ranges_outside_the_objects_are_errors(arena: Arena, offset: int, n: int) -> None:
    with pytest.raises(ValueError, match="are not inside"):
        arena.view(offset, n)
    with pytest.raises(ValueError, match="are not inside"):
        arena.pinned_view(offset, n, lambda: None)
    with pytest.raises(ValueError, match="are not inside"):
        arena.warm(offset, n)


def test_an_empty_range_is_a_range(arena: Arena) -> None:
    for offset in (CONTROL_PAGE, CONTROL_PAGE + arena.size):
        assert len(arena.view(offset, 0)) == 0
        assert len(arena.pinned_view(offset, 0, lambda: None)) == 0
        arena.warm(offset, 0)
        arena.write(offset, [b"", b""])


class Releases:
    """An `on_release` that counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


def test_a_pin_ends_with_the_last_array_over_the_view(arena: Arena) -> None:
    released = Releases()
    arena.view(CONTROL_PAGE + 64, 800)[:] = np.arange(100.0).tobytes()
    view = arena.pinned_view(CONTROL_PAGE + 64, 800, released)
    array = np.frombuffer(view, np.float64)
    del view
    assert array.tolist() == list(range(100))
    assert released.count == 0
    part = array[10:90:2].reshape(8, 5)
    del array
    assert released.count == 0
    transposed = part.T
    del part
    assert transposed[0, 0] == 10
    assert released.count == 0
    del transposed
    assert released.count == 1


def test_a_pin_ends_with_the_last_slice_of_the_view(arena: Arena) -> None:
    released = Releases()
    view = arena.pinned_view(CONTROL_PAGE, 100, released)
    part = view[10:20]
    del view
    deeper = part.cast("c")[:2]
    del part
    assert released.count == 0
    del deeper
    assert released.count == 1


def test_a_pin_ends_once_when_the_view_is_released_by_hand(arena: Arena) -> None:
    released = Releases()
    view = arena.pinned_view(CONTROL_PAGE, 100, released)
    view.release()
    assert released.count == 1
    del view
    assert released.count == 1


def test_each_pin_of_the_same_bytes_ends_by_itself(arena: Arena) -> None:
    first, second = Releases(), Releases()
    one = arena.pinned_view(CONTROL_PAGE, 100, first)
    two = arena.pinned_view(CONTROL_PAGE, 100, second)
    del one
    assert (first.count, second.count) == (1, 0)
    del two
    assert (first.count, second.count) == (1, 1)


def test_arrays_unpickled_out_of_band_pin_their_object(arena: Arena) -> None:
    released = Releases()
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(np.arange(1000), protocol=5, buffer_callback=buffers.append)
    arena.view(CONTROL_PAGE, 8000)[:] = buffers[0].raw()
    array = pickle.loads(data, buffers=[arena.pinned_view(CONTROL_PAGE, 8000, released)])
    assert array.sum() == 499500
    assert not array.flags.writeable
    assert released.count == 0
    del array
    assert released.count == 1


def test_what_is_pinned_is_read_only_and_stays_so(arena: Arena) -> None:
    view = arena.pinned_view(CONTROL_PAGE, 100, lambda: None)
    assert (view.readonly, view.format, view.nbytes, view.contiguous) == (True, "B", 100, True)
    with pytest.raises(TypeError, match="read-only"):
        view[0] = 1
    array = np.frombuffer(view, np.uint8)
    assert not array.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    with pytest.raises(ValueError, match="cannot set WRITEABLE"):
        array.flags.writeable = True


def test_a_pinned_view_sees_the_bytes_at_its_offset_without_a_copy(arena: Arena) -> None:
    view = arena.pinned_view(CONTROL_PAGE + 1000, 4, lambda: None)
    arena.view(CONTROL_PAGE + 1000, 4)[:] = b"seen"
    assert bytes(view) == b"seen"


def test_a_pin_does_not_end_with_the_interpreter(arena: Arena) -> None:
    program = (
        "from hpcray.store.arena import Arena, CONTROL_PAGE\n"
        "view = Arena.create(4096).pinned_view(CONTROL_PAGE, 10, lambda: print('released'))\n"
        "import weakref; weakref.finalize(Arena, print, 'exit')\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=True)
    assert ended.stdout == "exit\n"


def test_close_leaves_neither_descriptor_nor_mapping() -> None:
    arena = Arena.create(1 << 20)
    view = arena.view(CONTROL_PAGE, 10)
    del view
    assert traces_of_arenas()
    arena.close()
    assert not traces_of_arenas()
    assert arena.fd == -1
    arena.close()
    with pytest.raises(ValueError, match="closed"):
        arena.view(CONTROL_PAGE, 10)


def test_a_view_outlives_close_and_takes_the_mapping_with_it() -> None:
    released = Releases()
    arena = Arena.create(1 << 20)
    arena.view(CONTROL_PAGE, 4)[:] = b"kept"
    view = arena.pinned_view(CONTROL_PAGE, 4, released)
    arena.close()
    assert bytes(view) == b"kept"
    assert traces_of_arenas()
    del view
    assert released.count == 1
    assert not traces_of_arenas()


def test_warm_adds_pages_and_changes_no_byte(arena: Arena) -> None:
    if not populate_is_known():
        pytest.skip("the kernel is older than 5.14")
    arena.view(CONTROL_PAGE + 70_000, 4)[:] = b"kept"
    before = os.fstat(arena.fd).st_blocks
    arena.warm(CONTROL_PAGE + 65_000, 200_001)
    assert os.fstat(arena.fd).st_blocks * 512 >= before * 512 + 190_000
    assert bytes(arena.view(CONTROL_PAGE + 70_000, 4)) == b"kept"
    arena.warm(CONTROL_PAGE, arena.size)
    assert bytes(arena.view(CONTROL_PAGE + 70_000, 4)) == b"kept"


# Which pages are there decides how the bytes get in: by system calls where none is, else through the mapping.
@pytest.mark.parametrize("touched", [(), (0,), (100,), (255,), (0, 255), tuple(range(256))])
@pytest.mark.parametrize("cuts", [(), (1,), (0, 0, 70_001), tuple(range(64, 200_000, 64))], ids=len)
def test_parts_are_written_end_to_end_and_nowhere_else(
    arena: Arena, touched: tuple[int, ...], cuts: tuple[int, ...]
) -> None:
    for page in touched:
        arena.view(CONTROL_PAGE + page * 4096, 4096)[:] = b"x" * 4096
    before = bytes(arena.view(CONTROL_PAGE, arena.size))
    data = np.random.default_rng(1).bytes(900_000)
    edges = [0, *cuts, len(data)]
    parts = [memoryview(data)[start:end] for start, end in itertools.pairwise(edges)]
    start = 64
    arena.write(CONTROL_PAGE + start, parts)
    expected = before[:start] + data + before[start + len(data) :]
    assert bytes(arena.view(CONTROL_PAGE, arena.size)) == expected
    arena.write(CONTROL_PAGE + start, [b"again", memoryview(b"and again")])
    assert bytes(arena.view(CONTROL_PAGE + start, 20)) == b"againand again" + data[14:20]


def test_many_steps_into_untouched_memory_whichever_way_each_goes() -> None:
    arena = Arena.create(64 << 20)
    data = np.random.default_rng(2).bytes(30 << 20)
    edges = [0, 1000, 5 << 20, (5 << 20) + 1, 29 << 20, len(data)]
    arena.write(CONTROL_PAGE + 128, [memoryview(data)[start:end] for start, end in itertools.pairwise(edges)])
    assert bytes(arena.view(CONTROL_PAGE + 128, len(data))) == data
    assert not any(arena.view(CONTROL_PAGE, 128))
    assert not any(arena.view(CONTROL_PAGE + 128 + len(data), 1 << 20))
    arena.close()


def test_another_process_sees_what_was_written_without_the_mapping(arena: Arena) -> None:
    peer = Peer(arena)
    peer.evaluate("arena.write(4096 + 640, [b'by a call, ', memoryview(b'not by a fault')])")
    assert bytes(arena.view(CONTROL_PAGE + 640, 25)) == b"by a call, not by a fault"
    assert peer.end() == 0


@pytest.mark.parametrize(("offset", "n"), [(0, 1), (CONTROL_PAGE + (1 << 20) - 10, 11)])
def test_writing_outside_the_objects_is_an_error_and_writes_nothing(arena: Arena, offset: int, n: int) -> None:
    with pytest.raises(ValueError, match="are not inside"):
        arena.write(offset, [b"x" * n])
    assert not any(arena.map[:])
    assert os.fstat(arena.fd).st_size == CONTROL_PAGE + arena.size


def test_warm_and_prefault_do_nothing_where_the_kernel_cannot(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpcray.store.arena._MADV_POPULATE_READ", 9999)
    monkeypatch.setattr("hpcray.store.arena._MADV_POPULATE_WRITE", 9999)
    arena.warm(CONTROL_PAGE, arena.size)
    assert arena.prefault_step() == 0
    assert os.fstat(arena.fd).st_blocks == 0


def test_memory_that_the_kernel_refuses_is_an_error_not_a_signal() -> None:
    if not populate_is_known():
        pytest.skip("the kernel is older than 5.14")
    # An unsealed file stands for an arena that outgrew the memory: a page of the mapping cannot be had.
    fd = os.memfd_create("hpcray", os.MFD_CLOEXEC)
    os.ftruncate(fd, CONTROL_PAGE + (1 << 20))
    arena = Arena.attach(fd)
    os.ftruncate(fd, CONTROL_PAGE + (1 << 19))
    with pytest.raises(OSError) as caught:
        arena.warm(CONTROL_PAGE, 1 << 20)
    assert caught.value.errno == errno.EFAULT
    with pytest.raises(OSError):
        arena.prefault_step()
    arena.close()


def test_prefault_touches_everything_once_and_stops_at_the_end() -> None:
    if not populate_is_known():
        pytest.skip("the kernel is older than 5.14")
    arena = Arena.create(2 * PREFAULT_STEP + 10_000)
    arena.view(CONTROL_PAGE + PREFAULT_STEP, 4)[:] = b"kept"
    done = []
    while step := arena.prefault_step():
        done.append(step)
    assert sum(done) == CONTROL_PAGE + arena.size == os.fstat(arena.fd).st_blocks * 512
    assert done[:2] == [PREFAULT_STEP, PREFAULT_STEP]
    assert arena.prefault_step() == 0
    assert bytes(arena.view(CONTROL_PAGE + PREFAULT_STEP, 4)) == b"kept"
    arena.close()


def test_prefault_rounds_up_to_pages(arena: Arena) -> None:
    if not populate_is_known():
        pytest.skip("the kernel is older than 5.14")
    assert arena.prefault_step(1) == mmap.PAGESIZE
    assert arena.prefault_step(0) == 0
    assert os.fstat(arena.fd).st_blocks * 512 == mmap.PAGESIZE


# An arena in a file system of its own, mounted where nobody else sees it, whose huge pages are for those who ask.
HUGE = """
import os, pathlib, sys
import hpcray.store.arena as module
from hpcray.store.arena import CONTROL_PAGE, Arena
mounted, setting = map(pathlib.Path, sys.argv[1:])
module._HUGE_PAGES = setting
fd = os.open(mounted / "arena", os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, CONTROL_PAGE + (64 << 20))
arena = Arena.attach(fd)
data = os.urandom(1 << 20) * 30
arena.write(CONTROL_PAGE + 64, [data[:1000], memoryview(data)[1000:]])
assert bytes(arena.view(CONTROL_PAGE + 64, len(data))) == data
inside = False
for line in open("/proc/self/smaps"):
    if str(mounted) in line:
        inside = True
    elif inside and line.startswith("ShmemPmdMapped"):
        print(line.split()[1])
        break
"""


@pytest.mark.parametrize(
    ("setting", "has_huge_pages"), [("always [advise] never", True), ("always advise [never]", False)]
)
def test_an_arena_has_huge_pages_where_the_kernel_gives_them_to_those_who_ask(
    tmp_path: Path, setting: str, has_huge_pages: bool
) -> None:
    mounted, told = tmp_path / "mounted", tmp_path / "shmem_enabled"
    mounted.mkdir()
    told.write_text(setting)
    mount = f"mount -t tmpfs -o huge=advise,size=80m tmpfs {mounted}"
    in_private = ["unshare", "--mount", "sh", "-c", f'{mount} || exit 77; exec "$@"', "sh"]
    ended = subprocess.run(
        [*in_private, sys.executable, "-c", HUGE, mounted, told],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if ended.returncode and ("unshare" in ended.stderr or ended.returncode == 77):
        pytest.skip("no private file system with huge pages here: needs root and a kernel that has them")
    assert ended.returncode == 0, ended.stderr
    assert (int(ended.stdout) >= 28 << 10) is has_huge_pages, "kB in huge pages"


def populate_is_known() -> bool:
    arena = Arena.create(1)
    try:
        return arena.prefault_step(1) > 0
    finally:
        arena.close()
