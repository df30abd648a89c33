from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcray.raylet.cgroup import CgroupLimits
from hpcray.raylet.detect import (
    CpuReport,
    Gpu,
    MemoryReport,
    RankMask,
    detect_cpus,
    detect_gpus,
    detect_memory,
    share,
    share_gpus,
    visible_gpus,
)

NO_LIMITS = CgroupLimits()


@pytest.fixture
def root(tmp_path):
    online = tmp_path / "sys/devices/system/cpu/online"
    online.parent.mkdir(parents=True)
    online.write_text("0-63\n")
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:       16777216 kB\nMemFree:  1 kB\n")
    return tmp_path


def test_a_laptop_offers_what_affinity_says(root):
    report = detect_cpus({}, {0, 1, 2, 3}, root, NO_LIMITS)
    assert report == CpuReport(host=64, affinity=frozenset({0, 1, 2, 3}))
    assert (report.usable, report.shared) == (4, 64)


@pytest.mark.parametrize(
    ("quota", "cpuset", "usable"),
    [(2.9, None, 2), (0.5, None, 1), (None, 3, 3), (16.0, 8, 8), (99.0, 99, 64)],
)
def test_control_groups_lower_it_and_leave_at_least_one(root, quota, cpuset, usable):
    limits = CgroupLimits(quota, None if cpuset is None else frozenset(range(cpuset)))
    assert detect_cpus({}, range(64), root, limits).usable == usable


def test_slurm_lowers_it_where_it_does_not_bind(root):
    step = {"SLURM_CPUS_ON_NODE": "16", "SLURM_CPUS_PER_TASK": "4"}
    report = detect_cpus(step, range(64), root, NO_LIMITS)
    assert (report.shared, report.usable) == (16, 4)
    assert report.mask == RankMask(frozenset(range(64)), 16, 4)


@pytest.mark.parametrize(
    ("per_node", "shared"), [("16", 16), ("16(x2)", 16), ("16(x2),16", 16), ("16,8", 64), ("", 64)]
)
def test_under_mpirun_the_jobs_list_counts_and_not_the_daemons_step(root, per_node, shared):
    env = {
        "OMPI_COMM_WORLD_RANK": "0",
        "SLURM_CPUS_ON_NODE": "1",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_JOB_CPUS_PER_NODE": per_node,
    }
    report = detect_cpus(env, range(64), root, NO_LIMITS)
    assert (report.shared, report.slurm_per_task) == (shared, None)


@pytest.mark.parametrize(
    ("env", "cgroup", "usable"),
    [
        ({}, None, 16 * 2**30),
        ({}, 2**30, 2**30),
        ({}, 2**50, 16 * 2**30),
        ({"SLURM_MEM_PER_NODE": "2048"}, None, 2 * 2**30),
        ({"SLURM_MEM_PER_NODE": "0"}, None, 16 * 2**30),
        ({"SLURM_MEM_PER_CPU": "512", "SLURM_CPUS_ON_NODE": "4"}, None, 2 * 2**30),
        ({"SLURM_MEM_PER_CPU": "512"}, None, 16 * 2**30),
    ],
)
def test_memory_is_the_least_that_anyone_says(root, env, cgroup, usable):
    report = detect_memory(env, root, CgroupLimits(memory=cgroup))
    assert report.usable == usable
    assert report.host == 16 * 2**30
    assert report == MemoryReport(report.host, cgroup, report.slurm)


def test_without_a_driver_there_are_no_gpus_and_a_reason(root):
    assert detect_gpus({}, root).gpus == ()
    assert detect_gpus({}, root).reason == "no NVIDIA driver on this host"


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this host has an NVIDIA driver")
def test_a_driver_that_does_not_answer_is_a_reason(root):
    (root / "dev").mkdir()
    (root / "dev/nvidiactl").touch()
    report = detect_gpus({}, root)
    assert report.gpus == ()
    assert report.reason.startswith("the NVIDIA driver does not answer: ")


GPUS = [Gpu(f"GPU-{letter * 4}", "H100", 80) for letter in "abc"]


@pytest.mark.parametrize(
    ("visible", "chosen"),
    [
        (None, [0, 1, 2]),
        ("0,1,2", [0, 1, 2]),
        ("2,0", [2, 0]),
        ("GPU-b", [1]),
        ("GPU-bbbb, GPU-c", [1, 2]),
        ("", []),
        ("-1", []),
        ("0,7,1", [0]),
        ("0,0", [0]),
        ("GPU-", []),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_does(visible, chosen):
    report = visible_gpus(GPUS, visible)
    assert list(report.gpus) == [GPUS[i] for i in chosen]
    assert bool(report.reason) == (len(chosen) < 3)


def test_parts_of_a_gpu_count_as_gpus():
    assert [gpu.uuid for gpu in visible_gpus(GPUS, "MIG-1,MIG-2").gpus] == ["MIG-1", "MIG-2"]


def test_a_driver_without_gpus_says_so():
    assert visible_gpus([], None).reason == "the NVIDIA driver knows no GPU"


def mask(cpus, shared=64, own=None):
    return RankMask(frozenset(cpus), shared, own)


@pytest.mark.parametrize(
    ("ranks", "counts"),
    [
        ([], []),
        ([mask(range(8))], [8]),
        ([mask(range(8))] * 3, [3, 3, 2]),
        ([mask(range(2))] * 4, [1, 1, 1, 1]),
        ([mask({0, 1}), mask({2, 3})], [2, 2]),
        ([mask({0, 1}), mask({0})], [1, 1]),
        ([mask({0, 1, 2, 3}), mask({0, 1})], [2, 2]),
        ([mask(range(64), shared=16)] * 4, [4, 4, 4, 4]),
        ([mask(range(64), shared=16, own=4)] * 4, [4, 4, 4, 4]),
        ([mask(range(64), shared=16, own=1)] * 2, [1, 1]),
        ([mask(range(64), shared=3)] * 2, [2, 1]),
    ],
)
def test_cpus_are_shared_by_the_ranks_of_a_host(ranks, counts):
    assert share(ranks) == counts


@given(
    st.lists(st.frozensets(st.integers(0, 12), min_size=1), min_size=1, max_size=6),
    st.integers(1, 16),
)
def test_no_more_than_there_is_is_offered_beyond_the_one_of_each(masks, shared):
    counts = share([mask(cpus, shared) for cpus in masks])
    there = min(shared, len(frozenset().union(*masks)))
    assert all(1 <= count <= len(cpus) for count, cpus in zip(counts, masks, strict=True))
    assert sum(counts) < there + len(masks)


@given(st.integers(1, 40), st.integers(1, 40))
def test_equal_masks_differ_by_one_at_most_and_waste_nothing(cpus, ranks):
    counts = share([mask(range(cpus))] * ranks)
    assert max(counts) - min(counts) <= 1
    assert sum(counts) == max(cpus, ranks)


def test_gpus_are_dealt_once_each():
    assert share_gpus([["a", "b", "c"], ["a", "b", "c"]]) == [["a", "c"], ["b"]]
    assert share_gpus([["a"], ["a"], []]) == [["a"], [], []]
    assert share_gpus([["a"], ["b"]]) == [["a"], ["b"]]
