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
    RankMemory,
    detect_cpus,
    detect_gpus,
    detect_memory,
    share,
    share_gpus,
    share_memory,
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
        ({"SLURM_MEM_PER_GPU": "1024", "SLURM_GPUS_ON_NODE": "2"}, None, 2 * 2**30),
        ({"SLURM_MEM_PER_GPU": "1024"}, None, 16 * 2**30),
        ({"SLURM_MEM_PER_NODE": "2048"}, 2**30, 2**30),
        ({"SLURM_MEM_PER_NODE": "1024"}, 2**31, 2**30),
    ],
)
def test_memory_is_the_least_that_anyone_says(root, env, cgroup, usable):
    report = detect_memory(env, root, CgroupLimits(memory=cgroup))
    assert report.usable == usable
    assert report.host == 16 * 2**30
    assert report == MemoryReport(report.host, cgroup, report.slurm)


@pytest.mark.parametrize(
    ("limits", "job", "usable"),
    [
        # Version 2: a step of Slurm's under a job with a limit.
        (
            {
                "proc/self/cgroup": "0::/job_7/step_0\n",
                "proc/self/mountinfo": "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
                "sys/fs/cgroup/job_7/step_0/memory.max": "max\n",
                "sys/fs/cgroup/job_7/memory.max": f"{3 * 2**30}\n",
            },
            {"SLURM_MEM_PER_NODE": "4096"},
            3 * 2**30,
        ),
        # Version 1.
        (
            {
                "proc/self/cgroup": "4:memory:/job\n",
                "proc/self/mountinfo": "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{5 * 2**30}\n",
            },
            {"SLURM_MEM_PER_CPU": "1024", "SLURM_CPUS_ON_NODE": "8"},
            5 * 2**30,
        ),
        ({}, {"SLURM_MEM_PER_NODE": "6144"}, 6 * 2**30),
    ],
    ids=["cgroup v2", "cgroup v1", "Slurm"],
)
def test_the_memory_of_a_job_is_read_where_its_host_keeps_it(root, limits, job, usable):
    for name, text in limits.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    assert detect_memory(job, root).usable == usable


def test_a_hosts_memory_is_shared_by_its_ranks_and_a_part_of_it_is_the_store():
    assert share_memory([10 * 2**30], [None], 0.3) == [RankMemory(10 * 2**30, 3 * 2**30)]
    assert (
        share_memory([8 * 2**30, 10 * 2**30, 8 * 2**30, 9 * 2**30], [None] * 4, 0.5) == [RankMemory(2**31, 2**30)] * 4
    )


def test_a_store_that_was_asked_for_is_as_large_as_that_in_whole_pages():
    assert share_memory([2**34, 2**34], [10**9, None], 0.25) == [
        RankMemory(2**33, 10**9 - 10**9 % 4096),
        RankMemory(2**33, 2**31),
    ]
    assert share_memory([1000 * 4096] * 2, [900 * 4096, 100 * 4096], 0.3)[0] == RankMemory(900 * 4096, 900 * 4096)


def test_stores_larger_than_the_memory_are_refused_with_the_sizes():
    with pytest.raises(
        ValueError, match=r"stores of 2,400,000,000 bytes in 2 ranks are more than the 2,000,000,000 bytes"
    ):
        share_memory([2 * 10**9, 3 * 10**9], [12 * 10**8] * 2, 0.3)


@given(st.lists(st.integers(2**24, 2**45), min_size=1, max_size=8), st.floats(0.01, 1.0))
def test_shares_never_exceed_what_there_is(usable, part):
    dealt = share_memory(usable, [None] * len(usable), part)
    assert sum(rank.total for rank in dealt) <= min(usable)
    assert all(0 <= rank.store <= rank.total and rank.store % 4096 == 0 for rank in dealt)


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
