"""A program that uses everything at once: CPU tasks, parts of GPUs and whole ones, custom resources, placement groups,
nested tasks, actors and retries. It prints one line that follows from its input alone, however the work was spread.

`python mixed_work.py FOLDER`: an empty folder that all ranks see, where tasks leave marks of who is using what.
"""

import hashlib
import os
import sys
from pathlib import Path

import hpcray
from hpcray.util.placement_group import placement_group, remove_placement_group
from hpcray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

WAIT = 100  # seconds; nothing here takes one
FOLDER = Path(sys.argv[1])


def digest(*parts):
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


class Alone:
    """Fails if more than `most` are inside under this name at a time."""

    def __init__(self, name, most=1):
        self.name, self.most = name, most

    def __enter__(self):
        for number in range(self.most):
            self.mark = FOLDER / f"{self.name}-{number}"
            try:
                self.mark.mkdir()
            except FileExistsError:
                continue
            return
        raise AssertionError(f"more than {self.most} share {self.name}")

    def __exit__(self, *_):
        self.mark.rmdir()


@hpcray.remote
def leaf(seed, *inputs):
    return digest("leaf", seed, inputs)


@hpcray.remote
def tree(depth, seed):
    """Nested tasks: more of them than there are CPUs wait at a time."""
    if depth == 0:
        return digest("tree", seed)
    children = [tree.remote(depth - 1, 3 * seed + branch) for branch in range(3)]
    return digest(depth, hpcray.get(children))


@hpcray.remote(num_gpus=1, max_retries=0)
def on_gpu(seed):
    """A whole GPU is nobody else's."""
    visible = os.environ["CUDA_VISIBLE_DEVICES"]
    assert visible == ",".join(hpcray.get_gpu_ids()), visible
    with Alone(visible):
        return digest("gpu", seed, len(hpcray.get_gpu_ids()))


@hpcray.remote(num_gpus=0.5, max_retries=0)
def on_half_a_gpu(seed):
    [gpu] = hpcray.get_gpu_ids()
    with Alone(f"halves of {gpu}", 2):
        return digest("half", seed)


@hpcray.remote(num_cpus=0, resources={"licence": 1}, max_retries=0)
def with_licence(seed):
    """There is one for each rank that offers any."""
    with Alone(f"licence of {hpcray.get_runtime_context().get_node_id()}"):
        return digest("licence", seed)


@hpcray.remote(max_retries=2)
def dies_once(seed):
    mark = FOLDER / f"died {seed}"
    if not mark.exists():
        mark.touch()
        os._exit(1)
    return digest("died", seed)


@hpcray.remote(max_retries=3, retry_exceptions=[ConnectionError])
def fails_twice(seed):
    marks = [FOLDER / f"failed {seed} {attempt}" for attempt in range(2)]
    for mark in marks:
        if not mark.exists():
            mark.touch()
            raise ConnectionError(seed)
    return digest("failed", seed)


@hpcray.remote
class Sum:
    """Its result depends on the order of calls."""

    def __init__(self, seed):
        self.value = digest("sum", seed)
        self.gpus = tuple(hpcray.get_gpu_ids())

    def add(self, part):
        self.value = digest(self.value, part)
        return self.value

    def add_from_tasks(self, seed):
        return self.add(hpcray.get([leaf.options(num_cpus=0).remote(seed + number) for number in range(3)]))

    def where(self):
        assert tuple(hpcray.get_gpu_ids()) == self.gpus
        return hpcray.get_runtime_context().get_node_id()

    def count_gpus(self):
        return len(self.gpus)


def in_group(strategy, seed):
    """Actors and tasks in the bundles of a group, which goes away at the end."""
    group = placement_group([{"CPU": 1, "GPU": 0.5}, {"CPU": 1}], strategy=strategy)
    hpcray.get(group.ready(), timeout=WAIT)
    where = [PlacementGroupSchedulingStrategy(group, bundle) for bundle in (0, 1)]
    with_gpu = Sum.options(num_cpus=0, num_gpus=0.5, scheduling_strategy=where[0]).remote(seed)
    plain = Sum.options(num_cpus=0, scheduling_strategy=where[1]).remote(seed)
    calls = [actor.add.remote(leaf.remote(number)) for number in range(4) for actor in (with_gpu, plain)]
    tasks = [leaf.options(scheduling_strategy=where[number % 2]).remote(number, *calls[:2]) for number in range(4)]
    results = hpcray.get([*calls, *tasks, with_gpu.count_gpus.remote()], timeout=WAIT)
    nodes = hpcray.get([with_gpu.where.remote(), plain.where.remote()], timeout=WAIT)
    remove_placement_group(group)
    if strategy == "STRICT_SPREAD":
        assert nodes[0] != nodes[1]
    return results


def main():
    ranks = [node for node in hpcray.nodes() if node["Resources"].get("CPU")]
    free_at_first = hpcray.cluster_resources()
    refs = [leaf.remote(number) for number in range(100)]
    refs += [leaf.remote(number, refs[number], refs[-1]) for number in range(50)]
    refs += [tree.remote(3, seed) for seed in range(2)]
    refs += [on_gpu.options(num_gpus=1 + number % 2).remote(number) for number in range(10)]
    refs += [on_half_a_gpu.remote(number) for number in range(16)]
    refs += [with_licence.remote(number) for number in range(12)]
    refs += [dies_once.remote(number) for number in range(4)]
    refs += [fails_twice.remote(number) for number in range(4)]
    refs += [
        leaf.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(number)
        for number, node in enumerate(ranks)
    ]
    refs += [leaf.options(scheduling_strategy="SPREAD").remote(number) for number in range(10)]
    counter = Sum.options(name="counter").remote(0)
    refs += [counter.add.remote(ref) for ref in refs[-10:]]
    refs += [counter.add_from_tasks.remote(number) for number in range(3)]
    results = [
        in_group(strategy, seed) for seed, strategy in enumerate(["PACK", "SPREAD", "STRICT_SPREAD", "PACK", "SPREAD"])
    ]
    owner = Sum.options(num_gpus=1).remote(1)
    results.append(
        hpcray.get([owner.count_gpus.remote(), hpcray.get_actor("counter").add.remote("last")], timeout=WAIT)
    )
    hpcray.kill(owner)
    results.append(hpcray.get(refs, timeout=WAIT))
    assert hpcray.cluster_resources() == free_at_first
    print("answer", digest(results))


if __name__ == "__main__":
    hpcray.init()
    main()
