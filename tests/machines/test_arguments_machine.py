"""Tasks whose arguments press for room, on random clusters in random order: nobody waits for ever, or for a time limit.

refs = [put(array) for _ in range(12)]                          # a store has room for seven
for ref in [f.remote(*refs[i : i + 4]) for i in range(12)]:     # more than half a store for each task
    get(ref)                                                    # nothing, or an array
"""

from __future__ import annotations

from random import Random

import pytest

from hpcray.testing.cluster import Cluster

SIZE = 2000
ARENA = 7 * 2112  # a multiple of 64; an object has a little more than its SIZE
OBJECTS, ARGUMENTS = 12, 4
LAYOUTS: list[list[str]] = [["a", "b", "c"], ["a", "a", "b", "b"], ["a", "a", "b", "b", "c", "c"]]
IDLE_SECONDS = 5
"""Fake seconds in which nothing happens; who waits for room has 50."""


@pytest.mark.parametrize("layout", range(len(LAYOUTS)))
@pytest.mark.parametrize("block", range(4))
def test_arguments_that_do_not_fit_together_keep_nobody_waiting(layout: int, block: int) -> None:
    for seed in range(block * 8, block * 8 + 8):
        run_once(LAYOUTS[layout], Random(f"{layout} {seed}"))


def run_once(machines: list[str], random: Random) -> None:
    # Where ranks share a host, rank 0 offers no CPUs, as in a real job.
    cpus = [int(rank > 0 or machines.count(machines[0]) == 1) for rank in range(len(machines))]
    cluster = Cluster(cpus, machines=machines, arena_size=ARENA, store_timeout=50.0)
    driver = cluster.add_driver()
    refs = []
    for _ in range(OBJECTS):
        refs.append(driver.put(size=SIZE, large=True))
        cluster.run(random.choice, check=False)
    template = cluster.template(driver, "f", spread=True)
    returns: list[bytes] = []
    for first in range(OBJECTS):
        returns += driver.submit(template, [refs[(first + k) % OBJECTS] for k in range(ARGUMENTS)])
    idle = 0
    while any(node.core.tasks.tasks for node in cluster.ranks) or cluster.choices():
        links, running = cluster.choices(), cluster.running
        idle = 0 if links or running else idle + 1
        assert idle < IDLE_SECONDS, f"{[node.core.table.memory.in_use for node in cluster.ranks]} bytes are in use"
        if links and (not running or random.random() < 0.9):
            cluster.deliver(random.choice(links))
            cluster.check()
        elif running:
            random.choice(running).finish(size=SIZE, large=random.random() < 0.5)
        else:
            cluster.advance(1.0)
    for identifier in returns:
        driver.get([identifier])
        cluster.run(random.choice)
        assert identifier in driver.values
        assert not driver.errors
        driver.release([identifier])
    for process in cluster.processes:
        process.release(list(process.held))
    cluster.run(random.choice)
    assert cluster.leftovers() == []
