"""Lanes between drivers and workers, as the raylets see them."""

from __future__ import annotations

from typing import Any

import pytest

from hpcray import payload
from hpcray.ids import object_id
from hpcray.protocol import messages as m
from hpcray.resources import UNIT
from hpcray.testing.cluster import Cluster
from hpcray.testing.process import Process, make_value

LANE = 7


class Joined:
    """A cluster whose raylets can join drivers and workers, and what they did."""

    def __init__(self, *cpus: int, **options: Any) -> None:
        self.cluster = Cluster(list(cpus), **options)
        self.driver = self.cluster.add_driver()
        self.keys: list[tuple[int, tuple[int, int, int], bool]] = []
        self.told: list[m.RayletToClient] = []
        for node in self.cluster.ranks:
            node.join = self._join  # type: ignore[method-assign]
        handle = self.driver.on_message
        self.driver.on_message = lambda message: self._hear(message) or handle(message)  # type: ignore[func-returns-value,method-assign]

    def _join(self, worker: Any, key: tuple[int, int, int], *, is_leased: bool) -> bool:
        self.keys.append((worker.number, key, is_leased))
        return True

    def _hear(self, message: m.RayletToClient) -> None:
        if isinstance(message, (m.LaneClosed, m.LaneWanted)):
            self.told.append(message)

    def send(self, message: m.ClientMessage) -> None:
        self.driver.send(message)
        self.cluster.run()

    def open(self, template: bytes = b"", actor: bytes = b"") -> None:
        self.send(m.OpenLane(LANE, template, actor))

    def register(self, template: bytes) -> tuple[bytes, bytes]:
        """The driver tells its raylet of a task on the lane: the task's id and its return's."""
        task = self.driver.new_id()
        self.send(m.Submit(task, template, make_value(task), [], [], LANE))
        (returned,) = self.driver._hold_returns(task, 1)
        return task, returned

    def worker(self) -> Process:
        (worker,) = (w for w in self.cluster.workers if w.number == self.keys[-1][0])
        return worker


@pytest.fixture
def joined() -> Joined:
    return Joined(1)


def test_a_lane_holds_its_class_s_resources_until_the_driver_closes_it(joined):
    template = joined.cluster.template(joined.driver, "f")
    joined.open(template)
    assert [key for _, key, is_leased in joined.keys if is_leased] == [(0, joined.driver.number, LANE)]
    assert joined.cluster.ranks[0].core.ledger.free == {"CPU": 0}
    joined.send(m.CloseLane(LANE))
    assert joined.cluster.ranks[0].core.ledger.free == {"CPU": UNIT}
    assert joined.cluster.leftovers() == []


def test_a_lane_s_worker_is_given_nothing_else_and_is_asked_for_when_others_wait(joined):
    template = joined.cluster.template(joined.driver, "f")
    joined.open(template)
    joined.driver.submit(template)
    joined.cluster.run()
    assert not joined.cluster.running
    assert joined.told == [m.LaneWanted(LANE)]
    joined.send(m.CloseLane(LANE))
    assert len(joined.cluster.running) == 1


def test_no_room_no_lane(joined):
    template = joined.cluster.template(joined.driver, "f")
    joined.driver.submit(template)
    joined.cluster.run()
    joined.open(template)
    assert joined.told == [m.LaneClosed(LANE, None)]
    assert not joined.keys


def test_an_idle_worker_has_the_driver_asked_once(joined):
    joined.open(joined.cluster.template(joined.driver, "f"))
    worker = joined.worker()
    for _ in range(2):
        worker.send(m.LaneIdle(0, joined.driver.number, LANE))
    joined.cluster.run()
    assert joined.told == [m.LaneWanted(LANE)]


def test_a_registered_call_ends_with_what_the_driver_says(joined):
    joined.open(template := joined.cluster.template(joined.driver, "f"))
    task, returned = joined.register(template)
    joined.driver.submit(joined.cluster.template(joined.driver, "g"), [returned])
    joined.cluster.run()
    joined.send(m.LaneDone(task, make_value(returned)))
    assert joined.driver.values[returned] == make_value(returned)
    joined.send(m.CloseLane(LANE))
    assert len(joined.cluster.running) == 1  # what waited for it


def test_a_result_by_the_raylets(joined):
    joined.open(template := joined.cluster.template(joined.driver, "f"))
    task, returned = joined.register(template)
    joined.worker().send(
        m.TaskDone(task, [m.InlineResult(make_value(returned), [])], failed=False, retry=False, seconds=0.0)
    )
    joined.cluster.run()
    assert joined.driver.values[returned] == make_value(returned)


@pytest.mark.parametrize("retries", [0, 1])
def test_when_the_worker_dies_what_was_not_done_has_crashed(retries):
    joined = Joined(1)
    joined.open(template := joined.cluster.template(joined.driver, "f", max_retries=retries))
    _, crashed = joined.register(template)
    done, finished = joined.register(template)
    joined.cluster.kill(joined.worker())
    joined.cluster.run()
    (told,) = joined.told
    assert isinstance(told, m.LaneClosed)
    assert told.error is not None
    # Told after the death, as the driver may have read the answer from the socket of a dead worker.
    joined.driver.send(m.LaneDone(done, make_value(finished)))
    joined.send(m.CloseLane(LANE))
    assert joined.driver.values[finished] == make_value(finished)
    assert len(joined.cluster.running) == retries
    assert (crashed in joined.driver.errors) == (retries == 0)


def test_a_call_registered_after_the_worker_s_death_has_crashed_too(joined):
    joined.open(template := joined.cluster.template(joined.driver, "f"))
    joined.cluster.kill(joined.worker())
    joined.cluster.run()
    _, returned = joined.register(template)
    joined.send(m.CloseLane(LANE))
    assert payload.is_error(joined.driver.values[returned])


def test_a_lane_to_a_worker_of_another_rank():
    joined = Joined(0, 1)
    template = joined.cluster.template(joined.driver, "f")
    joined.open(template)
    assert joined.told == [m.LaneClosed(LANE, None)], "nobody knows yet where such tasks run"
    joined.driver.submit(template)
    joined.cluster.run()
    joined.cluster.running[0].finish()
    joined.cluster.run()
    joined.open(template)
    on_same_host = joined.cluster.nodes[0].machine == joined.cluster.nodes[1].machine
    assert bool(joined.keys) == on_same_host


@pytest.mark.parametrize(
    "elsewhere", [{"node": 1}, {"spread": True}, {"labels": (m.LabelRule("disk", "in", ("fast",)),)}], ids=str
)
def test_no_lane_where_its_class_does_not_want_to_run(elsewhere):
    joined = Joined(1, 1, machines=["a", "a"])
    joined.cluster.nodes[1].labels["disk"] = "fast"
    template = joined.cluster.template(joined.driver, "f", **elsewhere)
    joined.open(template)
    assert joined.told == [m.LaneClosed(LANE, None)]
    joined.driver.submit(template)
    joined.cluster.run()
    joined.cluster.running[0].finish()
    joined.cluster.run()
    joined.open(template)
    assert [joined.worker().rank for _ in joined.keys] == ([] if "spread" in elsewhere else [1])


def test_a_lane_to_an_actor():
    joined = Joined(1)
    template = joined.cluster.template(joined.driver, "A", actor=m.ActorOptions(), resources={})
    actor = joined.driver.create_actor(template)
    joined.open(actor=actor)
    assert joined.told == [m.LaneClosed(LANE, None)], "nobody called it yet, so nobody knows whether it lives"
    joined.cluster.running[0].finish()
    joined.driver.call(actor)
    joined.cluster.run()
    joined.cluster.running[0].finish()
    joined.cluster.run()
    joined.open(actor=actor)
    assert [is_leased for _, _, is_leased in joined.keys] == [False]
    task = joined.driver.new_id()
    joined.send(m.Call(task, actor, "method", b"", [], [], 1, LANE))
    joined.driver._hold_returns(task, 1)
    joined.cluster.kill(joined.worker())
    joined.cluster.run()
    joined.send(m.CloseLane(LANE))
    assert payload.is_error(joined.driver.values[object_id(task, 1)])


def test_a_driver_that_ends_leaves_no_lane(joined):
    joined.open(joined.cluster.template(joined.driver, "f"))
    joined.cluster.kill(joined.driver)
    joined.cluster.run()
    core = joined.cluster.ranks[0].core
    assert not core.lanes.exist
    assert core.ledger.free == {"CPU": UNIT}
