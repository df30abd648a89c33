"""What programs make and forget, by the ten thousand, leaves nothing: neither in the driver nor in raylet and workers.

An entry of the object table that were left behind costs its process some 500 bytes, a client's count 150. The million is in
tests/bench/bench_references.py.
"""

import psutil
import pytest

from hpcray.client import require_client

COUNT = 40_000
BATCH = 1_000
MARGIN = 4_000_000
"""Bytes that an allocator may keep or lose meanwhile, 100 for each object."""
pytestmark = pytest.mark.usefixtures("ray_start")


def put_and_forget(hpcray, count):
    for start in range(0, count, BATCH):
        refs = [hpcray.put(number) for number in range(start, start + BATCH)]
        assert hpcray.get(refs[-1]) == start + BATCH - 1


def put_in_one_another(hpcray, count):
    for _ in range(0, count, BATCH):
        ref = hpcray.put(0)
        for _ in range(BATCH - 1):
            ref = hpcray.put([ref])


def call_and_forget(hpcray, count):
    @hpcray.remote
    def wrap(refs):
        return [*refs, hpcray.put(len(refs))]

    for _ in range(0, count, BATCH):
        results = [wrap.remote([hpcray.put(number)]) for number in range(BATCH // 4)]
        assert len(hpcray.get(results)) == len(results)


def own_memory(process):
    info = process.memory_info()
    return info.rss - info.shared  # without the arena, whose pages are touched in the background


def run_one_task(hpcray):
    """Returns when a worker has run one: the fork server has imported all that it will by then."""

    @hpcray.remote
    def nothing():
        return None

    hpcray.get(nothing.remote())


def objects_known():
    """How many small objects the raylets know."""
    stores = require_client().query("store_statistics", None)
    return sum(store["inline"]["objects"] for store in stores)


@pytest.mark.beyond_ray("Ray's own processes grow by more than that")
@pytest.mark.parametrize("use", [put_and_forget, put_in_one_another, call_and_forget])
def test_objects_that_are_forgotten_leave_memory_as_it_was(hpcray, use, wait_until):
    run_one_task(hpcray)
    use(hpcray, 10_000)
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    before = {process: own_memory(process) for process in processes}
    known = objects_known()
    use(hpcray, COUNT)

    def grown():
        return {str(p): own_memory(p) - was for p, was in before.items() if own_memory(p) - was > MARGIN}

    wait_until(lambda: not grown(), timeout=5, on_timeout=grown)
    assert objects_known() <= known + BATCH  # some releases wait for the next message
