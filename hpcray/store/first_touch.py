"""How to fill pages that nobody has touched: by whichever way was faster of late. Pure.

A system call (`pwritev`) clears no page that it fills and takes no fault for it: alone, it is 1.7 times as fast as to fault
pages in and copy. But calls of all processes that write into one arena wait for each other, and faults do not: where many
workers store their first results at once, these are faster.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

BY_CALL, BY_FAULT = range(2)
RETRY_STEPS = 1024
"""Steps after which the slower way is tried again."""
IOV_MAX = 1024
"""The kernel's limit of buffers in one call."""


class FirstTouch:
    """Which way to take.

    Args:
        only_faults: There is no choice.
    """

    __slots__ = ("_costs", "_only_faults", "_steps")

    def __init__(self, *, only_faults: bool) -> None:
        self._only_faults = only_faults
        self._costs = [0.0, 0.0]
        """Seconds per byte of each way, late ones counting more; 0: not tried yet."""
        self._steps = 0

    def choose(self) -> int:
        """`BY_CALL` or `BY_FAULT` for the next step."""
        if self._only_faults:
            return BY_FAULT
        if 0.0 in self._costs:
            return self._costs.index(0.0)
        self._steps += 1
        faster = self._costs.index(min(self._costs))
        return faster if self._steps % RETRY_STEPS else 1 - faster

    def note(self, way: int, cost: float) -> None:
        """A step of this way took so many seconds per byte."""
        known = self._costs[way]
        self._costs[way] = (known + cost) / 2 if known else cost


def split_parts(parts: Sequence[bytes | memoryview], size: int) -> Iterator[list[memoryview]]:
    """The same bytes in steps of `size`, but the last, or of `IOV_MAX` pieces."""
    step: list[memoryview] = []
    room = size
    for part in parts:
        left = memoryview(part)
        while len(left):
            step.append(left[:room])
            taken = len(step[-1])
            left, room = left[taken:], room - taken
            if not room or len(step) == IOV_MAX:
                yield step
                step, room = [], size
    if step:
        yield step
