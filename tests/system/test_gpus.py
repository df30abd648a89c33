"""The GPUs of a host, shared by the ranks of a job there; and `hpcray doctor`, which shows them."""

import json

import pytest

SHOW = """
import json
import hpcray
hpcray.init()
print(json.dumps([[node["Resources"].get("GPU", 0), node["Labels"]] for node in hpcray.nodes()]))
"""


def gpu_counts(finished):
    assert finished.code == 0, str(finished)
    return [count for count, _ in json.loads(finished.out.splitlines()[-1])]


@pytest.mark.parametrize("way", ["mpirun-run", "mpirun-init", "run-n"])
def test_ranks_of_a_host_share_its_gpus(way, any_mpi, starter, fake_gpus):
    fake_gpus(4)
    script = starter.write(SHOW)
    argv = {
        "mpirun-run": [*any_mpi.mpirun(4), "hpcray", "run", script],
        "mpirun-init": [*any_mpi.mpirun(4), any_mpi.python, script],
        "run-n": ["hpcray", "run", "-n", "4", script],
    }[way]
    assert gpu_counts(starter.run(argv, python=any_mpi.python)) == [0, 2, 1, 1]


def test_mig_instances_are_shared_one_by_one(any_mpi, starter, fake_gpus):
    fake_gpus(1, mig=[4])
    script = starter.write(SHOW)
    argv = [*any_mpi.mpirun(3), "hpcray", "run", script]
    assert gpu_counts(starter.run(argv, python=any_mpi.python)) == [0, 2, 2]


def test_a_number_for_each_rank_is_met_or_refused(any_mpi, starter, fake_gpus):
    fake_gpus(4)
    script = starter.write(SHOW)
    one_each = [*any_mpi.mpirun(3), "hpcray", "run", "--num-gpus", "1", "--labels", "rack=7", script]
    finished = starter.run(one_each, python=any_mpi.python)
    assert gpu_counts(finished) == [0, 1, 1]
    assert [labels["rack"] for _, labels in json.loads(finished.out.splitlines()[-1])] == ["7"] * 3
    three_each = [*any_mpi.mpirun(3), "hpcray", "run", "--num-gpus", "3", script]
    finished = starter.run(three_each, python=any_mpi.python)
    assert finished.code == 2
    assert "was asked to offer 3 GPUs (--num-gpus, for each rank), but its share of the 4" in finished.err


def doctor(starter, any_mpi, ranks, **env):
    argv = ["hpcray", "doctor"]
    if ranks > 1:
        argv = [*any_mpi.mpirun(ranks), *argv]
    return starter.run(argv, python=any_mpi.python, env=env)


def test_the_doctor_lists_each_gpu_beside_the_rank_that_offers_it(any_mpi, starter, fake_gpus):
    fake_gpus(4, names=["NVIDIA A100-SXM4-40GB"], mig=[None, 2])
    finished = doctor(starter, any_mpi, 3, CUDA_VISIBLE_DEVICES="0,1,3")
    assert finished.code == 0, str(finished)
    lines = [line.split() for line in finished.out.splitlines()]
    table = lines[lines.index(["rank", "host", "GPU", "name", "memory", "UUID"]) + 1 :]
    assert [(row[0], row[2], row[-1][:6]) for row in table[:4]] == [
        ("1", "0", "GPU-00"),
        ("1", "1", "MIG-10"),
        ("2", "1", "MIG-11"),
        ("2", "3", "GPU-30"),
    ]
    assert "2 x NVIDIA A100-SXM4-40GB, 2 x NVIDIA A100-SXM4-40GB MIG 1g.10gb" in finished.out


@pytest.mark.parametrize(
    ("pretended", "env", "told"),
    [
        ({"count": None}, {}, "OK    GPUs             none (the NVIDIA driver is not loaded)"),
        ({"count": 2}, {"CUDA_VISIBLE_DEVICES": ""}, "OK    GPUs             none (CUDA_VISIBLE_DEVICES=)"),
        (
            {"count": 2, "fails": "nvmlInitWithFlags=18"},
            {},
            "WARN  GPUs             none; the NVIDIA driver does not answer: RM has detected",
        ),
        (
            {"count": 2, "fails": "nvmlDeviceGetUUID:1=15"},
            {},
            "WARN  GPUs             1 x NVIDIA H100 80GB HBM3; GPU 1 does not answer: GPU is lost",
        ),
    ],
    ids=["no driver", "hidden", "broken driver", "lost GPU"],
)
def test_the_doctor_says_why_there_are_none_or_fewer(any_mpi, starter, fake_gpus, pretended, env, told):
    fake_gpus(**pretended)
    finished = doctor(starter, any_mpi, 1, **env)
    assert finished.code == 0, str(finished)
    assert told in finished.out
