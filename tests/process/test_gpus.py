"""GPUs as the real NVML bindings find them, through a library that stands in for the driver's."""

import json
import os
import subprocess
import sys

import pytest

ASK = """
import json
import hpcray
hpcray.init(num_cpus=1)
[node] = hpcray.nodes()
print(json.dumps([hpcray.cluster_resources().get("GPU", 0), node["Resources"], node["Labels"]]))
"""
LOOK = """
import dataclasses, json, os, sys
from hpcray.raylet.detect import detect_devices
print(json.dumps(dataclasses.asdict(detect_devices(os.environ)) | {"modules": [m for m in sys.modules if m == "pynvml"]}))
"""


@pytest.fixture
def ask(run_script):
    """A job of one rank; gives its number of GPUs, its node's resources and labels."""

    def ask(script=ASK):
        finished = run_script(script)
        assert finished.returncode == 0, finished.stderr
        return json.loads(finished.stdout.splitlines()[-1])

    return ask


def look(**env):
    """What a process finds."""
    command = [sys.executable, "-c", LOOK]
    found = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=True, timeout=60)
    return json.loads(found.stdout)


@pytest.mark.parametrize("count", [0, 1, 4, 8])
def test_a_node_has_the_gpus_that_nvml_knows(fake_gpus, ask, count):
    fake_gpus(count)
    gpus, resources, labels = ask()
    assert gpus == count
    assert resources.get("accelerator_type:H100", 0) == (1 if count else 0)
    assert labels.get("ray.io/accelerator-type") == ("H100" if count else None)


def test_without_a_driver_there_are_none(fake_gpus, ask):
    fake_gpus(None)
    assert ask()[0] == 0


@pytest.mark.beyond_ray("there the driver's own process looks")
def test_a_number_that_is_given_is_met(own_init, fake_gpus):
    hpcray = own_init
    fake_gpus(4)
    hpcray.init(num_cpus=1, num_gpus=2)
    total = hpcray.cluster_resources()
    assert (total["GPU"], total["accelerator_type:H100"]) == (2, 1)


@pytest.mark.parametrize(("visible", "count"), [("", 0), ("NoDevFiles", 0), ("1", 1), ("3,1", 2)])
def test_cuda_visible_devices_leaves_some(fake_gpus, monkeypatch, ask, visible, count):
    fake_gpus(4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert ask()[0] == count


def test_more_than_are_visible_are_refused(fake_gpus, monkeypatch, run_script):
    fake_gpus(4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    finished = run_script("import hpcray\nhpcray.init(num_gpus=3)\n")
    assert finished.returncode == 1
    assert "ValueError" in finished.stderr


@pytest.mark.beyond_ray("there, no driver need know of them")
def test_more_than_there_are_are_refused(fake_gpus, run_script):
    fake_gpus(2)
    finished = run_script("import hpcray\nhpcray.init(num_gpus=3)\n")
    assert "ValueError: rank 0 on" in finished.stderr
    assert "was asked to offer 3 GPUs" in finished.stderr


@pytest.mark.beyond_ray("there the whole GPU counts")
def test_mig_instances_count_as_gpus_in_place_of_theirs(fake_gpus, ask):
    fake_gpus(3, mig=[7, None, 2])
    gpus, resources, _ = ask()
    assert gpus == 7 + 1 + 2
    assert resources["accelerator_type:H100"] == 1


@pytest.mark.beyond_ray("there the job fails")
@pytest.mark.parametrize("function", ["nvmlInitWithFlags", "nvmlDeviceGetCount_v2", "nvmlDeviceGetHandleByIndex_v2"])
def test_a_driver_that_fails_leaves_a_job_without_gpus(fake_gpus, ask, function):
    fake_gpus(2, fails=f"{function}=999")
    assert ask()[0] == 0


@pytest.mark.beyond_ray("looks at its insides")
class TestDetection:
    def test_each_device_is_described(self, fake_gpus):
        fake_gpus(2, names=["NVIDIA A100-SXM4-40GB", "Tesla T4"])
        found = look()
        first, second = found["devices"]
        assert first.items() >= {"index": 0, "name": "NVIDIA A100-SXM4-40GB", "kind": "A100"}.items()
        assert second.items() >= {"index": 1, "name": "Tesla T4", "kind": "T4", "memory": 80 * 2**30}.items()
        assert first["uuid"] == first["id"]
        assert first["uuid"].startswith("GPU-0")
        assert (found["variable"], found["reason"], found["problem"]) == ("CUDA_VISIBLE_DEVICES", "", "")

    def test_so_is_each_mig_instance(self, fake_gpus):
        fake_gpus(2, mig=[2, None])
        devices = look()["devices"]
        assert [device["uuid"][:6] for device in devices] == ["MIG-00", "MIG-01", "GPU-10"]
        assert [device["index"] for device in devices] == [0, 0, 1]
        assert [device["memory"] // 2**30 for device in devices] == [10, 10, 80]
        assert devices[0]["part_of"].startswith("GPU-0")

    @pytest.mark.parametrize(
        ("visible", "uuids"),
        [("0", ["MIG-00", "MIG-01"]), ("MIG-01", ["MIG-01"]), ("GPU-1,MIG-00", ["GPU-10", "MIG-00"]), ("MIG-0", [])],
    )
    def test_cuda_visible_devices_names_instances(self, fake_gpus, visible, uuids):
        fake_gpus(2, mig=[2, None])
        found = look(CUDA_VISIBLE_DEVICES=visible)
        assert [device["uuid"][:6] for device in found["devices"]] == uuids
        assert found["reason"] == f"CUDA_VISIBLE_DEVICES={visible}"

    def test_mig_without_instances_is_a_problem(self, fake_gpus):
        fake_gpus(1, mig=[0])
        assert "GPU 0 is set to MIG" in look()["problem"]

    @pytest.mark.parametrize(
        ("env", "indices"),
        [
            ({"SLURM_STEP_GPUS": "5,6", "SLURM_JOB_GPUS": "4-7"}, [1, 2]),
            ({"SLURM_JOB_GPUS": "7"}, [3]),
            ({"SLURM_STEP_GPUS": "5,6", "CUDA_VISIBLE_DEVICES": "0"}, [0]),
        ],
    )
    def test_slurm_counts_device_files_and_is_heard_where_cudas_variable_is_not_set(self, fake_gpus, env, indices):
        fake_gpus(4)
        assert [device["index"] for device in look(**env)["devices"]] == indices

    def test_one_gpu_that_is_lost_takes_none_of_the_others_along(self, fake_gpus):
        fake_gpus(3, fails="nvmlDeviceGetMemoryInfo:1=15")
        found = look()
        assert [device["index"] for device in found["devices"]] == [0, 2]
        assert found["problem"] == "GPU 1 does not answer: GPU is lost"

    @pytest.mark.parametrize(
        ("fails", "problem"),
        [
            ("nvmlInitWithFlags=18", "the NVIDIA driver does not answer: RM has detected an NVML/RM version mismatch."),
            ("nvmlDeviceGetCount_v2=999", "the NVIDIA driver does not tell its GPUs: Unknown Error"),
        ],
    )
    def test_a_driver_that_fails_is_a_problem_with_its_words(self, fake_gpus, fails, problem):
        fake_gpus(2, fails=fails)
        assert (look()["devices"], look()["problem"]) == ([], problem)

    def test_bindings_that_cannot_be_imported_are_a_problem(self, fake_gpus, tmp_path, monkeypatch):
        fake_gpus(2)
        (tmp_path / "pynvml.py").write_text("raise ImportError('broken')")
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
        assert look()["problem"] == "nvidia-ml-py cannot be imported: broken"

    @pytest.mark.parametrize("function", ["nvmlDeviceGetMinorNumber", "nvmlDeviceGetMigMode"])
    def test_what_a_driver_does_not_support_it_is_not_asked_for(self, fake_gpus, function):
        fake_gpus(2, fails=f"{function}=3")
        assert (len(look()["devices"]), look()["problem"]) == (2, "")

    def test_a_driver_that_is_not_loaded_and_one_without_gpus_are_no_problem(self, fake_gpus):
        fake_gpus(None)
        assert (look()["reason"], look()["problem"]) == ("the NVIDIA driver is not loaded", "")
        fake_gpus(0)
        assert (look()["reason"], look()["problem"]) == ("the NVIDIA driver knows no GPU", "")

    def test_where_there_is_no_library_its_bindings_are_not_even_imported(self, fake_gpus):
        fake_gpus(1)
        assert look()["modules"] == ["pynvml"]
        if look(LD_LIBRARY_PATH="")["devices"]:
            pytest.skip("this host has an NVIDIA driver")
        assert look(LD_LIBRARY_PATH="")["modules"] == []
