"""Who waits for whom, over ranks: long tasks hold up nobody, nested ones do not deadlock."""

from __future__ import annotations

import time
from collections import Counter

import pytest

import hpcray

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.hpcray(num_cpus=1, object_store_memory=128 << 20),
    pytest.mark.usefixtures("nothing_left_behind", "hpcray_job"),
]


def test_long_tasks_among_short_ones_take_as_long_as_they_must(tmp_path):
    notes = tmp_path / "notes"
    notes.touch()

    @hpcray.remote
    def work(number, seconds=0.0):
        with notes.open("a") as file:
            file.write(f"{number}\n")
        time.sleep(seconds)

    cpus = int(hpcray.cluster_resources()["CPU"])
    for _ in range(3):  # every rank has run some, and knows them to be short
        hpcray.get([work.remote(0) for _ in range(200)], timeout=60)
    start = time.monotonic()
    long = [0.5 if number % 10 == 5 else 0.0 for number in range(50)]
    hpcray.get([work.remote(number, seconds) for number, seconds in enumerate(long, 1)], timeout=60)
    ideal = -(-5 // cpus) * 0.5
    assert time.monotonic() - start < ideal + 0.45
    ran = Counter(notes.read_text().split())
    del ran["0"]
    assert ran == Counter(map(str, range(1, 51)))


def test_recursion_sixty_deep():
    @hpcray.remote
    def descend(depth):
        return 0 if depth == 0 else 1 + hpcray.get(descend.remote(depth - 1))

    assert hpcray.get(descend.remote(60), timeout=120) == 60


def test_recursion_through_actors_and_wait():
    @hpcray.remote
    class Asker:
        def ask(self, depth):
            return 1 + hpcray.get(descend.remote(depth - 1))

    @hpcray.remote
    def descend(depth):
        if depth <= 0:
            return 0
        if depth % 3 == 0:
            return 1 + hpcray.get(Asker.options(num_cpus=0).remote().ask.remote(depth - 1))
        (ready, _) = hpcray.wait([descend.remote(depth - 1), descend.remote(0)], num_returns=2)
        return 1 + hpcray.get(ready[0])

    assert hpcray.get(descend.remote(12), timeout=120) == 12


def test_many_parents_that_wait_for_a_child():
    @hpcray.remote
    def child(x):
        return x

    @hpcray.remote
    def parent(x):
        return hpcray.get(child.remote(x))

    assert hpcray.get([parent.remote(x) for x in range(200)], timeout=120) == list(range(200))
