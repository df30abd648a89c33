"""Large values are read where they lie: in one memory that all processes share, and that comes back when they die."""

from __future__ import annotations

import os
import re
import signal
import tracemalloc
from pathlib import Path

import msgspec
import numpy as np
import pytest

from hpcray.client import require_client
from hpcray.observe.statistics import StoreStatistics
from hpcray.store.arena import Arena

INIT = {"num_cpus": 2, "object_store_memory": 400 * 1024 * 1024}
MEGABYTE = 1_000_000
pytestmark = [
    pytest.mark.usefixtures("ray_start"),
    pytest.mark.beyond_ray("hpcray shows what its store holds and where views lie"),
]


def store() -> StoreStatistics:
    (only,) = msgspec.convert(require_client().query("store_statistics", None), list[StoreStatistics])
    return only


def arenas(pid: int | str = "self") -> list[range]:
    """Where arenas are mapped in a process."""
    lines = [line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "memfd:hpcray" in line]
    return [range(*(int(edge, 16) for edge in line[0].split("-"))) for line in lines]


def is_in_arena(address: int) -> bool:
    return any(address in arena for arena in arenas())


def smaps(pid: int) -> dict[str, int]:
    """Bytes of a process's mapping of its arena by kind."""
    found: dict[str, int] = {}
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = "memfd:hpcray" in line
        elif inside and line.endswith(" kB"):
            name, size, _ = line.split()
            found[name[:-1]] = found.get(name[:-1], 0) + int(size) * 1024
    return found


def test_arrays_deep_in_containers_lie_in_the_arena(hpcray):
    value = {"a": [np.arange(10**5), {"b": (np.ones((300, 300)), "text")}], "c": {7: np.zeros(5)}}
    result = hpcray.get(hpcray.put(value))
    for array in (result["a"][0], result["a"][1]["b"][0], result["c"][7]):
        assert is_in_arena(array.ctypes.data)
        assert array.ctypes.data % 64 == 0
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 1
    assert result["a"][0].sum() == value["a"][0].sum()


def test_a_pandas_frame_is_a_view_and_may_be_computed_with(hpcray):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"x": np.arange(200_000.0), "y": np.ones(200_000), "n": np.arange(200_000)})
    result = hpcray.get(hpcray.put(frame))
    pandas.testing.assert_frame_equal(result, frame)
    for name in frame.columns:
        array = result[name].to_numpy()
        assert is_in_arena(array.ctypes.data), name
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    assert (result["x"] + result["y"]).sum() == (frame["x"] + frame["y"]).sum()
    series = hpcray.get(hpcray.put(frame["x"]))
    assert is_in_arena(series.to_numpy().ctypes.data)


def test_pyarrow_tables_and_arrays_are_views(hpcray):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"x": np.arange(200_000), "text": [f"word {n % 100}" for n in range(200_000)]})
    result = hpcray.get(hpcray.put(table))
    assert result.equals(table)
    buffers = [b for column in result.columns for chunk in column.chunks for b in chunk.buffers() if b is not None]
    assert len(buffers) >= 3
    assert all(is_in_arena(buffer.address) for buffer in buffers if buffer.size)
    array = hpcray.get(hpcray.put({"deep": [pyarrow.array(np.arange(200_000))]}))["deep"][0]
    assert is_in_arena(array.buffers()[1].address)
    assert array[199_999].as_py() == 199_999


@pytest.mark.parametrize(
    "make",
    [
        lambda: [np.full(20 * MEGABYTE, number, np.uint8) for number in range(5)],
        lambda: bytes(100 * MEGABYTE),
        lambda: {"a": bytearray(50 * MEGABYTE), "b": np.ones((5 * MEGABYTE, 10), np.uint8)},
    ],
    ids=["five arrays", "bytes", "bytearray and array"],
)
def test_large_buffers_are_copied_into_the_arena_and_nowhere_else(hpcray, make):
    value = make()
    tracemalloc.start()
    try:
        ref = hpcray.put(value)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # What pickle has in band it copies: bytearrays have no out-of-band form.
    in_band = 50 * MEGABYTE if isinstance(value, dict) else 0
    assert peak < 3 * in_band + MEGABYTE
    back = hpcray.get(ref)
    if isinstance(value, list):
        assert all(np.array_equal(one, other) for one, other in zip(back, value, strict=True))
    elif isinstance(value, bytes):
        assert back == value
    else:
        assert back["a"] == value["a"]
        assert np.array_equal(back["b"], value["b"])


def test_small_objects_never_touch_the_arena(hpcray, wait_until):
    wait_until(lambda: store().free == store().size, on_timeout=store)
    before = store().inline.objects
    refs = [hpcray.put(bytes(90 * 1024)) for _ in range(200)]
    refs += [hpcray.put(np.arange(1000)) for _ in range(200)]
    now = store()
    assert now.free == now.size
    assert now.inline.objects == before + 400
    assert hpcray.get(refs[-1])[999] == 999


def test_processes_that_read_one_object_share_its_pages(hpcray):
    @hpcray.remote(num_cpus=0)
    class Reader:
        def read(self, refs):
            self.array = hpcray.get(refs[0])
            return os.getpid(), int(self.array.sum())

    size = 160 * MEGABYTE  # more than the raylet touches ahead
    ref = hpcray.put(np.ones(size, np.uint8))
    readers = [Reader.remote() for _ in range(2)]
    answers = hpcray.get([reader.read.remote([ref]) for reader in readers])
    mine = hpcray.get(ref)
    assert [total for _, total in answers] == [mine.sum()] * 2 == [size] * 2
    for pid in (os.getpid(), *(pid for pid, _ in answers)):
        found = smaps(pid)
        assert found["Rss"] >= size
        shared = found["Shared_Clean"] + found["Shared_Dirty"]
        assert shared >= size, "pages that others map too"
        assert found["Private_Clean"] + found["Private_Dirty"] <= found["Rss"] - size
        assert found["Pss"] <= 0.5 * found["Rss"], "three or more share the bill"


def test_what_a_killed_reader_looked_at_comes_back(hpcray, wait_until):
    @hpcray.remote(num_cpus=0)
    class Reader:
        def read(self, refs):
            self.array = hpcray.get(refs[0])
            return os.getpid()

    wait_until(lambda: store().free == store().size, on_timeout=store)
    other = hpcray.put(np.full(MEGABYTE, 7, np.uint8))
    used = store().size - store().free
    ref = hpcray.put(np.ones(50 * MEGABYTE, np.uint8))
    reader = Reader.remote()
    pid = hpcray.get(reader.read.remote([ref]))
    del ref
    wait_until(lambda: store().freed.bytes >= 50 * MEGABYTE, on_timeout=store)
    assert store().pinned.bytes >= 50 * MEGABYTE
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: store().size - store().free == used, on_timeout=store)
    assert store().freed.objects == 0
    assert hpcray.get(other).min() == 7


def test_what_a_killed_writer_had_reserved_comes_back(hpcray, wait_until):
    @hpcray.remote(max_retries=0)
    def write_and_die():
        def write_a_part(arena, offset, parts):
            arena.view(offset, MEGABYTE)[:] = bytes(MEGABYTE)
            os.kill(os.getpid(), signal.SIGKILL)

        Arena.write = write_a_part
        hpcray.put(bytes(50 * MEGABYTE))

    wait_until(lambda: store().free == store().size, on_timeout=store)
    with pytest.raises(hpcray.exceptions.WorkerCrashedError):
        hpcray.get(write_and_die.remote())
    wait_until(lambda: store().free == store().size, on_timeout=store)
    assert hpcray.get(hpcray.put(np.ones(350 * MEGABYTE, np.uint8))).nbytes == 350 * MEGABYTE, "in one piece"


def test_a_put_that_is_interrupted_keeps_nothing(hpcray, monkeypatch):
    def interrupt(arena, offset, parts):
        raise KeyboardInterrupt

    before = store()
    monkeypatch.setattr(Arena, "write", interrupt)
    for _ in range(9):
        with pytest.raises(KeyboardInterrupt):
            hpcray.put(bytes(50 * MEGABYTE))
    monkeypatch.undo()
    assert (store().writing, store().free) == (before.writing, before.free)


def test_an_object_larger_than_the_arena_is_refused_with_both_sizes(hpcray):
    with pytest.raises(hpcray.exceptions.ObjectStoreFullError, match=r"500,00\d,\d{3} bytes.*419,430,400 bytes"):
        hpcray.put(np.zeros(500 * MEGABYTE, dtype=np.uint8))
    assert store().writing == 0


def test_a_get_that_reaches_the_raylet_is_a_hit(hpcray):
    ref = hpcray.put(np.ones(MEGABYTE, np.uint8))
    before = store()
    for _ in range(3):
        assert hpcray.get(ref).nbytes == MEGABYTE
    assert store().hits == before.hits + 3
    assert store().misses == before.misses


def test_references_that_were_only_looked_at_change_nothing_and_one_that_was_kept_counts(hpcray, wait_until):
    wait_until(lambda: store().free == store().size, on_timeout=store)
    inner = [hpcray.put(np.full(MEGABYTE, number, np.uint8)) for number in range(20)]
    outer = hpcray.put(inner)
    for _ in range(5):
        assert hpcray.get(outer) == inner
    kept = hpcray.get(outer)[3]
    twice = hpcray.get([outer, outer])
    del inner
    assert store().primary.objects == 20
    assert hpcray.get(twice[1][19]).max() == 19
    del outer, twice
    wait_until(lambda: store().primary.objects == 1, on_timeout=store)
    assert hpcray.get(kept).min() == 3
    del kept
    wait_until(lambda: store().free == store().size, on_timeout=store)
