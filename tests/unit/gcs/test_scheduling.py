"""Grants: demands against room, no place given twice, none lost."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from hpcray.gcs.groups import PlacementGroups
from hpcray.gcs.scheduling import Scheduler
from hpcray.gcs.views import NodeView
from hpcray.protocol import messages as m
from hpcray.resources import UNIT, Shape

CPU: Shape = {"CPU": UNIT}
F, G = b"f", b"g"


def template(**fields: Any) -> m.Template:
    values: dict[str, Any] = {"num_returns": 1, "resources": CPU, "max_retries": 0, **fields}
    return m.Template(job=b"job", function=b"function", name="f", **values)


def scheduler(*cpus: int, **classes: m.Template) -> Scheduler:
    known = {F: template(), G: template(), **{name.encode(): spec for name, spec in classes.items()}}
    nodes = {rank: NodeView(rank, {"CPU": count * UNIT}) for rank, count in enumerate(cpus)}
    return Scheduler(nodes, PlacementGroups(nodes, Out()), known.__getitem__)


class Out:
    def send(self, rank: int, message: m.PeerMessage) -> None:
        raise AssertionError("no group is about to change")


def granted(grants: list[tuple[int, m.Grant]]) -> Counter[tuple[int, int]]:
    """(home, rank) → count."""
    counts: Counter[tuple[int, int]] = Counter()
    for home, grant in grants:
        counts[home, grant.rank] += grant.count
    return counts


def load(free: int, room: dict[bytes, int] | None = None, arrived: dict[bytes, int] | None = None) -> m.Load:
    return m.Load({"CPU": free * UNIT}, {}, room or {}, arrived or {})


def report(gcs: Scheduler, rank: int, load: m.Load) -> None:
    gcs.nodes[rank].on_load(load)
    gcs.on_room(rank)


def test_no_more_is_granted_than_there_is_room_for():
    gcs = scheduler(1, 2, 3)
    gcs.on_demand(0, m.Demand(F, 100))
    assert granted(gcs.grants()) == {(0, 0): 1, (0, 1): 2, (0, 2): 3}
    assert gcs.grants() == []
    assert gcs.has_demands


def test_what_was_granted_and_has_not_arrived_takes_up_room():
    gcs = scheduler(0, 2)
    gcs.on_demand(0, m.Demand(F, 5))
    assert granted(gcs.grants()) == {(0, 1): 2}
    gcs.nodes[1].on_load(load(2))  # a report from before the tasks came
    assert gcs.grants() == []
    report(gcs, 1, load(1, {F: 1}, {F: 1}))
    assert gcs.grants() == []
    report(gcs, 1, load(0, {F: 0}, {F: 2}))
    assert gcs.grants() == []
    report(gcs, 1, load(1, {F: 1}, {F: 2}))
    assert granted(gcs.grants()) == {(0, 1): 1}


def test_a_grant_that_comes_back_is_a_place_again():
    gcs = scheduler(0, 1)
    gcs.on_demand(0, m.Demand(F, 1))
    gcs.grants()
    gcs.on_demand(2, m.Demand(F, 1))
    assert gcs.grants() == []
    gcs.on_returned(m.GrantReturned(F, 1, 1))
    assert granted(gcs.grants()) == {(2, 1): 1}


def test_homes_share_what_there_is():
    gcs = scheduler(0, 4)
    gcs.on_demand(2, m.Demand(F, 10))
    gcs.on_demand(3, m.Demand(F, 10))
    counts = granted(gcs.grants())
    assert counts.total() == 4
    assert min(counts[2, 1], counts[3, 1]) >= 1


def test_a_demand_is_absolute_and_zero_takes_it_back():
    gcs = scheduler(0, 9)
    gcs.on_demand(0, m.Demand(F, 5))
    gcs.on_demand(0, m.Demand(F, 2))
    assert granted(gcs.grants()) == {(0, 1): 2}
    gcs.on_demand(0, m.Demand(F, 5))
    gcs.on_demand(0, m.Demand(F, 0))
    assert not gcs.has_demands


def test_spread_gives_each_node_one_at_a_time():
    gcs = scheduler(4, 4, 4, f=template(spread=True))
    gcs.on_demand(0, m.Demand(F, 6))
    assert granted(gcs.grants()) == {(0, 0): 2, (0, 1): 2, (0, 2): 2}
    assert not gcs.has_demands


@pytest.mark.parametrize(("soft", "expected"), [(False, {}), (True, {(0, 1): 1})])
def test_affinity_to_a_node_that_can_never_run_it(soft, expected):
    gcs = scheduler(0, 1, 0, f=template(node=2, node_is_soft=soft))
    gcs.on_demand(0, m.Demand(F, 1))
    assert granted(gcs.grants()) == expected


def test_affinity_waits_for_its_node():
    gcs = scheduler(0, 1, 1, f=template(node=2))
    gcs.on_demand(0, m.Demand(F, 3))
    assert granted(gcs.grants()) == {(0, 2): 1}


def test_nodes_that_are_too_small_are_no_candidates():
    gcs = scheduler(1, 4, f=template(resources={"CPU": 3 * UNIT}))
    gcs.on_demand(0, m.Demand(F, 5))
    assert granted(gcs.grants()) == {(0, 1): 1}


def test_the_demands_of_an_ended_job_are_forgotten():
    gcs = scheduler(0)
    gcs.on_demand(0, m.Demand(F, 1))
    gcs.on_demand(0, m.Demand(G, 1))
    gcs.drop_home(lambda name: name == F)
    gcs.on_demand(0, m.Demand(G, 0))
    assert not gcs.has_demands


def test_actors_on_their_way_take_up_room_for_actors():
    node = NodeView(0, {"CPU": 2 * UNIT})
    node.placing[b"a"] = [CPU]
    assert node.has_room_for(CPU)
    node.placing[b"b"] = [CPU]
    assert not node.has_room_for(CPU)
    assert node.has_room_for({})


def test_an_overdrawn_node_has_no_room():
    node = NodeView(0, {"CPU": UNIT})
    node.on_load(load(-1))
    assert node.places(F, 0) == 0
    assert not node.has_room_for(CPU)


def test_wishes_for_ranks_never_exceed_what_waits():
    gcs = scheduler(2, 2, 2)
    for rank, free in ((0, 2), (1, 0), (2, 0)):
        report(gcs, rank, load(free))
    gcs.on_demand(0, m.Demand(F, 4, {1: 2, 2: 2}))
    assert granted(gcs.grants()) == {(0, 0): 2}
    for rank in (1, 2):
        report(gcs, rank, load(2))
    assert granted(gcs.grants()).total() == 2
    assert not gcs.has_demands
