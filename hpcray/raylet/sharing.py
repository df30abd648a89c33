"""How the ranks of a host share what it has: CPUs, memory, GPUs. Pure."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import TypeVar

_PAGE = 4096
_Item = TypeVar("_Item", bound=Hashable)


@dataclass(frozen=True)
class RankMask:
    """One rank's claim to the CPUs of its host.

    Attributes:
        cpus: The CPUs that it may run on.
        shared: How many the job may use on this host.
        own: How many this rank may use, if that is set.
    """

    cpus: frozenset[int]
    shared: int
    own: int | None = None


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank: all that it may use, and the part that is its object store."""

    total: int
    store: int


def share_cpus(ranks: Sequence[RankMask]) -> list[list[int]]:
    """Which CPUs of their host each rank has for its own: as evenly as masks allow, none twice, neighbours together.

    A rank that gets none, since there are too few, offers one all the same.
    """
    if not ranks:
        return []
    limits = [len(rank.cpus) if rank.own is None else rank.own for rank in ranks]
    hands = [sorted(rank.cpus) for rank in ranks]
    return _with_neighbours(hands, deal(hands, limits, min(rank.shared for rank in ranks)))


def share_memory(usable: Sequence[int], stores: Sequence[int | None], part: float) -> list[RankMemory]:
    """Memory of each rank of a host.

    Args:
        usable: Bytes that the job may use on this host, as each rank sees it; the least counts.
        stores: Bytes that each rank's object store was asked to have; None: `part` of its memory.
        part: Between 0 and 1.

    Raises:
        ValueError: The stores that were asked for are larger than the memory; the text has the sizes.
    """
    together = min(usable)
    each = together // len(usable)
    sizes = [int(each * part) if store is None else store for store in stores]
    if sum(sizes) > together:
        raise ValueError(
            f"object stores of {sum(sizes):,} bytes in {len(sizes)} ranks are more than the {together:,} bytes of memory that "
            "the job may use on their host: ask for less (--object-store-memory, for each rank), or get more memory"
        )
    return [RankMemory(max(each, size), size - size % _PAGE) for size in sizes]


def share_gpus(hands: Sequence[Sequence[str]], limits: Sequence[int | None]) -> list[list[str]]:
    """Which of the GPUs that each rank sees it offers.

    Ranks that see the same ones get neighbours, since GPUs with neighbouring numbers are close to each other.

    Args:
        hands: For each rank the UUIDs of those it sees, in its order.
        limits: How many each was asked to offer; None: as many as it gets.
    """
    most = [len(hand) if limit is None else limit for hand, limit in zip(hands, limits, strict=True)]
    return _with_neighbours(hands, deal(hands, most, sum(map(len, hands))))


def _with_neighbours(hands: Sequence[Sequence[_Item]], dealt: list[list[_Item]]) -> list[list[_Item]]:
    """The same counts, but who could have had the same items gets ones that follow each other."""
    alike: dict[tuple[_Item, ...], list[int]] = {}
    for player, hand in enumerate(hands):
        alike.setdefault(tuple(hand), []).append(player)
    for hand, players in alike.items():
        theirs = {item for player in players for item in dealt[player]}
        in_order = iter([item for item in hand if item in theirs])
        for player in players:
            dealt[player] = [next(in_order) for _ in dealt[player]]
    return dealt


def deal(hands: Sequence[Collection[_Item]], limits: Sequence[int], total: int) -> list[list[_Item]]:
    """Give each item to one who may have it: as evenly as possible, and then as many as possible.

    Whoever has least is given one more, if need be by having others pass one on and take another in its place
    (augmenting paths of bipartite matching). For whom that fails it never succeeds later.

    Args:
        hands: What each may have.
        limits: How many each may have.
        total: How many may be given in all.
    """
    owner: dict[_Item, int] = {}
    done: set[int] = set()
    waiting = [(0, player) for player in range(len(hands))]
    heapify(waiting)
    while waiting and len(owner) < total:
        count, player = heappop(waiting)
        if player in done or count >= limits[player]:
            continue
        stuck = _give_one_more(hands, owner, player)
        if stuck:
            done |= stuck
        else:
            heappush(waiting, (count + 1, player))
    return [[item for item in hand if owner.get(item) == player] for player, hand in enumerate(hands)]


def _give_one_more(hands: Sequence[Collection[_Item]], owner: dict[_Item, int], player: int) -> set[int]:
    """Give `player` an item more without taking any from the others; if that cannot be, all who are stuck as it is."""
    wanted_by: dict[_Item, int] = {}
    passes_on: dict[int, _Item] = {}
    reached = [player]
    for one in reached:
        for item in hands[one]:
            if item in wanted_by:
                continue
            wanted_by[item] = one
            if item in owner:
                if owner[item] not in passes_on and owner[item] != player:
                    passes_on[owner[item]] = item
                    reached.append(owner[item])
                continue
            while (taker := wanted_by[item]) != player:
                owner[item] = taker
                item = passes_on[taker]
            owner[item] = player
            return set()
    return set(reached)
