"""Runtime environments as raylets see them: a worker serves one, definitions travel, a failed set-up fails what was to run."""

from __future__ import annotations

from typing import Any

import pytest

from hpcray import payload
from hpcray.protocol import messages as m
from hpcray.resources import UNIT
from hpcray.testing.cluster import Cluster
from hpcray.testing.process import Process

ERROR = payload.system_error("RuntimeEnvSetupError", "pip said no")


def template(cluster: Cluster, driver: Process, environment: bytes, name: str = "f", **fields: Any) -> bytes:
    for blob in (environment, b"code"):
        driver.send(m.Define(blob, b"the blob of " + blob))
    return cluster.template(driver, name, environment=environment, packages=[b"code"], **fields)


def finish_all(cluster: Cluster) -> None:
    while cluster.running:
        cluster.running[0].finish()
        cluster.run()


def run_one(cluster: Cluster, driver: Process, name: bytes) -> Process:
    """Run a task to its end; the worker that did."""
    driver.submit(name)
    cluster.run()
    (worker,) = cluster.running
    finish_all(cluster)
    return worker


def test_a_worker_serves_one_environment_only():
    cluster = Cluster([3])
    driver = cluster.add_driver()
    plain, first, second = (
        cluster.template(driver, "f"),
        template(cluster, driver, b"one"),
        template(cluster, driver, b"two"),
    )
    workers = [run_one(cluster, driver, name) for name in (plain, first, second)]
    assert len({worker.number for worker in workers}) == 3
    assert [run_one(cluster, driver, name) for name in (second, plain, first)] == [workers[2], workers[0], workers[1]]
    other_function = template(cluster, driver, b"one", "g")
    assert run_one(cluster, driver, other_function) is workers[1]


def test_an_idle_worker_of_another_environment_makes_room():
    cluster = Cluster([1])
    driver = cluster.add_driver()
    first, second = template(cluster, driver, b"one"), template(cluster, driver, b"two")
    old = run_one(cluster, driver, first)
    new = run_one(cluster, driver, second)
    assert old.is_gone
    assert run_one(cluster, driver, second) is new


def test_the_environment_and_its_packages_are_where_the_task_runs():
    cluster = Cluster([0, 1])
    driver = cluster.add_driver()
    driver.submit(template(cluster, driver, b"one"))
    cluster.run()
    assert cluster.worker_on(1).running
    assert cluster.ranks[1].core.blobs[b"code"] == b"the blob of code"
    (client,) = [c for c in cluster.ranks[1].core.clients.values() if c.worker is not None]
    assert client.known >= {b"one", b"code"}
    finish_all(cluster)


@pytest.mark.parametrize("cpus", [[1], [0, 1]], ids=["here", "on another rank"])
def test_a_failed_set_up_fails_the_task_without_a_retry_and_the_next_one_tries_again(cpus):
    cluster = Cluster(cpus)
    driver = cluster.add_driver()
    name = template(cluster, driver, b"one", max_retries=3, num_returns=2)
    refs = driver.submit(name, num_returns=2)
    driver.get(refs)
    cluster.run()
    (worker,) = cluster.running
    worker.send(m.SetupFailed(ERROR))
    cluster.run()
    assert driver.errors == dict.fromkeys(refs, ERROR)
    assert not cluster.running
    assert worker.is_gone
    assert cluster.ranks[-1].core.ledger.free == {"CPU": UNIT}
    assert run_one(cluster, driver, name) is not worker


def test_a_failed_set_up_of_an_actor_is_the_error_of_its_calls():
    cluster = Cluster([0, 1])
    driver = cluster.add_driver()
    cls = template(
        cluster, driver, b"one", "A", num_returns=0, resources={}, actor=m.ActorOptions(placement={"CPU": UNIT})
    )
    actor = driver.create_actor(cls)
    refs = driver.call(actor)
    driver.get(refs)
    cluster.run()
    (worker,) = cluster.running
    worker.send(m.SetupFailed(ERROR))
    cluster.run()
    assert driver.errors == dict.fromkeys(refs, ERROR)
    assert worker.is_gone


def test_arguments_are_let_go_when_the_set_up_fails():
    cluster = Cluster([1])
    driver = cluster.add_driver()
    large = driver.put(size=5000, large=True)
    cluster.run()
    refs = driver.submit(template(cluster, driver, b"one"), [large])
    driver.get(refs)
    cluster.run()
    (worker,) = cluster.running
    worker.send(m.SetupFailed(ERROR))
    cluster.run()
    driver.release([large, *refs])
    cluster.run()
    assert cluster.leftovers() == []
