"""Memory of a bound rank lies where it is bound: all that touch its arena first, it and its workers, run there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SCRIPT = """
import os, re, sys
cpu = int(sys.argv[1])
os.sched_setaffinity(0, {cpu})  # as a launcher binds a rank
import numpy as np
import hpcray

@hpcray.remote
def make():
    return os.sched_getaffinity(0), np.ones(40_000_000, np.uint8)

hpcray.init(num_cpus=1, object_store_memory=500_000_000)
mine = hpcray.put(np.ones(200_000_000, np.uint8))  # more than is touched ahead
affinity, made = hpcray.get(make.remote())
print("worker", sorted(affinity))
array = hpcray.get(mine)
assert array.sum() + made.sum() == 240_000_000
pages = {}
for line in open("/proc/self/numa_maps"):
    if "memfd:hpcray" in line:
        for node, count in re.findall(r" N(\\d+)=(\\d+)", line):
            pages[int(node)] = pages.get(int(node), 0) + int(count)
        print("page kB", re.search(r"kernelpagesize_kB=(\\d+)", line)[1])
print("pages", pages)
"""


@pytest.mark.skipif(not Path("/proc/self/numa_maps").exists(), reason="the kernel does not tell where pages are")
@pytest.mark.beyond_ray("Ray binds nothing")
def test_the_pages_of_a_bound_rank_are_on_its_own_memory_node(run_script):
    cpu = max(os.sched_getaffinity(0))
    nodes = [path.name for path in Path(f"/sys/devices/system/cpu/cpu{cpu}").glob("node[0-9]*")]
    finished = run_script(SCRIPT, str(cpu))
    assert finished.returncode == 0, finished.stderr
    said = dict(line.split(" ", 1) for line in finished.stdout.replace("page kB", "page_kB").splitlines())
    assert said["worker"] == f"[{cpu}]"
    pages = eval(said["pages"])
    assert sum(pages.values()) * int(said["page_kB"]) * 1024 >= 240_000_000
    assert [f"node{node}" for node in pages] == nodes
