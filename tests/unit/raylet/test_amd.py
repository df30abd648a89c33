import pytest

from hpcray.raylet.accelerators import DeviceReport
from hpcray.raylet.amd import Amd

MI210, OTHER = 0x740F, 0x1234


@pytest.fixture
def kfd(tmp_path):
    """Writes nodes of KFD's topology: `kfd(device id, unique id)` a GPU, `kfd()` a CPU; gives the root."""
    boot = tmp_path / "proc/sys/kernel/random/boot_id"
    boot.parent.mkdir(parents=True)
    boot.write_text("boot\n")
    nodes = []

    def add(device=None, unique=0, *, readable=True):
        number = len(nodes)
        folder = tmp_path / f"sys/class/kfd/kfd/topology/nodes/{number}"
        nodes.append(folder)
        (folder / "mem_banks/0").mkdir(parents=True)
        (folder / "gpu_id").write_text("0\n" if device is None else f"{1000 + number}\n")
        (folder / "name").write_text("\n" if device is None else "gfx90a\n")
        text = f"vendor_id 4098\ndevice_id {device or 0}\nunique_id {unique}\nlocation_id {256 * number}\ndomain 0\n"
        (folder / "properties").write_text(f"{text}drm_render_minor {127 + number}\n" if readable else "")
        bank = f"heap_type {0 if device is None else 1}\nsize_in_bytes {2**36}\nflags 0\n"
        (folder / "mem_banks/0/properties").write_text(bank)
        return tmp_path

    return add


def found(root, **env):
    report = Amd().detect(env, root)
    return [(device.uuid, device.id) for device in report.devices], report.reason


def test_without_its_driver_there_is_nothing_to_say(tmp_path):
    assert Amd().detect({"HIP_VISIBLE_DEVICES": "0"}, tmp_path) == DeviceReport()


def test_gpus_are_read_from_the_kernels_topology(kfd):
    kfd()
    kfd(MI210, 0xABC)
    report = Amd().detect({}, kfd(OTHER))
    first, second = report.devices
    assert (report.variable, report.reason) == ("HIP_VISIBLE_DEVICES", "")
    assert (first.uuid, first.id, first.index) == ("GPU-0000000000000abc", "0", 0)
    assert (first.name, first.kind) == ("AMD Instinct MI210", "AMD-Instinct-MI210")
    assert (first.memory, first.file_number) == (2**36, 128)
    assert (second.uuid, second.id, second.name, second.kind) == ("boot 0:512", "1", "gfx90a", "")


def test_a_gpu_that_a_control_group_withholds_is_none(kfd):
    kfd(MI210, 1, readable=False)
    assert found(kfd(MI210, 2)) == ([("GPU-0000000000000002", "0")], "")


A, B, C = (f"GPU-{number:016x}" for number in (0xA, 0xB, 0xC))


@pytest.mark.parametrize(
    ("env", "left"),
    [
        ({"HIP_VISIBLE_DEVICES": "2,0"}, [(C, "2"), (A, "0")]),
        ({"HIP_VISIBLE_DEVICES": ""}, []),
        ({"CUDA_VISIBLE_DEVICES": "1"}, [(B, "1")]),
        ({"CUDA_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "2"}, [(C, "2")]),
        ({"ROCR_VISIBLE_DEVICES": "1,2"}, [(B, "0"), (C, "1")]),
        ({"ROCR_VISIBLE_DEVICES": C}, [(C, "0")]),
        ({"ROCR_VISIBLE_DEVICES": "1,2", "HIP_VISIBLE_DEVICES": "1"}, [(C, "1")]),
        ({"ROCR_VISIBLE_DEVICES": "1,2", "HIP_VISIBLE_DEVICES": "2"}, []),
        ({"SLURM_STEP_GPUS": "128"}, [(B, "1")]),
        ({"SLURM_JOB_GPUS": "0,2"}, [(A, "0"), (C, "2")]),
        ({"SLURM_JOB_GPUS": "0", "ROCR_VISIBLE_DEVICES": "1"}, [(B, "0")]),
    ],
)
def test_hip_counts_what_rocr_leaves(kfd, env, left):
    kfd(MI210, 0xA)
    kfd(MI210, 0xB)
    devices, _ = found(kfd(MI210, 0xC), **env)
    assert devices == left


def test_what_takes_gpus_away_is_named(kfd):
    kfd(MI210, 1)
    root = kfd(MI210, 2)
    told = {"ROCR_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "0"}
    assert found(root, **told)[1] == "ROCR_VISIBLE_DEVICES=1, HIP_VISIBLE_DEVICES=0"
    assert found(root, SLURM_JOB_GPUS="1")[1] == "SLURM_JOB_GPUS=1"
