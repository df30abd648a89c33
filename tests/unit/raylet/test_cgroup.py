import pytest

from hpcray.raylet.cgroup import CgroupLimits, parse_cpu_list, read_limits

V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNTS = (
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "34 31 0:31 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)


@pytest.fixture
def host(tmp_path):
    """Writes files below a root that stands for /."""

    def write(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


def test_version_2_in_a_slurm_step(host):
    step = "sys/fs/cgroup/system.slice/slurmstepd.scope/job_7/step_0/user/task_0"
    root = host(
        {
            "proc/self/cgroup": "0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_0\n",
            "proc/self/mountinfo": V2_MOUNT,
            f"{step}/cpu.max": "max 100000\n",
            f"{step}/memory.max": "max\n",
            f"{step}/cpuset.cpus.effective": "0-3,8\n",
            "sys/fs/cgroup/system.slice/slurmstepd.scope/job_7/memory.max": "2147483648\n",
            "sys/fs/cgroup/cpuset.cpus.effective": "0-63\n",
        }
    )
    assert read_limits(root) == CgroupLimits(None, frozenset({0, 1, 2, 3, 8}), 2147483648)


def test_the_smallest_limit_on_the_path_wins(host):
    root = host(
        {
            "proc/self/cgroup": "0::/a/b/c\n",
            "proc/self/mountinfo": V2_MOUNT,
            "sys/fs/cgroup/a/b/c/cpu.max": "400000 100000\n",
            "sys/fs/cgroup/a/b/cpu.max": "250000 100000\n",
            "sys/fs/cgroup/a/cpu.max": "800000 100000\n",
            "sys/fs/cgroup/a/b/c/memory.max": "max\n",
            "sys/fs/cgroup/a/b/c/memory.high": "1000\n",
            "sys/fs/cgroup/a/memory.max": "900\n",
        }
    )
    assert read_limits(root) == CgroupLimits(cpu_quota=2.5, memory=900)


def test_version_1(host):
    root = host(
        {
            "proc/self/cgroup": "9:name=systemd:/x\n4:memory:/job\n3:cpuset:/job\n1:cpu,cpuacct:/job\n",
            "proc/self/mountinfo": V1_MOUNTS,
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "150000\n",
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpuset/job/cpuset.cpus": "2-3\n",
            "sys/fs/cgroup/cpuset/cpuset.cpus": "0-7\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "1073741824\n",
        }
    )
    assert read_limits(root) == CgroupLimits(1.5, frozenset({2, 3}), 1073741824)


def test_hybrid_controllers_count_where_their_files_are(host):
    root = host(
        {
            "proc/self/cgroup": "4:memory:/job\n0::/unified/job\n",
            "proc/self/mountinfo": V1_MOUNTS + "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "5000\n",
            "sys/fs/cgroup/unified/unified/job/cpu.max": "50000 100000\n",
        }
    )
    assert read_limits(root) == CgroupLimits(cpu_quota=0.5, memory=5000)


@pytest.mark.parametrize("mounted", ["/docker/abc", "/"])
def test_a_container_that_sees_the_hosts_path_finds_its_own_group(host, mounted):
    root = host(
        {
            "proc/self/cgroup": "0::/docker/abc\n",
            "proc/self/mountinfo": V2_MOUNT.replace(" / ", f" {mounted} "),
            "sys/fs/cgroup/memory.max": "4096\n",
        }
    )
    assert read_limits(root).memory == 4096


def test_a_group_outside_of_the_namespace_is_the_top(host):
    root = host(
        {
            "proc/self/cgroup": "0::/../../other\n",
            "proc/self/mountinfo": V2_MOUNT,
            "sys/fs/cgroup/memory.max": "4096\n",
        }
    )
    assert read_limits(root).memory == 4096


def test_nothing_to_read_is_no_limit(tmp_path):
    assert read_limits(tmp_path) == CgroupLimits()


def test_empty_cpusets_are_inherited(host):
    root = host(
        {
            "proc/self/cgroup": "0::/a\n",
            "proc/self/mountinfo": V2_MOUNT,
            "sys/fs/cgroup/a/cpuset.cpus.effective": "\n",
            "sys/fs/cgroup/cpuset.cpus.effective": "0-1\n",
        }
    )
    assert read_limits(root).cpuset == {0, 1}


@pytest.mark.parametrize(("text", "cpus"), [("0", {0}), ("0-3,8", {0, 1, 2, 3, 8}), ("", set()), (" 1,3\n", {1, 3})])
def test_cpu_lists(text, cpus):
    assert parse_cpu_list(text) == cpus
