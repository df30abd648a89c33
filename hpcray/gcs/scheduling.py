"""Which raylet gets how many of the tasks that wait: grants of a scheduling class, never single tasks.

A raylet whose own pool is full tells the GCS how many tasks of a class wait with it, and how many of these have most of
their arguments on which rank (`Demand`). Every raylet reports what it has free, for how many more tasks of each class it
has room, and how many granted tasks of a class have arrived so far (`Load`). What was granted and has not arrived is taken
off its room, so a late report never makes two of one place.

Rules:
  1. A class for which no node had room is *starved*: until its demand changes, only nodes that have reported since are
     looked at. So a report costs the same in a job of 1,000 nodes as in one of two.
  2. Homes take turns within a class, and classes within a turn of the GCS.
"""

from __future__ import annotations

from collections.abc import Callable

from hpcray.gcs import policies
from hpcray.gcs.groups import PlacementGroups
from hpcray.gcs.views import NodeView
from hpcray.protocol import messages as m
from hpcray.resources import slots


class Scheduler:
    """Matches demands with room: pure, asked once per turn."""

    def __init__(
        self, nodes: dict[int, NodeView], groups: PlacementGroups, template: Callable[[bytes], m.Template]
    ) -> None:
        self.nodes = nodes
        self._groups = groups
        self._template = template
        self._demands: dict[bytes, dict[int, m.Demand]] = {}
        """Class → home → what waits there."""
        self._feasible: dict[bytes, dict[int, NodeView]] = {}
        """Class → nodes that could ever run it, by rank."""
        self._starved: set[bytes] = set()
        self._turn = 0
        self._news: set[int] = set()
        """Nodes that have reported since `grants`."""

    def on_demand(self, home: int, message: m.Demand) -> None:
        homes = self._demands.setdefault(message.template, {})
        if message.count:
            homes[home] = message
        else:
            homes.pop(home, None)
            if not homes:
                self._drop(message.template)

    def on_room(self, rank: int) -> None:
        """A node has reported."""
        self._news.add(rank)

    def on_returned(self, message: m.GrantReturned) -> None:
        """A home did not need what it was granted."""
        self.nodes[message.rank].give_back(message.template, message.count)
        self._news.add(message.rank)

    @property
    def has_demands(self) -> bool:
        """Whether tasks wait for a grant."""
        return bool(self._demands)

    def grants(self) -> list[tuple[int, m.Grant]]:
        """What can be granted now, as (home, grant); demands shrink by it."""
        granted: list[tuple[int, m.Grant]] = []
        for template in list(self._demands):
            spec = self._template(template)
            nodes = self._nodes_of(template, spec)
            self._grant_near(template, spec, nodes, granted)
            rest = list(nodes.values())
            while rest and template in self._demands:
                # Those that are better however much they are used go first, to their last place.
                best = rest if spec.spread else policies.favourites(spec, rest)
                self._grant(template, spec, policies.order(spec, best), granted)
                ranks = {node.rank for node in best}
                rest = [node for node in rest if node.rank not in ranks]
            if template in self._demands:
                self._starved.add(template)
        self._news.clear()
        return granted

    def _nodes_of(self, template: bytes, spec: m.Template) -> dict[int, NodeView]:
        """The nodes that may have room for the class."""
        if spec.group:
            return {rank: self.nodes[rank] for rank in sorted(self._groups.bundles_on(spec))}
        feasible = self._feasible.get(template)
        if feasible is None:
            nodes = policies.feasible(spec, list(self.nodes.values()))
            feasible = self._feasible[template] = {node.rank: node for node in nodes}
        if template in self._starved:
            return {rank: feasible[rank] for rank in sorted(self._news) if rank in feasible}
        return feasible

    def _places(self, template: bytes, spec: m.Template, node: NodeView) -> int:
        if spec.group:
            bundles = self._groups.bundles_on(spec)[node.rank].values()
            otherwise = sum(slots(bundle, spec.resources) for bundle in bundles)
        else:
            otherwise = slots(node.available, spec.resources, node.units)
        return node.places(template, min(otherwise, 1 << 30))

    def _grant_near(
        self, template: bytes, spec: m.Template, nodes: dict[int, NodeView], granted: list[tuple[int, m.Grant]]
    ) -> None:
        """Tasks whose arguments lie on a node that has room go there."""
        for home, demand in list(self._demands[template].items()):
            for rank, count in demand.near.items():
                if (node := nodes.get(rank)) is None:
                    continue
                if (left := self._demands.get(template, {}).get(home)) is None:
                    break
                if share := min(count, left.count, self._places(template, spec, node)):
                    granted.append((home, self._take(template, home, node, share)))

    def _grant(
        self, template: bytes, spec: m.Template, nodes: list[NodeView], granted: list[tuple[int, m.Grant]]
    ) -> None:
        """Give places away until there are none, or nobody waits: half of each node in turn, then all of them evenly."""
        places = {node.rank: self._places(template, spec, node) for node in nodes}
        if spec.spread:
            self._turn += 1
            turn = self._turn % max(1, len(nodes))
            nodes = nodes[turn:] + nodes[:turn]
        else:
            for node in nodes:
                self._grant_on(template, node, _half(spec, node, places), places, granted)
        while template in self._demands and (nodes := [node for node in nodes if places[node.rank]]):
            waiting = sum(demand.count for demand in self._demands[template].values())
            share = 1 if spec.spread else -(-waiting // len(nodes))
            for node in nodes:
                self._grant_on(template, node, share, places, granted)

    def _grant_on(
        self, template: bytes, node: NodeView, most: int, places: dict[int, int], granted: list[tuple[int, m.Grant]]
    ) -> None:
        most = min(most, places[node.rank])
        while most > 0 and (homes := self._demands.get(template)):
            home = next(iter(homes))
            share = min(homes[home].count, max(1, most // len(homes)))
            granted.append((home, self._take(template, home, node, share)))
            places[node.rank] -= share
            most -= share

    def _take(self, template: bytes, home: int, node: NodeView, share: int) -> m.Grant:
        homes = self._demands[template]
        demand = homes.pop(home)
        if demand.count > share:
            left = demand.count - share
            homes[home] = m.Demand(template, left, _less(demand.near, node.rank, share, left))
        elif not homes:
            self._drop(template)
        node.take(template, share)
        return m.Grant(template, node.rank, share)

    def _drop(self, template: bytes) -> None:
        del self._demands[template]
        self._starved.discard(template)

    def drop_home(self, job_of: Callable[[bytes], bool]) -> None:
        """Forget the demands of an ended job."""
        for template in [known for known in self._demands if job_of(known)]:
            self._drop(template)


def _half(spec: m.Template, node: NodeView, places: dict[int, int]) -> int:
    """How many of the places leave half of the node free (Ray's rule: nodes are packed to one half, then filled evenly)."""
    free = slots(node.available, spec.resources, node.units)
    unused_half = free - slots(node.total, spec.resources) // 2
    return places[node.rank] * unused_half // free if free and unused_half > 0 else 0


def _less(near: dict[int, int], rank: int, taken: int, left: int) -> dict[int, int]:
    """What of `near` remains when a rank was granted some, and `left` tasks wait in all: the home sends those first that are
    near the rank, then those near none."""
    rest = dict(near)
    if rank in rest:
        rest[rank] -= taken
    for other in list(rest):
        rest[other] = min(rest[other], left)
        left -= max(0, rest[other])
        if rest[other] <= 0:
            del rest[other]
    return rest
