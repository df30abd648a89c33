"""Resource amounts: fixed-point integers in units of 1/10,000, so that ten times 0.1 GPU is exactly 1 GPU."""

from __future__ import annotations

import math
from collections.abc import Mapping

UNIT = 10_000

IN_UNITS = ("GPU",)
"""The resources that come in units; the others are amounts."""

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
        ValueError: An amount is negative, not finite, a fraction finer than 1/10,000, or several units and a fraction (1.5 GPUs).
    """
    shape: Shape = {}
    for name, amount in amounts.items():
        if not math.isfinite(amount) or amount < 0:
            raise ValueError(f"the quantity of resource {name!r} must be a finite number, zero or more, not {amount!r}")
        if name in IN_UNITS and amount > 1 and amount != int(amount):
            raise ValueError(
                f"{name} resource quantities >1 must be whole numbers: {amount!r} is invalid (a fraction is part of one {name})"
            )
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


Units = dict[str, dict[int, int]]
"""Of resources that come in units (GPUs): what is free of each unit, by its number."""


def whole_units(total: Mapping[str, int]) -> Units:
    """The units of what there is, all of them free."""
    return {name: dict.fromkeys(range(total[name] // UNIT), UNIT) for name in IN_UNITS if total.get(name)}


def slots(available: Mapping[str, int], shape: Shape, units: Mapping[str, Mapping[int, int]] = {}) -> int:
    """How many demands of this shape fit into what is available; a shape without demands fits without limit.

    Of a resource in units, a demand below one is met by one unit, a demand of more by as many whole ones.
    """
    room = 1 << 30
    for name, amount in shape.items():
        if (of_units := units.get(name)) is None:
            room = min(room, available.get(name, 0) // amount)
        elif amount < UNIT:
            room = min(room, sum(free // amount for free in of_units.values()))
        else:
            room = min(room, sum(free == UNIT for free in of_units.values()) // -(-amount // UNIT))
    return max(room, 0)


def choose_units(free: Mapping[int, int], amount: int) -> dict[int, int]:
    """What to take of which units for a demand that fits: a fraction goes where the least is left, whole units in order."""
    if amount < UNIT:
        fitting = [number for number, left in free.items() if left >= amount]
        return {min(fitting, key=lambda number: (free[number], number)): amount}
    whole = sorted(number for number, left in free.items() if left == UNIT)
    return dict.fromkeys(whole[: -(-amount // UNIT)], UNIT)
