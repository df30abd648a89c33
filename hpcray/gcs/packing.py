"""The search behind placement groups: bundles onto sites, all or none. Pure; knows amounts, units and paths, no nodes.

Bundles of one *kind* need the same; kinds are ordered, largest first, and on each site bundles are taken in that order.
A site's *room* is immutable, so sites with equal room are interchangeable and what one can take is worked out once.

    pack    Greedy, as best-fit-decreasing: the site that takes the largest kind left and with it the most other bundles,
            of several the one where the least is left over. That says which sorts of sites are used, and how many of each.
    spread  Rounds; in each, a maximum matching (augmenting paths) gives as many sites as possible one bundle each. One
            round decides exactly whether all bundles can be on different sites.
    near    Of interchangeable sites those of one host, else of one switch (innermost first), else the shortest window of
            ranks that has enough of each sort.
    search  If greedy choices lead nowhere: backtracking over the bundles, largest first, of at most `MOST_VISITS` looks at
            sites. It is complete where that suffices, as for any 4 bundles on 8 sites. What it misses are groups that use
            two resources of more than a few sites to the last bit.

Measured on random groups of 4 bundles on 4 sites, two resources: pack takes one site more than the least for 1 group in 25,
spread always takes the most.

With n sites of s sorts, b bundles of k kinds: O(n·k + s·log s·k + b) for pack, O(n·k + b·k·2^k) at worst for spread, where
2^k stands for the sets of kinds that fit on some site, of which there are rarely more than k + 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

from hpcray.resources import choose_units, slots

MOST_VISITS = 6_000  # about 20 ms
_SORTED_PER_VISIT = 16  # sites that are sorted in the time of a look at one
_DEEPEST = 250  # bundles; the search recurses once per bundle

Room = tuple[int | tuple[int, ...], ...]
"""Per resource what is free: an amount, or of each unit in ascending order."""
Need = tuple[int, ...]
"""Per resource an amount."""
Counts = tuple[int, ...]
"""How many bundles of each kind."""


class Site(NamedTuple):
    """Where bundles can go."""

    rank: int
    path: tuple[str, ...]
    """Switches from the outermost on, then the host: sites that share more of it are closer."""
    room: Room
    kinds: int
    """Which kinds may be there at all: bit k for kind k."""


Sort = tuple[Room, int]
"""What makes sites interchangeable: `room` and `kinds`."""
S = TypeVar("S")
Places = dict[int, list[int]]
"""Position of a site → how many bundles of each kind it takes."""


class Packing:
    """Bundles of these kinds, to be placed on these sites, which are in the order of their ranks.

    Args:
        needs: Of each kind, largest first.
        counts: How many bundles of each kind are to be placed.
        used: Positions of sites that have bundles of the group already.
    """

    def __init__(self, needs: Sequence[Need], counts: Counts, sites: Sequence[Site], used: Iterable[int] = ()) -> None:
        self._needs = needs
        self._counts = counts
        self._sites = sites
        self._used = sorted(set(used))
        self._unused = sorted(set(range(len(sites))).difference(self._used))
        self._took: dict[tuple[Room, int, int], tuple[int, Room]] = {}
        self._wants = [[(i, amount) for i, amount in enumerate(need) if amount] for need in needs]
        every = [sum(n * need[i] for n, need in zip(counts, needs, strict=True)) for i in range(len(needs[0]))]
        self._demand = [(i, amount) for i, amount in enumerate(every) if amount]
        self.was_cut_off = False
        """The search ended before it had tried everything: there may be a placement that was not found."""

    # -------------------------------------------------------------------------------------------------------- strategies
    def on_one(self, positions: Iterable[int]) -> Places | None:
        """All on one of these sites, where the least is left over."""
        first: dict[Sort, int] = {}
        for position in positions:
            first.setdefault(self._sort(position), position)
        fitting = []
        for sort, position in first.items():
            taken, room = self._fill(sort, self._counts)
            if taken == self._counts:
                fitting.append((self._left(room), position))
        return {min(fitting)[1]: list(self._counts)} if fitting else None

    def packed(self) -> Places | None:
        """On few sites, close together; first on those that are used already."""
        if not self._is_thinkable():
            return None
        places: Places = {}
        counts = self._counts
        for position in self._used:
            taken, _ = self._fill(self._sort(position), counts)
            if any(taken):
                places[position] = list(taken)
                counts = tuple(n - t for n, t in zip(counts, taken, strict=True))
        if not any(counts):
            return places
        everywhere = self._pack(self._unused, counts)
        if everywhere is None:
            return self._search(is_packing=True)
        if len(everywhere) > 1:
            most = {sort: sum(self._fill(sort, counts)[0]) for sort in {self._sort(p) for p in self._unused}}
            for domain in self._domains(self._unused):
                if sum(sorted(most[self._sort(p)] for p in domain)[-len(everywhere) :]) < sum(counts):
                    continue  # it would hardly do with as few sites
                within = self._pack(domain, counts)
                if within is not None and len(within) <= len(everywhere):
                    return places | within
        return places | everywhere

    def apart(self) -> Places | None:
        """Each on a site of its own that is not used already, close together."""
        if len(self._unused) < sum(self._counts):
            return None
        rooms = {position: self._sites[position].room for position in self._unused}
        matched = self._match(rooms, self._counts)
        if sum(map(sum, matched.values())) < sum(self._counts):
            return None
        for domain in self._domains(self._unused) if len(matched) > 1 else ():
            if len(domain) >= len(matched):
                within = self._match({position: rooms[position] for position in domain}, self._counts)
                if len(within) == sum(self._counts):
                    return within
        return matched

    def spread(self) -> Places | None:
        """On as many sites as there are bundles, or as possible, and evenly."""
        if (places := self.apart()) is not None or not self._is_thinkable():
            return places
        used = self._used
        rooms = {position: self._sites[position].room for position in self._unused}
        places, counts = {}, self._counts
        while any(counts):
            matched = self._match(rooms, counts)
            if not matched and used:
                # Only now those that have bundles from before.
                rooms |= {position: self._sites[position].room for position in used}
                used = []
                continue
            if not matched:
                return self._search(is_packing=False)
            for position, taken in matched.items():
                room, had = rooms[position], places.get(position, [0] * len(counts))
                rooms[position] = self._take(room, taken.index(1), 1)[1]
                places[position] = [h + t for h, t in zip(had, taken, strict=True)]
                counts = tuple(n - t for n, t in zip(counts, taken, strict=True))
        if all(self._fits(position, taken) for position, taken in places.items()):
            return places
        # Fractions of units that fit in the order of the rounds may not fit largest first.
        return self._search(is_packing=False)

    # ------------------------------------------------------------------------------------------------------------- rooms
    def _sort(self, position: int) -> Sort:
        _, _, room, kinds = self._sites[position]
        return room, kinds

    def _take(self, room: Room, kind: int, most: int) -> tuple[int, Room]:
        """How many bundles of a kind the room takes, up to `most`, and what it is then."""
        wants = self._wants[kind]
        for i, amount in wants:
            free = room[i]
            if isinstance(free, tuple):
                return self._take_units(room, kind, most)
            if free < most * amount:
                most = max(free, 0) // amount
        left = list(room)
        for i, amount in wants:
            left[i] -= most * amount  # type: ignore[operator]
        return most, tuple(left)

    def _take_units(self, room: Room, kind: int, most: int) -> tuple[int, Room]:
        key = room, kind, most
        if key not in self._took:
            need = {str(i): amount for i, amount in self._wants[kind]}
            units = {str(i): dict(enumerate(free)) for i, free in enumerate(room) if isinstance(free, tuple)}
            amounts = {str(i): free for i, free in enumerate(room) if isinstance(free, int)}
            taken = 0
            while taken < most and slots(amounts, need, units):
                taken += 1
                for name, amount in need.items():
                    if name not in units:
                        amounts[name] -= amount
                        continue
                    for number, part in choose_units(units[name], amount).items():
                        units[name][number] -= part
            names = map(str, range(len(room)))
            left = [tuple(sorted(units[name].values())) if name in units else amounts[name] for name in names]
            self._took[key] = taken, tuple(left)
        return self._took[key]

    def _fill(self, sort: Sort, counts: Counts) -> tuple[Counts, Room]:
        room, kinds = sort
        taken = [0] * len(counts)
        for kind, count in enumerate(counts):
            if count and kinds >> kind & 1:
                taken[kind], room = self._take(room, kind, count)
        return tuple(taken), room

    def _fits(self, position: int, taken: Sequence[int]) -> bool:
        return self._fill(self._sort(position), tuple(taken))[0] == tuple(taken)

    def _left(self, room: Room) -> float:
        """How much is left over, in shares of what the group demands."""
        left = 0.0
        for i, demand in self._demand:
            free = room[i]
            left += (sum(free) if isinstance(free, tuple) else free) / demand
        return left

    def _is_thinkable(self) -> bool:
        """Whether the sites have enough in all. Most groups that wait are refused here."""
        for i, demand in self._demand:
            free = [site.room[i] for site in self._sites]
            if demand > sum(sum(x) if isinstance(x, tuple) else max(x, 0) for x in free):
                return False
        return self._has_slots(range(len(self._sites)), self._counts)

    def _has_slots(self, positions: Sequence[int], counts: Counts) -> bool:
        """Whether each kind alone would fit."""
        for kind, count in enumerate(counts):
            found = 0
            for position in positions:
                if found >= count:
                    break
                site = self._sites[position]
                if site.kinds >> kind & 1:
                    found += self._take(site.room, kind, count)[0]
            if found < count:
                return False
        return True

    # -------------------------------------------------------------------------------------------------------------- pack
    def _pack(self, positions: Sequence[int], counts: Counts) -> Places | None:
        of_sort: dict[Sort, int] = {}
        for position in positions:
            sort = self._sort(position)
            of_sort[sort] = of_sort.get(sort, 0) + 1
        chosen: list[tuple[Sort, Counts]] = []
        while any(counts):
            step = self._best_sorts(of_sort, counts)
            if not step:
                return None
            for _, sort, taken in step:
                # What was worked out for more bundles holds as long as there are as many as it takes.
                while of_sort[sort] and all(t <= n for t, n in zip(taken, counts, strict=True)):
                    of_sort[sort] -= 1
                    chosen.append((sort, taken))
                    counts = tuple(n - t for n, t in zip(counts, taken, strict=True))
                if of_sort[sort]:
                    break
        wanted = Counter(sort for sort, _ in chosen)
        sorts = {position: self._sort(position) for position in positions}
        near = self._near(sorts, wanted)
        return {near[sort].pop(0): list(taken) for sort, taken in chosen}

    def _best_sorts(self, of_sort: Mapping[Sort, int], counts: Counts) -> list[tuple[tuple[int, float], Sort, Counts]]:
        """The sorts that take one of the largest kind that is left, best first."""
        largest = next(kind for kind, count in enumerate(counts) if count)
        found = []
        for sort, number in of_sort.items():
            if number:
                taken, room = self._fill(sort, counts)
                if taken[largest]:
                    found.append(((-sum(taken), self._left(room)), sort, taken))
        found.sort(key=lambda entry: entry[0])
        return found

    # ------------------------------------------------------------------------------------------------------------- match
    def _match(self, rooms: Mapping[int, Room], counts: Counts) -> Places:
        """A maximum matching: at most one bundle to a site, as many bundles as possible, large ones rather than small."""
        fitting: dict[int, int] = {}
        known: dict[Sort, int] = {}
        for position, room in rooms.items():
            sort = room, self._sites[position].kinds
            if sort not in known:
                may = [kind for kind, count in enumerate(counts) if count and sort[1] >> kind & 1]
                known[sort] = sum(1 << kind for kind in may if self._take(room, kind, 1)[0])
            if known[sort]:
                fitting[position] = known[sort]
        free = Counter(fitting.values())
        # Those that fit the fewest kinds first.
        sets = sorted(free, key=lambda kinds: (kinds.bit_count(), kinds))
        given: dict[int, Counter[int]] = {kinds: Counter() for kinds in sets}
        for kind, count in enumerate(counts):
            for _ in range(count):
                if not _augment(kind, sets, free, given):
                    break
        wanted = Counter({kinds: of_kind.total() for kinds, of_kind in given.items() if of_kind.total()})
        near = self._near(fitting, wanted)
        places: Places = {}
        for kinds, of_kind in given.items():
            for kind in sorted(of_kind.elements()):
                places[near[kinds].pop(0)] = [int(k == kind) for k in range(len(counts))]
        return places

    # -------------------------------------------------------------------------------------------------------------- near
    def _domains(self, positions: Sequence[int]) -> Iterator[list[int]]:
        """Sites of one host, then of one switch, innermost first; with sites in use, only what has them all."""
        paths = [self._sites[position].path for position in self._used]
        members: dict[tuple[str, ...], list[int]] = {}
        for position in positions:
            path = self._sites[position].path
            for depth in range(len(path), 0, -1):
                members.setdefault(path[:depth], []).append(position)
        # A host is a domain at whatever depth it hangs.
        deepest = {self._sites[position].path for position in positions}
        for prefix in sorted(members, key=lambda prefix: (prefix not in deepest, -len(prefix))):
            if 1 < len(members[prefix]) < len(positions) and all(path[: len(prefix)] == prefix for path in paths):
                yield members[prefix]

    def _near(self, sorts: Mapping[int, S], wanted: Mapping[S, int]) -> dict[S, list[int]]:
        """Positions of so many sites of each sort: nearest to those in use, else within the shortest window of ranks."""
        suited = [position for position, sort in sorts.items() if sort in wanted]
        if self._used:
            middle = self._sites[self._used[len(self._used) // 2]].rank
            suited.sort(key=lambda position: (abs(self._sites[position].rank - middle), position))
        else:
            suited = self._shortest_window(sorted(suited), sorts, wanted)
        found: dict[S, list[int]] = {sort: [] for sort in wanted}
        for position in suited:
            if len(found[sorts[position]]) < wanted[sorts[position]]:
                found[sorts[position]].append(position)
        return found

    def _shortest_window(self, suited: list[int], sorts: Mapping[int, S], wanted: Mapping[S, int]) -> list[int]:
        missing, lacking = dict(wanted), len(wanted)
        best, length = suited, float("inf")
        first = 0
        for last, position in enumerate(suited):
            missing[sorts[position]] -= 1
            lacking -= missing[sorts[position]] == 0
            while not lacking:
                span = self._sites[position].rank - self._sites[suited[first]].rank
                if span < length:
                    best, length = suited[first : last + 1], span
                lacking += missing[sorts[suited[first]]] == 0
                missing[sorts[suited[first]]] += 1
                first += 1
        return best

    # ------------------------------------------------------------------------------------------------------------ search
    def _search(self, *, is_packing: bool) -> Places | None:
        bundles = [kind for kind, count in enumerate(self._counts) for _ in range(count)]
        if len(bundles) > _DEEPEST:
            self.was_cut_off = True
            return None
        rooms = [site.room for site in self._sites]
        loads = [0] * len(rooms)
        for position in self._used:
            loads[position] = 1
        places: list[int] = []
        visits = 0

        def go_on() -> bool:
            nonlocal visits
            if len(places) == len(bundles):
                return True
            kind, tried = bundles[len(places)], set()
            visits += len(rooms) // _SORTED_PER_VISIT
            by_load = sorted(range(len(rooms)), key=lambda p: loads[p] == 0 if is_packing else loads[p])
            for position in by_load:
                visits += 1
                if visits > MOST_VISITS:
                    self.was_cut_off = True
                    return False
                before, kinds = rooms[position], self._sites[position].kinds
                if (before, kinds) in tried or not kinds >> kind & 1:
                    continue
                tried.add((before, kinds))
                taken, room = self._take(before, kind, 1)
                if not taken:
                    continue
                rooms[position] = room
                loads[position] += 1
                places.append(position)
                if go_on():
                    return True
                places.pop()
                loads[position] -= 1
                rooms[position] = before
            return False

        if not go_on():
            return None
        found: Places = {}
        for kind, position in zip(bundles, places, strict=True):
            found.setdefault(position, [0] * len(self._counts))[kind] += 1
        return found


def _augment(kind: int, sets: Sequence[int], free: Counter[int], given: Mapping[int, Counter[int]]) -> bool:
    """Give one more bundle of this kind a site, for which others may move; breadth first, so the fewest do."""
    reached: dict[int, tuple[int, int] | None] = {kind: None}
    queue = [kind]
    for at in queue:
        for kinds in sets:
            if not kinds >> at & 1:
                continue
            if free[kinds]:
                free[kinds] -= 1
                came: tuple[int, int] | None = (at, kinds)
                while came is not None:
                    mover, to = came
                    given[to][mover] += 1
                    came = reached[mover]
                    if came is not None:
                        given[came[1]][mover] -= 1
                return True
            for other, number in given[kinds].items():
                if number and other not in reached:
                    # `other` would move away from `kinds`, and `at` take its site.
                    reached[other] = (at, kinds)
                    queue.append(other)
    return False
