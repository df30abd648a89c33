"""GPUs of a host that several ranks share: each task sees its own rank's, and none is given to two at a time."""

import json

import pytest

SCRIPT = """
import json, os, sys
from pathlib import Path
import hpcray
from hpcray.util.placement_group import placement_group
from hpcray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

FOLDER = Path("in-use").absolute()

@hpcray.remote(num_cpus=0, max_retries=0)
def look(most=1):
    context = hpcray.get_runtime_context()
    ids, visible = hpcray.get_gpu_ids(), os.environ.get("CUDA_VISIBLE_DEVICES", "")  # a node without GPUs sets nothing
    assert visible == ",".join(ids) and ids == context.get_accelerator_ids()["GPU"], (visible, ids)
    marks = []
    for gpu in ids:
        marks.append(next(mark for part in range(most) if take(mark := FOLDER / f"{gpu}-{part}")))
    for mark in marks:
        mark.rmdir()
    return context.get_node_id(), ids

def take(mark):
    try:
        mark.mkdir()
    except FileExistsError:
        return False
    return True

@hpcray.remote(num_cpus=0, num_gpus=1)
class Holder:
    def look(self):
        return hpcray.get_gpu_ids(), os.environ["CUDA_VISIBLE_DEVICES"]

    def look_below(self):
        return hpcray.get(look.options(num_gpus=1).remote())[1]

hpcray.init()
FOLDER.mkdir()
gpus = {node["NodeID"]: int(node["Resources"].get("GPU", 0)) for node in hpcray.nodes()}
most = max(gpus.values())
owners = {}
refs = [look.options(num_gpus=1 + number % most).remote() for number in range(24)]
refs += [look.options(num_gpus=0).remote() for _ in range(6)]
for node, count in gpus.items():
    bound = NodeAffinitySchedulingStrategy(node, soft=False)
    if count:
        refs.append(look.options(num_gpus=count, scheduling_strategy=bound).remote())
    refs.append(look.options(num_gpus=0, scheduling_strategy=bound).remote())
for node, ids in hpcray.get(refs, timeout=50):
    for gpu in ids:
        assert owners.setdefault(gpu, node) == node, "two ranks offer one GPU"
total = sum(gpus.values())
assert len(owners) == total, (owners, gpus)
halves = hpcray.get([look.options(num_gpus=0.5).remote(2) for _ in range(4 * total)], timeout=50)
assert {len(ids) for _, ids in halves} == {1}
holders = [Holder.remote() for _ in range(total)]
held = hpcray.get([holder.look.remote() for holder in holders], timeout=50)
assert sorted(visible for _, visible in held) == sorted(owners), held
if total > 1:
    below = holders[0].look_below.remote()  # waits for the one that comes free
    hpcray.kill(holders[-1])
    assert hpcray.get(below, timeout=50) == held[-1][0]
del holders
group = placement_group([{"GPU": 1}] * total, strategy="SPREAD")
hpcray.get(group.ready(), timeout=50)
inside = [PlacementGroupSchedulingStrategy(group, index) for index in range(total)]
kept = [Holder.options(scheduling_strategy=bundle).remote() for bundle in inside]
assert sorted(visible for _, visible in hpcray.get([one.look.remote() for one in kept], timeout=50)) == sorted(owners)
print(json.dumps(sorted(gpus.values())))
"""


@pytest.mark.parametrize(
    ("ranks", "gpus", "dealt"), [(1, 1, [1]), (3, 4, [0, 2, 2]), (4, 8, [0, 2, 3, 3]), (3, 1, [0, 0, 1])]
)
def test_each_gpu_is_somebodys_own(mpi, starter, fake_gpus, ranks, gpus, dealt):
    fake_gpus(gpus)
    script = starter.write(SCRIPT)
    finished = starter.run(["hpcray", "run", "-n", str(ranks), script], python=mpi.python, env={"HPCRAY_CHECK": "1"})
    assert finished.code == 0, str(finished)
    assert json.loads(finished.out.splitlines()[-1]) == dealt


def test_it_is_so_under_a_users_own_mpirun(mpi, starter, fake_gpus):
    fake_gpus(4)
    script = starter.write(SCRIPT)
    finished = starter.run([*mpi.mpirun(3), mpi.python, script], python=mpi.python)
    assert finished.code == 0, str(finished)
    assert json.loads(finished.out.splitlines()[-1]) == [0, 2, 2]
