"""Resource amounts: fixed-point integers in units of 1/10,000, so that ten times 0.1 GPU is exactly 1 GPU."""

from __future__ import annotations

import math
from collections.abc import Mapping

UNIT = 10_000

Shape = dict[str, int]


def to_fixed(amount: float) -> int:
    """An amount as users write it, in units of 1/10,000 (rounded to the nearest)."""
    return round(amount * UNIT)


def to_float(amount: int) -> float:
    """A fixed-point amount as users read it."""
    return amount / UNIT


def shape_of(amounts: Mapping[str, float]) -> Shape:
    """A demand in fixed point, without its zeros.

    Raises:
        ValueError: An amount is negative, not finite, or a fraction finer than 1/10,000.
    """
    shape: Shape = {}
    for name, amount in amounts.items():
        if not math.isfinite(amount) or amount < 0:
            raise ValueError(f"the quantity of resource {name!r} must be a finite number, zero or more, not {amount!r}")
        if (fixed := to_fixed(amount)) != 0:
            shape[name] = fixed
        elif amount != 0:
            raise ValueError(
                f"the quantity of resource {name!r} is below 1/{UNIT}, the finest that is counted: {amount!r}"
            )
    return shape


def as_floats(shape: Mapping[str, int]) -> dict[str, float]:
    """A fixed-point mapping as Ray's API shows it."""
    return {name: to_float(amount) for name, amount in shape.items()}


def slots(available: Mapping[str, int], shape: Shape) -> int:
    """How many demands of this shape fit into what is available; a shape without demands fits without limit."""
    room = 1 << 30
    for name, amount in shape.items():
        room = min(room, available.get(name, 0) // amount)
    return max(room, 0)
