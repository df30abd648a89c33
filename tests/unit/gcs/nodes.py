"""Nodes as the policies see them, in tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hpcray.resources import UNIT, Shape, Units, shape_of


@dataclass
class FakeNode:
    rank: int
    total: Shape
    available: Shape
    units: Units = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    host: str = "host"
    switch: tuple[str, ...] = ()

    def take(self, amounts: Mapping[str, float]) -> FakeNode:
        """Less is free, of what comes in no units."""
        for name, amount in shape_of(amounts).items():
            self.available[name] -= amount
        return self


def node(
    rank: int, labels: Mapping[str, str] = {}, host: str = "", switch: tuple[str, ...] = (), **total: float
) -> FakeNode:
    """An idle node; `node(0, CPU=2, GPU=1)`."""
    shape = shape_of(total)
    units = {"GPU": dict.fromkeys(range(shape["GPU"] // UNIT), UNIT)} if "GPU" in shape else {}
    return FakeNode(rank, shape, dict(shape), units, labels, host or f"h{rank}", switch)
