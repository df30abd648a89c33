"""Where tasks, actors and bundles should go, and in words why they cannot. Pure; nothing here is changed or remembered.

Costs at 1,000 nodes (tests/bench/bench_policies.py): `feasible` and `order` 0.5 to 1 ms, so they are for once per class or class
and turn, and 100 places taken in one turn cost 10 us each; `place_bundles` 2 to 15 ms for 100 bundles, up to 50 if they are of
several kinds and no two nodes have the same free. The texts take some ms and are for people.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

from hpcray.gcs.packing import Packing, Places, Room, Site
from hpcray.protocol.messages import LabelRule, Template
from hpcray.resources import UNIT, Shape, Units, slots, to_float

STRATEGIES = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
_WITHOUT_DEMAND = ("CPU", "GPU", "memory")  # what counts as use of a node for work that demands nothing (Ray's choice)
_MOST_LINES = 10
_GIB = 1 << 30


class Node(Protocol):
    """What a policy sees of a raylet. Sequences of nodes are in the order of their ranks."""

    @property
    def rank(self) -> int: ...
    @property
    def total(self) -> Shape: ...
    @property
    def available(self) -> Shape: ...
    @property
    def units(self) -> Units:
        """Of resources that come in units, what is free of each."""

    @property
    def labels(self) -> Mapping[str, str]: ...
    @property
    def host(self) -> str: ...
    @property
    def switch(self) -> tuple[str, ...]:
        """The switches above the host, outermost first; empty if unknown."""


N = TypeVar("N", bound=Node)


# ------------------------------------------------------------------------------------------------------------------- labels
def matches(rules: Iterable[LabelRule], labels: Mapping[str, str]) -> bool:
    """Whether all rules hold. As in Ray, "not in" holds where there is no such label."""
    return all(_holds(rule, labels.get(rule.key)) for rule in rules)


def _holds(rule: LabelRule, value: str | None) -> bool:
    if rule.operator == "in":
        return value in rule.values
    if rule.operator == "not in":
        return value not in rule.values
    return (value is not None) == (rule.operator == "exists")


# ---------------------------------------------------------------------------------------------------------- tasks and actors
def demand_of(template: Template) -> Shape:
    """What must be free to place one of the class: an actor may need more to be placed than to run."""
    demand = dict(template.resources)
    if template.actor is not None:
        for name, amount in template.actor.placement.items():
            demand[name] = max(amount, demand.get(name, 0))
    return demand


def feasible(template: Template, nodes: Iterable[N]) -> list[N]:
    """The nodes that could run one of the class if nothing else ran, in the given order.

    A soft affinity to a node that could leaves only that one, as in Ray. The placement group is not looked at.
    """
    demand = demand_of(template).items()
    found = [
        node
        for node in nodes
        if all(node.total.get(name, 0) >= amount for name, amount in demand)
        and (not template.labels or matches(template.labels, node.labels))
    ]
    if template.node is not None:
        asked = [node for node in found if node.rank == template.node]
        return asked if asked or not template.node_is_soft else found
    return found


def order(template: Template, nodes: Iterable[N]) -> list[N]:
    """Which of the feasible nodes to take first, by Ray's hybrid policy: for once per class and turn, not per task.

    Nodes with all liked labels come before others; then, for what needs no GPU, those that have none; then those that
    would at most be half used, as they are given (so work is packed there); then the others, least used first. How much
    a node would be used is the largest share over the resources demanded, one such demand included; of a demand of nothing,
    over CPU, GPU and memory. It includes those that have no room now, which thus come late.
    """
    demand = demand_of(template)
    names = list(demand.items()) or [(name, 0) for name in _WITHOUT_DEMAND]
    preference = _preference(template, demand)
    halves: dict[tuple[bool, bool], list[N]] = {}
    others: dict[tuple[bool, bool], list[tuple[float, N]]] = {}
    for node in nodes:
        key = preference(node)
        used = _use(node, names)
        if used <= 0.5:
            halves.setdefault(key, []).append(node)
        else:
            others.setdefault(key, []).append((used, node))
    ordered: list[N] = []
    for key in sorted({*halves, *others}):
        ordered += halves.get(key, [])
        ordered += [node for _, node in sorted(others.get(key, []), key=lambda entry: entry[0])]
    return ordered


def favourites(template: Template, nodes: Sequence[N]) -> list[N]:
    """Those of the nodes that `order` would take first however much they are used."""
    preference = _preference(template, demand_of(template))
    best = min(map(preference, nodes), default=(False, False))
    return [node for node in nodes if preference(node) == best]


def _preference(template: Template, demand: Shape) -> Callable[[Node], tuple[bool, bool]]:
    """What makes one node better than another before how much they are used; the least is best."""
    avoids_gpus = "GPU" not in demand
    liked = template.liked_labels
    return lambda node: (
        bool(liked) and not matches(liked, node.labels),
        avoids_gpus and node.total.get("GPU", 0) > 0,
    )


def _use(node: Node, names: Iterable[tuple[str, int]]) -> float:
    most = 0.0
    total, available = node.total, node.available
    for name, amount in names:
        if has := total.get(name):
            used = (has - available.get(name, 0) + amount) / has
            most = max(most, used)
    return most


def why_not(template: Template, nodes: Iterable[Node]) -> str:
    """Why none of the nodes can run one of the class now, in a few lines for people; empty if one can."""
    nodes = list(nodes)
    demand = demand_of(template)
    if template.node is not None and not template.node_is_soft:
        nodes = [node for node in nodes if node.rank == template.node]
        if not nodes:
            return f"node {template.node}, to which it is bound, does not exist"
    return _why_none(demand, template.labels, nodes)


# ------------------------------------------------------------------------------------------------------------------ bundles
def largest_first(bundles: Sequence[Shape]) -> list[int]:
    """The order in which bundles are taken, by index: the scarce first (GPUs, resources of the user's, memory, CPUs).

    Whoever reserves several on one node must keep to it, or fractions of GPUs that fit may not.
    """

    def size(index: int) -> tuple[int, ...]:
        bundle = bundles[index]
        common = [bundle.get(name, 0) for name in ("GPU", "memory", "CPU")]
        return (-common[0], -(sum(bundle.values()) - sum(common)), -common[1], -common[2], index)

    return sorted(range(len(bundles)), key=size)


def place_bundles(
    bundles: Sequence[Shape],
    strategy: str,
    nodes: Sequence[Node],
    *,
    labels: Sequence[Sequence[LabelRule]] = (),
    placed: Mapping[int, int] = {},
) -> list[int] | None:
    """Ranks for the bundles of a group, all or none, by what is available now.

    `STRICT_PACK` and `STRICT_SPREAD` find a placement if there is one. `PACK` and `SPREAD` find one unless that takes more
    than the bounded search of `hpcray.gcs.packing`, which also says how: PACK uses few nodes, SPREAD as many as possible;
    all prefer nodes of one host, then of one switch, then with ranks near each other.

    Args:
        bundles: What each needs.
        strategy: One of `STRATEGIES`.
        labels: Per bundle, rules that its node's labels must meet; empty: none.
        placed: Bundle → rank, of those that have their place already and are off what is available.

    Returns:
        The rank of each bundle, those of `placed` included; None: not now.
    """
    problem = _Problem(bundles, strategy, [(node, node.available, node.units) for node in nodes], labels, placed)
    return problem.solve()


def bundles_could_fit(
    bundles: Sequence[Shape], strategy: str, nodes: Sequence[Node], *, labels: Sequence[Sequence[LabelRule]] = ()
) -> bool:
    """Whether the group could be placed if nothing else ran. Only a False is certain."""
    problem = _Problem(bundles, strategy, [(node, node.total, _whole(node)) for node in nodes], labels, {})
    return problem.solve() is not None or problem.was_cut_off


def bundles_why_not(
    bundles: Sequence[Shape], strategy: str, nodes: Sequence[Node], *, labels: Sequence[Sequence[LabelRule]] = ()
) -> str:
    """Why the group cannot be placed now, in a few lines for people; empty if it can."""
    if place_bundles(bundles, strategy, nodes, labels=labels) is not None:
        return ""
    lines = []
    if strategy == "STRICT_SPREAD" and len(bundles) > len(nodes):
        lines.append(f"STRICT_SPREAD puts {len(bundles)} bundles on as many nodes, and there are {len(nodes)}")
    kinds: dict[tuple[object, ...], list[int]] = {}
    for index, bundle in enumerate(bundles):
        rules = tuple(labels[index]) if labels else ()
        kinds.setdefault((tuple(sorted(bundle.items())), rules), []).append(index)
    for indices in kinds.values():
        bundle, rules = bundles[indices[0]], tuple(labels[indices[0]]) if labels else ()
        suited = [node for node in nodes if matches(rules, node.labels)]
        most = 1 if strategy == "STRICT_SPREAD" else len(indices)
        now = sum(min(most, slots(node.available, bundle, node.units)) for node in suited)
        ever = sum(min(most, slots(node.total, bundle, _whole(node))) for node in suited)
        if now < len(indices):
            each = f"bundle {indices[0]}" if len(indices) == 1 else f"{len(indices)} bundles ({_ranges(indices)})"
            room = f"room for {min(now, len(indices))} now and {min(ever, len(indices))} if nothing else ran"
            lines.append(f"{each} of {_shown(bundle)}: {room}")
            if now == 0:
                lines.append(_why_none(bundle, rules, nodes))
    if lines:
        return "\n".join(lines)
    if strategy != "STRICT_PACK":
        return "each bundle alone would fit, but there is no room for all of them together"
    together: Shape = {}
    for bundle in bundles:
        for name, amount in bundle.items():
            together[name] = together.get(name, 0) + amount
    every = tuple(dict.fromkeys(rule for rules in labels for rule in rules))
    reasons = _why_none(together, every, nodes) or "fractions of its GPUs do not fit together"
    return f"STRICT_PACK puts all {len(bundles)} bundles on one node:\n{reasons}"


class _Problem:
    """A group as `Packing` sees it, and back."""

    def __init__(
        self,
        bundles: Sequence[Shape],
        strategy: str,
        nodes: Sequence[tuple[Node, Shape, Units]],
        labels: Sequence[Sequence[LabelRule]],
        placed: Mapping[int, int],
    ) -> None:
        self._ranks = [placed.get(index, -1) for index in range(len(bundles))]
        self._strategy = strategy
        names = list(dict.fromkeys(name for bundle in bundles for name in bundle))
        kinds: dict[tuple[tuple[int, ...], tuple[LabelRule, ...]], list[int]] = {}
        for index in largest_first(bundles):
            if index not in placed:
                need = tuple(bundles[index].get(name, 0) for name in names)
                kinds.setdefault((need, tuple(labels[index]) if labels else ()), []).append(index)
        self._members = list(kinds.values())
        self._sites = []
        every = (1 << len(kinds)) - 1
        has_rules = any(rules for _, rules in kinds)
        for node, available, units in nodes:
            may = every
            if has_rules:
                may = sum(1 << k for k, (_, rules) in enumerate(kinds) if matches(rules, node.labels))
            room = _room(names, available, units)
            self._sites.append(Site(node.rank, (*node.switch, node.host), room, may))
        where = set(placed.values())
        self._used = [position for position, site in enumerate(self._sites) if site.rank in where]
        counts = tuple(map(len, self._members))
        self._packing = Packing([need for need, _ in kinds], counts, self._sites, self._used) if kinds else None

    @property
    def was_cut_off(self) -> bool:
        return self._packing is not None and self._packing.was_cut_off

    def solve(self) -> list[int] | None:
        if self._packing is None:
            return self._ranks
        places = self._solve(self._packing)
        if places is None:
            return None
        ranks = list(self._ranks)
        left = [list(indices) for indices in self._members]
        for position in sorted(places):
            for kind, count in enumerate(places[position]):
                for _ in range(count):
                    ranks[left[kind].pop(0)] = self._sites[position].rank
        return ranks

    def _solve(self, packing: Packing) -> Places | None:
        if self._strategy == "STRICT_PACK":
            return packing.on_one(self._used if max(self._ranks) >= 0 else range(len(self._sites)))
        if self._strategy == "STRICT_SPREAD":
            return packing.apart()
        return packing.packed() if self._strategy == "PACK" else packing.spread()


def _room(names: Sequence[str], available: Shape, units: Units) -> Room:
    return tuple([tuple(sorted(units[name].values())) if name in units else available.get(name, 0) for name in names])


def _whole(node: Node) -> Units:
    return {name: dict.fromkeys(each, UNIT) for name, each in node.units.items()}


# ------------------------------------------------------------------------------------------------------------------- texts
def _why_none(demand: Shape, rules: Sequence[LabelRule], nodes: Iterable[Node]) -> str:
    """A line per sort of nodes: their reasons, with what is free from the least to the most."""
    alike: dict[tuple[tuple[tuple[LabelRule, str | None], ...], tuple[tuple[str, int], ...]], list[Node]] = {}
    for node in nodes:
        broken = tuple((rule, node.labels.get(rule.key)) for rule in rules if not matches([rule], node.labels))
        lacking = tuple(
            (name, node.total.get(name, 0))
            for name, amount in demand.items()
            if not slots(node.available, {name: amount}, node.units)
        )
        if not broken and not lacking:
            return ""
        alike.setdefault((broken, lacking), []).append(node)
    if not alike:
        return "there are no nodes"
    lines = []
    for (broken, lacking), members in alike.items():
        needs = "needs " + ", ".join(_lack(name, demand[name], total, members) for name, total in lacking)
        reasons = [needs] if lacking else []
        reasons += [_rule_in_words(rule, value) for rule, value in broken]
        lines.append(f"{_who(members)}: {'; '.join(reasons)}")
    if len(lines) > _MOST_LINES:
        rest = sum(len(members) for members in list(alike.values())[_MOST_LINES - 1 :])
        lines[_MOST_LINES - 1 :] = [f"{rest} more nodes, each for reasons of these kinds"]
    return "\n".join(lines)


def _lack(name: str, amount: int, total: int, nodes: Sequence[Node]) -> str:
    free = [node.available.get(name, 0) for node in nodes]
    least, most = _amount(name, max(0, min(free))), _amount(name, max(0, *free, 0))
    text = f"{_amount(name, amount)} {name}, {least if least == most else f'{least} to {most}'} free of {_amount(name, total)}"
    if total >= amount and max(free) >= amount:
        text += " but no whole one" if amount >= UNIT else " but too little of each single one"
    return text


def _rule_in_words(rule: LabelRule, value: str | None) -> str:
    has = f"label {rule.key} is {value!r}" if value is not None else f"it has no label {rule.key}"
    if rule.operator in ("in", "not in"):
        wanted = ", ".join(map(repr, rule.values))
        return f"{has}, not one of {wanted}" if rule.operator == "in" else f"{has}, one of those ruled out: {wanted}"
    return has if rule.operator == "exists" else f"{has}, and it must have none"


def _who(nodes: Sequence[Node]) -> str:
    if len(nodes) == 1:
        return f"node {nodes[0].rank} (host {nodes[0].host})"
    hosts = list(dict.fromkeys(node.host for node in nodes))
    named = f"hosts {hosts[0]} to {hosts[-1]}" if len(hosts) > 2 else f"hosts {' and '.join(hosts)}"
    return f"{len(nodes)} nodes ({_ranges([node.rank for node in nodes])}; {named if len(hosts) > 1 else f'host {hosts[0]}'})"


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return ", ".join(shown if len(shown) <= 6 else [*shown[:5], "…"])


def _shown(shape: Shape) -> str:
    return ", ".join(f"{_amount(name, amount)} {name}" for name, amount in shape.items()) or "nothing"


def _amount(name: str, amount: int) -> str:
    if name in ("memory", "object_store_memory"):
        return f"{to_float(amount) / _GIB:.3g} GiB"
    return f"{to_float(amount):g}"
