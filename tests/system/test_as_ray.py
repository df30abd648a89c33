"""`--as-ray` in all ways of `hpcray run`: the script and its workers on all ranks."""

import pytest

from .conftest import WAYS_OF_RUN

PROGRAM = """
import sys
import ray
from ray.util.state import list_nodes

@ray.remote(scheduling_strategy="SPREAD")
def where():
    import ray
    return ray.get_runtime_context().get_node_id(), ray.__name__, ray.get.__module__

if __name__ == "__main__":
    ray.init(address="auto")
    found = ray.get([where.remote() for _ in range(20)])
    assert {rest for _, *rest in map(tuple, found) for rest in [tuple(rest)]} == {("ray", "hpcray.api")}
    print("ran on", len({node for node, *_ in found}), "of", len(list_nodes()), sys.argv[1:])
"""


@pytest.mark.parametrize("way", WAYS_OF_RUN, indirect=True)
def test_import_ray_is_hpcray_on_all_ranks(way, starter):
    script = starter.write(PROGRAM)
    ranks = 3 if way.mpi else 1
    argv = way.argv(ranks, "--as-ray", "--num-cpus", "1", script, "x")
    finished = starter.run(argv, python=way.python)
    assert finished.code == 0, str(finished)
    assert f"of {ranks} ['x']" in finished.out
    if ranks == 3:
        assert "ran on 2" in finished.out or "ran on 3" in finished.out, str(finished)
