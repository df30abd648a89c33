import pytest

from hpcray.raylet.accelerators import Device, choose_by_slurm, choose_visible, visible_entries


def gpu(index, letter, part_of="", file_number=None):
    uuid = f"{'MIG' if part_of else 'GPU'}-{letter * 4}"
    return Device(uuid, uuid, index, "H100", 80, "H100", index + 4 if file_number is None else file_number, part_of)


GPUS = [gpu(0, "a"), gpu(1, "b"), gpu(2, "c")]


def chosen(devices, text):
    return [device.uuid[4] for device in choose_visible(devices, text)]


@pytest.mark.parametrize(
    ("visible", "left"),
    [
        ("0,1,2", "abc"),
        ("2,0", "ca"),
        (" 2 , 0 ", "ca"),
        ("GPU-bbbb", "b"),
        ("GPU-b", "b"),
        ("GPU-bbbb, GPU-c", "bc"),
        ("GPU-c,0", "ca"),
        ("", ""),
        ("-1", ""),
        ("NoDevFiles", ""),
        ("void", ""),
        ("1,-1,0", "b"),
        ("0,7,1", "a"),
        ("0,GPU-x,1", "a"),
        ("0,,1", "a"),
        ("0,0", ""),
        ("1,GPU-b", ""),
        ("GPU-", ""),
        ("MIG-a", ""),
        ("²", ""),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_does(visible, left):
    assert "".join(chosen(GPUS, visible)) == left


# GPU 0 is in two parts, GPU 1 whole, GPU 2 in one part.
PARTS = [gpu(0, "d", "GPU-aaaa"), gpu(0, "e", "GPU-aaaa"), gpu(1, "b"), gpu(2, "f", "GPU-cccc")]


@pytest.mark.parametrize(
    ("visible", "left"),
    [
        ("MIG-eeee", "e"),
        ("MIG-f,MIG-d", "fd"),
        ("MIG-", ""),
        ("0", "de"),
        ("1,0", "bde"),
        ("GPU-cccc", "f"),
        ("GPU-a,1", "deb"),
        ("GPU-", "b"),
        ("0,MIG-d", ""),
    ],
)
def test_parts_are_named_by_themselves_or_by_their_gpu(visible, left):
    assert "".join(chosen(PARTS, visible)) == left


def test_entries_end_at_the_first_that_names_nothing():
    assert visible_entries("0, GPU-a,MIG-b/1/0,x,1") == ["0", "GPU-a", "MIG-b/1/0"]


@pytest.mark.parametrize(
    ("env", "left", "told"),
    [
        ({}, "abc", ""),
        ({"SLURM_JOB_GPUS": ""}, "abc", ""),
        ({"SLURM_JOB_GPUS": "4,6"}, "ac", "SLURM_JOB_GPUS=4,6"),
        ({"SLURM_JOB_GPUS": "4-6", "SLURM_STEP_GPUS": "5"}, "b", "SLURM_STEP_GPUS=5"),
        # Where device files have other numbers (AMD's begin at 128) Slurm may count from 0.
        ({"SLURM_JOB_GPUS": "0-1"}, "ab", "SLURM_JOB_GPUS=0-1"),
        ({"SLURM_JOB_GPUS": "9"}, "", "SLURM_JOB_GPUS=9"),
        ({"SLURM_JOB_GPUS": "gpu"}, "abc", ""),
    ],
)
def test_slurm_names_gpus_by_their_number_on_the_host(env, left, told):
    devices, reason = choose_by_slurm(GPUS, env)
    assert ("".join(device.uuid[4] for device in devices), reason) == (left, told)
