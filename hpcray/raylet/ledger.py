"""What of a raylet's resources is free: total = free + Σ acquired, per resource.

A worker that blocks gives its CPUs back and takes them again when it goes on, whether or not they are free then: so
`free` may be negative for a while, and nothing new starts until it no longer is (Ray's rule for nested tasks).
"""

from __future__ import annotations

from collections.abc import Mapping

from hpcray.exceptions import InternalError
from hpcray.resources import Shape, slots


class Ledger:
    """The accounts of one raylet, in units of 1/10,000."""

    def __init__(self, total: Mapping[str, int]) -> None:
        self.total: Shape = dict(total)
        self.free: Shape = dict(total)

    def fits(self, shape: Shape) -> bool:
        """Whether the demand can be met now."""
        free = self.free
        return all(free.get(name, 0) >= amount for name, amount in shape.items())

    def is_overdrawn(self, shape: Shape) -> bool:
        """Whether workers that went on after having been blocked use more of what this needs than there is."""
        free = self.free
        return any(free.get(name, 0) < 0 for name in shape)

    def could_fit(self, shape: Shape) -> bool:
        """Whether the demand could be met if nothing else ran."""
        return all(self.total.get(name, 0) >= amount for name, amount in shape.items())

    def slots(self, shape: Shape) -> int:
        """How many such demands can be met now."""
        return slots(self.free, shape)

    def acquire(self, shape: Shape) -> None:
        """Take a demand that `fits`, or one that goes on after having been blocked."""
        for name, amount in shape.items():
            self.free[name] = self.free.get(name, 0) - amount

    def release(self, shape: Shape) -> None:
        """Give back what was acquired.

        Raises:
            InternalError: More would be free than there is.
        """
        for name, amount in shape.items():
            self.free[name] += amount
            if self.free[name] > self.total.get(name, 0):
                raise InternalError(f"more {name} is free than this raylet has: {self.free} of {self.total}")
