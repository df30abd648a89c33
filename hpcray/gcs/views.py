"""What the GCS knows of each raylet: what it has, what of it is free, and what is under way there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy

from hpcray.protocol import messages as m
from hpcray.resources import Shape, Units, choose_units, slots, whole_units


class NodeView:
    """What the GCS knows of a raylet's room.

    Args:
        rank: Whose raylet it is.
        total: All its resources.
        host: Nodes with the same one are on one machine.
        labels: For strategies that choose by them.
        switch: The switches that lead to it, outermost first; empty if they are unknown.
    """

    __slots__ = (
        "arrived", "available", "granted", "host", "labels", "placing", "rank", "room", "switch", "total", "units",
    )  # fmt: skip

    def __init__(
        self,
        rank: int,
        total: Shape,
        *,
        host: str = "",
        labels: Mapping[str, str] = {},
        switch: tuple[str, ...] = (),
    ) -> None:
        self.rank = rank
        self.total = total
        self.host = host
        self.labels = labels
        self.switch = switch
        self.available = dict(total)
        self.units: Units = whole_units(total)
        self.room: dict[bytes, int] = {}
        self.granted: dict[bytes, int] = {}
        """Per class, places granted on this node since the job began."""
        self.arrived: dict[bytes, int] = {}
        self.placing: dict[bytes, Sequence[Shape]] = {}
        """Resources of actors and bundles that were placed here and are not there yet: no report counts them."""

    def on_load(self, load: m.Load) -> None:
        self.available = dict(load.available)
        self.units = {name: dict(each) for name, each in load.units.items()}
        self.room = load.room
        self.arrived = load.arrived

    def places(self, template: bytes, otherwise: int) -> int:
        """How many more tasks of the class may be sent there now; `otherwise`: how many if none ever was."""
        under_way = self.granted.get(template, 0) - self.arrived.get(template, 0)
        return max(0, self.room.get(template, otherwise) - under_way)

    def has_room_for(self, shape: Shape) -> bool:
        """Whether an actor that needs this can be placed here."""
        view = self.as_if_placed()
        return slots(view.available, shape, view.units) > 0

    def take_off(self, *shapes: Shape) -> None:
        """Something was taken of which the next report will tell."""
        available = self.available
        for shape in shapes:
            for name, amount in shape.items():
                available[name] = available.get(name, 0) - amount
                if (free := self.units.get(name)) is not None and slots({}, {name: amount}, {name: free}):
                    for number, part in choose_units(free, amount).items():
                        free[number] -= part

    def as_if_placed(self) -> NodeView:
        """This view when what is under way has arrived."""
        if not self.placing:
            return self
        view = copy(self)
        view.available = dict(self.available)
        view.units = {name: dict(each) for name, each in self.units.items()}
        for shapes in self.placing.values():
            view.take_off(*shapes)
        return view

    def take(self, template: bytes, count: int) -> None:
        self.granted[template] = self.granted.get(template, 0) + count

    def give_back(self, template: bytes, count: int) -> None:
        self.granted[template] -= count
