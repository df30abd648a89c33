import pytest

from hpcray.raylet.accelerators import Device, DeviceReport
from hpcray.raylet.cgroup import CgroupLimits
from hpcray.raylet.detect import CpuReport, MemoryReport, detect_cpus, detect_devices, detect_memory
from hpcray.raylet.sharing import RankMask

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


class Maker:
    """An accelerator that reports what it was made with."""

    variable = "X_VISIBLE_DEVICES"

    def __init__(self, **report):
        self.report = DeviceReport(**report)

    def detect(self, env, root):
        return self.report


DEVICE = Device("GPU-1", "0", 0, "X", 1)


def test_a_rank_has_the_devices_of_the_first_maker_that_has_any(root):
    empty, broken = Maker(), Maker(problem="no answer")
    other = Maker(devices=(DEVICE,), variable="Y")
    assert detect_devices({}, root, [empty, broken, other, Maker(devices=(DEVICE,))]) == other.report


def test_without_devices_the_first_maker_that_says_why_is_heard(root):
    assert detect_devices({}, root, [Maker(), Maker(reason="hidden"), Maker(problem="broken")]).reason == "hidden"
    assert detect_devices({}, root, [Maker(), Maker()]) == DeviceReport(reason="no GPU driver on this host")
