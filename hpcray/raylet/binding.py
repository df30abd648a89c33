"""Which of a rank's CPUs its workers are bound to, for as long as each has its lease. Pure.

Binding is no accounting: the ledger says who may run, and this where.

Rules:
  1. A worker that asks for n CPUs gets ceil(n) of them, the least used ones; one that asks for none, all.
  2. Where several are used alike, those of one memory node are taken, if that has enough; of several such nodes, the fullest.
  3. What a blocked worker is bound to counts as unused, and stays bound.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from hpcray.resources import UNIT


class Binding:
    """The CPUs of one rank, and who is bound to which.

    Args:
        cpus: The rank's.
        memory_nodes: The CPUs of each memory node of the host.
    """

    def __init__(self, cpus: Sequence[int], memory_nodes: Iterable[Collection[int]]) -> None:
        self.cpus = list(cpus)
        known = [frozenset(node).intersection(cpus) for node in memory_nodes]
        self._nodes = [node for node in [*known, frozenset(cpus).difference(*known)] if node]
        self.use: dict[int, int] = dict.fromkeys(self.cpus, 0)
        """How much of each CPU is asked for, in units of 1/10,000."""
        self._bound: dict[int, tuple[list[int], int]] = {}
        self._paused: set[int] = set()

    def bind(self, worker: int, amount: int) -> list[int]:
        """The CPUs for a worker that asks for so much, in units of 1/10,000, until `release`; in order."""
        count = min(-(-amount // UNIT), len(self.cpus))
        if not count:
            return self.cpus
        chosen = sorted(self._choose(count))
        self._bound[worker] = (chosen, amount // count)
        self._add(worker, 1)
        return chosen

    def _choose(self, count: int) -> list[int]:
        most = sorted(self.use.values())[count - 1]
        needed = [cpu for cpu in self.cpus if self.use[cpu] < most]
        missing = count - len(needed)
        alike = [[cpu for cpu in self.cpus if cpu in node and self.use[cpu] == most] for node in self._nodes]
        enough = [
            spare
            for node, spare in zip(self._nodes, alike, strict=True)
            if len(spare) >= missing and node.issuperset(needed)
        ]
        if enough:
            return needed + min(enough, key=len)[:missing]
        largest_first = sorted(alike, key=len, reverse=True)
        return needed + [cpu for spare in largest_first for cpu in spare][:missing]

    def pause(self, worker: int) -> None:
        """The worker is blocked."""
        self._paused.add(worker)
        self._add(worker, -1)

    def resume(self, worker: int) -> None:
        """The worker goes on."""
        self._paused.discard(worker)
        self._add(worker, 1)

    def release(self, worker: int) -> None:
        """The worker's lease is over; if it was blocked, it ended so."""
        if worker not in self._paused:
            self._add(worker, -1)
        self._paused.discard(worker)
        self._bound.pop(worker, None)

    def _add(self, worker: int, sign: int) -> None:
        if worker in self._bound:
            chosen, each = self._bound[worker]
            for cpu in chosen:
                self.use[cpu] += sign * each
