"""`hpcray memory` looks at a running job from another shell, and says so in one line where there is none to look at."""

import json
import signal

import pytest

from .conftest import wait_until

SCRIPT = """
import os, sys, time
import numpy as np
import hpcray

@hpcray.remote(num_cpus=0)
class Reader:
    def look(self, refs):
        self.array = hpcray.get(refs[0])
        return os.getpid()

@hpcray.remote
def make():
    return np.zeros(2_000_000, np.uint8)

hpcray.init()
large, made, small = hpcray.put(np.ones(8_000_000, np.uint8)), make.remote(), hpcray.put("small")
hpcray.wait([made])
reader = Reader.remote()
print("ready", large.hex(), made.hex(), small.hex(), os.getpid(), hpcray.get(reader.look.remote([large])), flush=True)
sys.stdin.read()
"""
PUT_LINE = 1 + next(n for n, line in enumerate(SCRIPT.splitlines()) if "hpcray.put" in line)
SOON = 20.0


@pytest.mark.parametrize("run", [[], ["-m", "hpcray", "run"], ["-m", "hpcray", "run", "-n", "3"]])
def test_objects_are_shown_with_place_pins_references_and_origin(mpi, starter, run):
    ranks = 3 if "-n" in run else 1
    script = starter.write(SCRIPT)
    argv = [mpi.python, *run, script]
    # Its stdin stays open until the test closes it.
    job = starter.start(["sh", "-c", 'sleep 60 | exec "$@"', "sh", *argv], python=mpi.python)
    _, large, made, small, driver, reader = job.wait_for("ready").split()
    shown = starter.start(["hpcray", "memory", "--json"], python=mpi.python)
    assert shown.process.wait(SOON) == 0, shown.story()
    data = json.loads(shown.out)
    objects = {found["id"]: found for found in data["objects"]}
    assert [found["size"] for found in data["objects"]] == sorted((f["size"] for f in data["objects"]), reverse=True)
    assert objects[large]["size"] >= 8_000_000
    assert objects[large]["made_by"] == f"put by driver {driver} at {starter.folder / script}:{PUT_LINE}"
    assert objects[made]["made_by"] == f"make() for driver {driver}"
    assert [rank["state"] for rank in objects[small]["ranks"]] == ["inline"]
    pinned_by = {name for rank in objects[large]["ranks"] for name in rank["pinned_by"]}
    assert f"worker {reader} (Reader)" in pinned_by
    clients = {name for rank in objects[large]["ranks"] for name in rank["clients"]}
    assert f"driver {driver}" in clients
    assert [rank["rank"] for rank in data["ranks"]] == list(range(ranks))
    assert sum(rank["primary"]["bytes"] for rank in data["ranks"]) >= 10_000_000
    assert all(rank["writing"] == 0 for rank in data["ranks"])

    table = starter.start(["hpcray", "memory", "--limit", "1"], python=mpi.python)
    assert table.process.wait(SOON) == 0, table.story()
    lines = table.out.splitlines()
    assert lines[0].startswith("SIZE"), table.story()
    assert lines[1].startswith("8.0 MB"), table.story()
    assert lines[1].endswith(large), table.story()
    assert "--limit shows more" in lines[2], table.story()
    assert [line.split()[0] for line in lines[5:]] == [str(rank) for rank in range(ranks)], table.story()
    assert table.err == ""
    assert job.process.poll() is None, "the job was not disturbed"
    job.interrupt()
    job.wait(SOON)


def test_no_job_or_several_are_one_clear_line(mpi, starter):
    alone = starter.run(["hpcray", "memory"], python=mpi.python)
    assert alone.code == 2
    assert alone.err.startswith("hpcray: no job of yours runs on this host"), alone.err
    assert len(alone.err.splitlines()) == 1
    jobs = [starter.start([mpi.python, "-m", "hpcray"], python=mpi.python) for _ in range(2)]
    for job in jobs:
        job.wait_for("init(address='auto')")
    several = starter.start(["hpcray", "memory"], python=mpi.python)
    assert several.process.wait(SOON) == 2, several.story()
    assert several.err.startswith("hpcray: several jobs of yours run on this host"), several.story()
    assert len(several.err.splitlines()) == 1
    address = several.err.strip().split(", ")[-1]
    one = starter.start(["hpcray", "memory", "--address", address], python=mpi.python)
    assert one.process.wait(SOON) == 0, one.story()
    assert "no objects" in one.out
    for job in jobs:
        job.process.send_signal(signal.SIGTERM)
    wait_until(lambda: all(job.process.poll() is not None for job in jobs), SOON, jobs[0].story)
    for job in jobs:
        job.wait(SOON)
    gone = starter.run(["hpcray", "memory", "--address", address], python=mpi.python)
    assert gone.code == 2
    assert gone.err == f"hpcray: no job answers at {address}: it has ended\n"


def test_a_word_that_is_no_address_is_one_clear_line(mpi, starter):
    wrong = starter.run(["hpcray", "memory", "--address", "localhost:6379"], python=mpi.python)
    assert wrong.code == 2
    assert wrong.err.startswith("hpcray: address must be"), wrong.err
    assert len(wrong.err.splitlines()) == 1
