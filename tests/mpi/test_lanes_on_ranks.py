"""Calls one at a time to workers of other ranks: on one host they go past the raylets, between hosts they do not."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest

import hpcray
from hpcray.client import require_client
from hpcray.exceptions import ActorDiedError

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.hpcray(num_cpus=1, object_store_memory=128 << 20),
    pytest.mark.usefixtures("nothing_left_behind", "hpcray_job"),
]
ROUNDS = 200


def lanes() -> int:
    return sum(lane.sock is not None for lane in require_client()._lanes._lanes.values())


def test_tasks_one_at_a_time():
    @hpcray.remote
    def double(number):
        return np.full(50_000, 2 * number) if number % 50 == 49 else 2 * number

    most = 0
    for number in range(ROUNDS):
        value = hpcray.get(double.remote(number))
        assert np.max(value) == 2 * number
        most = max(most, lanes())
    assert most == 1


def test_calls_of_actors_on_all_ranks_in_order():
    @hpcray.remote(num_cpus=1)
    class Log:
        def __init__(self):
            self.calls = []

        def add(self, number):
            self.calls.append(number)

        def all(self):
            return self.calls

    cpus = int(hpcray.cluster_resources()["CPU"])
    logs = [Log.remote() for _ in range(cpus)]
    most = 0
    for number in range(ROUNDS):
        most = max(most, lanes())
        for log in logs:
            if number % 20 == 7:
                log.add.remote(number)
            else:
                hpcray.get(log.add.remote(number))
    assert most == cpus
    assert hpcray.get([log.all.remote() for log in logs]) == [list(range(ROUNDS))] * cpus


def test_workers_that_die(tmp_path):
    @hpcray.remote(max_retries=1)
    def dies_once(path):
        if path is not None and not path.exists():
            path.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return "done"

    @hpcray.remote
    class Mortal:
        def die(self, now):
            if now:
                os.kill(os.getpid(), signal.SIGKILL)

    for _ in range(ROUNDS):
        hpcray.get(dies_once.remote(None))
    assert hpcray.get(dies_once.remote(tmp_path / "died")) == "done"
    mortal = Mortal.remote()
    for _ in range(50):
        hpcray.get(mortal.die.remote(False))
    with pytest.raises(ActorDiedError, match="SIGKILL"):
        hpcray.get(mortal.die.remote(True))
