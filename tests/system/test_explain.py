"""`hpcray explain`: why something of a running job waits, from another shell."""

import pytest

SCRIPT = """
import sys, time
import hpcray
from hpcray.util import placement_group

hpcray.init()
cpus = int(hpcray.cluster_resources()["CPU"])

@hpcray.remote
def busy():
    time.sleep(1000)

@hpcray.remote
def later(value):
    return value

@hpcray.remote(num_cpus=64)
class Large:
    pass

running = [busy.remote() for _ in range(cpus)]
waiting = busy.remote()
dependent = later.remote(waiting)
actor = Large.options(name="the large one").remote()
group = placement_group([{"CPU": 64}], name="the group")
time.sleep(0.5)
print("ready", running[0].hex(), waiting.hex(), dependent.hex(), flush=True)
sys.stdin.read()
"""
SOON = 20.0


@pytest.mark.parametrize("run", [[], ["-m", "hpcray", "run", "-n", "3"]])
def test_what_waits_says_for_what(mpi, starter, run):
    argv = [mpi.python, *run, starter.write(SCRIPT)]
    # Its stdin stays open until the test ends it.
    job = starter.start(["sh", "-c", 'sleep 60 | exec "$@"', "sh", *argv], python=mpi.python)
    _, running, waiting, dependent = job.wait_for("ready").split()

    def explain(name):
        told = starter.start(["hpcray", "explain", name], python=mpi.python)
        assert told.process.wait(SOON) == 0, told.story()
        return told.out

    assert "runs on the worker with pid" in explain(running)
    told = explain(waiting)
    assert told.startswith("busy() ("), told
    assert "waits for a place" in told
    assert "needs 1 CPU, 0 free of" in told
    told = explain(dependent).splitlines()
    assert "later() (" in told[0]
    assert "waits for 1 of its arguments" in told[0]
    assert "  busy() (" in told[1], told
    assert "waits for a place" in told[1]
    for name in ("the large one", "Large"):
        told = explain(name)
        assert "actor Large 'the large one'" in told
        assert "needs 64 CPU, 0 free of" in told
    told = explain("the group")
    assert "placement group the group" in told
    assert "room for 0 now and 0 if nothing else ran" in told
    unknown = starter.start(["hpcray", "explain", "nobody"], python=mpi.python)
    assert unknown.process.wait(SOON) == 1, unknown.story()
    assert "has no task, actor, object or placement group 'nobody'" in unknown.err
    job.interrupt()
    job.wait(SOON)
