"""Which raylet gets how many of the tasks that wait: grants of a scheduling class, never single tasks.

A raylet whose own pool is full tells the GCS how many tasks of a class wait with it (`Demand`). Every raylet reports what
it has free, for how many more tasks of each class it has room, and how many granted tasks of a class have arrived so far
(`Load`). What was granted and has not arrived is taken off its room, so a late report never makes two of one place.
"""

from __future__ import annotations

from collections.abc import Callable

from hpcray.protocol import messages as m
from hpcray.resources import Shape, slots


class NodeView:
    """What the GCS knows of a raylet's room."""

    __slots__ = ("arrived", "available", "granted", "placing", "room", "total")

    def __init__(self, total: Shape) -> None:
        self.total = total
        self.available = dict(total)
        self.room: dict[bytes, int] = {}
        self.granted: dict[bytes, int] = {}
        """Per class, places granted on this node since the job began."""
        self.arrived: dict[bytes, int] = {}
        self.placing: dict[bytes, Shape] = {}
        """Resources of actors that were placed here and have not started: no report counts them yet."""

    def on_load(self, load: m.Load) -> None:
        self.available = dict(load.available)
        self.room = load.room
        self.arrived = load.arrived

    def places(self, template: bytes, shape: Shape) -> int:
        """How many more tasks of the class may be sent there now."""
        under_way = self.granted.get(template, 0) - self.arrived.get(template, 0)
        room = self.room.get(template)
        if room is None:
            room = slots(self.available, shape)
        return max(0, room - under_way)

    def has_room_for_actor(self, shape: Shape) -> bool:
        """Whether an actor that needs this can be placed here."""
        available = dict(self.available)
        for placed in self.placing.values():
            for name, amount in placed.items():
                available[name] = available.get(name, 0) - amount
        return slots(available, shape) > 0

    def take(self, template: bytes, count: int) -> None:
        self.granted[template] = self.granted.get(template, 0) + count

    def give_back(self, template: bytes, count: int) -> None:
        self.granted[template] -= count


class Scheduler:
    """Matches demands with room: pure, asked once per turn."""

    def __init__(self, totals: dict[int, Shape], template: Callable[[bytes], m.Template]) -> None:
        self.nodes = {rank: NodeView(total) for rank, total in totals.items()}
        self._template = template
        self._demands: dict[bytes, dict[int, int]] = {}
        self._next = 0

    def on_demand(self, home: int, message: m.Demand) -> None:
        homes = self._demands.setdefault(message.template, {})
        if message.count:
            homes[home] = message.count
        else:
            homes.pop(home, None)
            if not homes:
                del self._demands[message.template]

    @property
    def has_demands(self) -> bool:
        """Whether tasks wait for a grant."""
        return bool(self._demands)

    def grants(self) -> list[tuple[int, m.Grant]]:
        """What can be granted now, as (home, grant); demands shrink by it. Homes take turns, nodes fill evenly."""
        granted: list[tuple[int, m.Grant]] = []
        for template in list(self._demands):
            spec = self._template(template)
            homes = self._demands[template]
            for rank in self._candidates(spec):
                node = self.nodes[rank]
                places = node.places(template, spec.resources)
                while places > 0 and homes:
                    home = next(iter(homes))
                    waiting = homes.pop(home)
                    share = min(waiting, max(1, places // (len(homes) + 1)))
                    if spec.spread:
                        share = 1
                    node.take(template, share)
                    places -= share
                    granted.append((home, m.Grant(template, rank, share)))
                    if waiting > share:
                        homes[home] = waiting - share
                    if spec.spread:
                        break
            if not homes:
                del self._demands[template]
        return granted

    def _candidates(self, spec: m.Template) -> list[int]:
        ranks = [rank for rank, node in self.nodes.items() if slots(node.total, spec.resources)]
        if spec.node is not None and (spec.node in ranks or not spec.node_is_soft):
            return [spec.node] if spec.node in ranks else []
        if ranks:
            self._next += 1
            turn = self._next % len(ranks)
            ranks = ranks[turn:] + ranks[:turn]
        return ranks

    def drop_home(self, job_of: Callable[[bytes], bool]) -> None:
        """Forget the demands of an ended job."""
        for template in [known for known in self._demands if job_of(known)]:
            del self._demands[template]
