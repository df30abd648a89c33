"""Users are told, once, of what finds no place for long."""

from __future__ import annotations

from hpcray.gcs.patience import LOOK_SECONDS, PATIENCE, Patience
from hpcray.protocol import messages as m
from hpcray.resources import UNIT
from hpcray.testing.cluster import Cluster


def test_who_waits_long_is_told_of_once():
    patience = Patience()
    assert patience.overdue(0.0, [b"a"]) == []
    assert patience.due == PATIENCE
    assert not patience.is_time(LOOK_SECONDS / 2)
    assert patience.is_time(5.0)
    assert patience.overdue(5.0, [b"a", b"b"]) == []
    assert patience.overdue(PATIENCE, [b"a", b"b"]) == [b"a"]
    assert patience.due == 5.0 + PATIENCE
    assert patience.overdue(99.0, [b"a", b"b"]) == [b"b"]
    assert patience.due is None
    assert patience.overdue(999.0, [b"a", b"b"]) == []


def test_who_waits_again_waits_anew():
    patience = Patience()
    patience.overdue(0.0, [b"a"])
    assert patience.overdue(PATIENCE, [b"a"]) == [b"a"]
    patience.overdue(20.0, [])
    assert patience.due is None
    patience.overdue(30.0, [b"a"])
    assert patience.overdue(30.0 + LOOK_SECONDS, [b"a"]) == []
    assert patience.overdue(30.0 + PATIENCE, [b"a"]) == [b"a"]


def test_who_comes_just_after_a_look_is_looked_at_in_time():
    patience = Patience()
    patience.overdue(0.0, [b"a"])
    assert patience.overdue(PATIENCE, [b"a"]) == [b"a"]
    assert patience.due is None
    assert not patience.is_time(PATIENCE + LOOK_SECONDS / 2)
    assert patience.due == PATIENCE + LOOK_SECONDS


def test_drivers_hear_of_tasks_that_find_no_place_and_why():
    cluster = Cluster([1, 1])
    driver = cluster.add_driver()
    blocker = cluster.template(driver, "blocker")
    for _ in range(2):
        driver.submit(blocker)
    cluster.run()
    stuck = cluster.template(driver, "stuck")
    for _ in range(3):
        driver.submit(stuck)
    cluster.run()
    assert not cluster.shown
    cluster.advance(PATIENCE + 1)
    cluster.run()
    assert cluster.shown[0] == "3 tasks stuck() found no place for 10 s, and none of them runs:"
    assert "needs 1 CPU, 0 free of 1" in cluster.shown[1]
    shown = len(cluster.shown)
    cluster.advance(PATIENCE + 1)
    cluster.run()
    assert len(cluster.shown) == shown


def test_more_tasks_than_places_are_nothing_to_tell():
    cluster = Cluster([1])
    driver = cluster.add_driver()
    template = cluster.template(driver, "f")
    for _ in range(5):
        driver.submit(template)
    cluster.run()
    for _ in range(3):
        cluster.advance(PATIENCE + 1)
        cluster.run()
    assert not cluster.shown


def test_drivers_hear_of_actors_and_groups_that_find_no_place():
    cluster = Cluster([1])
    driver = cluster.add_driver()
    driver.submit(cluster.template(driver, "blocker"))
    cluster.run()
    options = m.ActorOptions(placement={"CPU": UNIT})
    driver.create_actor(cluster.template(driver, "Waiting", actor=options, resources={}))
    driver.create_group([{"CPU": UNIT}])
    cluster.run()
    for _ in range(2):
        cluster.advance(PATIENCE + LOOK_SECONDS)
        cluster.run()
    told = "\n".join(cluster.shown)
    assert told.count("actor Waiting has waited for a place for 10 s:") == 1
    assert told.count("has waited for a place for 10 s:") == 2
    assert "bundle 0 of 1 CPU: room for 0 now and 1 if nothing else ran" in told
