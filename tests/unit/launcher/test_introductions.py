import pytest

from hpcray.ids import node_id
from hpcray.launcher.introductions import Introduction, SeenGpu, make_nodes
from hpcray.resources import UNIT, as_floats

GIB = 2**30


def seen(*letters, kind="H100"):
    return [SeenGpu(f"GPU-{letter}", f"GPU-{letter}", kind) for letter in letters]


def rank(host="a", **changed):
    fields = {
        "version": "1", "python": "3", "host": host, "machine": host, "pid": 1, "affinity": list(range(8)), "cpus_on_host": 8,
        "cpus_of_rank": None, "memory": 8 * GIB, "gpus": None, "gpu_variable": "CUDA_VISIBLE_DEVICES", "num_cpus": None,
        "num_gpus": None, "head_cpus": None, "resources": {}, "labels": {}, "switch": [], "doorbell": b"",
        "nonce": b"nonce678", "store": 0,
    }  # fmt: skip
    return Introduction(**{**fields, **changed})


def nodes(*ranks):
    return make_nodes(ranks, 0.25)


def offered(name, *ranks):
    return [as_floats(node.resources).get(name, 0) for node in nodes(*ranks)]


def test_a_rank_alone_offers_all_that_it_has():
    [node] = nodes(rank(gpus=seen("a", "b"), resources={"licence": 2.0}, labels={"rack": "7"}))
    assert as_floats(node.resources) == {
        "CPU": 8, "GPU": 2, "memory": 6 * GIB, "object_store_memory": 2 * GIB, "licence": 2,
        "accelerator_type:H100": 1, "node:a": 1, "node:__internal_head__": 1,
    }  # fmt: skip
    assert node.gpus == ["GPU-a", "GPU-b"]
    assert node.labels == {
        "ray.io/node-id": node_id(b"nonce678", 0),
        "hpcray/rank": "0", "hpcray/hostname": "a", "ray.io/accelerator-type": "H100", "rack": "7",
    }  # fmt: skip


def test_rank_0_leaves_cpus_and_gpus_to_the_others_of_its_host():
    here = [rank(gpus=seen(*"abcd")) for _ in range(3)]
    assert offered("CPU", *here) == [0, 4, 4]
    assert [node.gpus for node in nodes(*here)] == [[], ["GPU-a", "GPU-b"], ["GPU-c", "GPU-d"]]
    assert "accelerator_type:H100" not in nodes(*here)[0].resources
    here[0].head_cpus = 2
    assert offered("CPU", *here)[0] == 2
    assert offered("GPU", *here) == [2, 1, 1]


def test_rank_0_alone_on_its_host_offers_its_gpus_even_without_cpus():
    ranks = [rank("a", gpus=seen("a"), head_cpus=0), rank("b", gpus=seen("b", "c"))]
    assert offered("GPU", *ranks) == [1, 2]
    assert offered("CPU", *ranks) == [0, 8]


def test_ranks_that_may_run_on_the_same_cpus_have_different_ones():
    assert [node.cpus for node in nodes(rank(), rank(), rank())] == [(), (0, 1, 2, 3), (4, 5, 6, 7)]
    assert nodes(rank(num_cpus=1))[0].cpus == tuple(range(8))
    few = nodes(*(rank(affinity=[3]) for _ in range(3)))
    assert [(node.cpus, node.resources.get("CPU", 0)) for node in few] == [((), 0), ((3,), UNIT), ((), UNIT)]


def test_none_are_a_ranks_own_where_the_job_may_only_use_some():
    # Another job may be using the same ones: a quota and Slurm without affinity say how many, and not which.
    [node] = nodes(rank(cpus_on_host=4))
    assert (node.cpus, node.resources["CPU"]) == ((), 4 * UNIT)


def test_every_rank_has_its_say():
    ranks = [
        rank(),
        rank(num_cpus=3, resources={"disk": 1}, labels={"kind": "slow"}),
        rank(num_gpus=1, gpus=seen("a", "b")),
        rank(gpus=seen("a", "b")),
    ]
    assert offered("CPU", *ranks) == [0, 3, 3, 2]
    assert offered("disk", *ranks) == [0, 1, 0, 0]
    assert offered("GPU", *ranks) == [0, 0, 1, 1]
    assert [node.labels.get("kind") for node in nodes(*ranks)] == [None, "slow", None, None]


def test_containers_of_one_host_share_its_gpus():
    ranks = [rank(machine=name, gpus=seen("a", "b")) for name in ("first", "second")]
    assert [node.gpus for node in nodes(*ranks)] == [["GPU-a"], ["GPU-b"]]


def test_where_nobody_knows_which_gpus_there_are_the_users_number_is_believed():
    [node] = nodes(rank(num_gpus=2))
    assert (as_floats(node.resources)["GPU"], node.gpus) == (2, [])
    assert offered("GPU", rank()) == [0]


@pytest.mark.parametrize("count", [1, 3])
def test_no_rank_offers_more_gpus_than_its_share(count):
    ranks = [rank(gpus=seen(*"abcd"), num_gpus=count) for _ in range(3)]
    if count == 1:
        assert offered("GPU", *ranks) == [0, 1, 1]
        return
    with pytest.raises(ValueError, match=r"rank 1 on a was asked to offer 3 GPUs .* of the 4 that it may use is 2"):
        nodes(*ranks)


def test_the_users_label_outdoes_the_accelerators():
    [node] = nodes(rank(gpus=seen("a"), labels={"ray.io/accelerator-type": "A100-80G"}))
    assert node.labels["ray.io/accelerator-type"] == "A100-80G"


def test_stores_larger_than_their_host_are_refused():
    with pytest.raises(ValueError, match="object stores of"):
        nodes(rank(store=9 * GIB))
