"""Temporary."""

from __future__ import annotations

from typing import Any

from hpcray.protocol import messages as m
from hpcray.resources import choose_units, slots


def feasible(template: m.Template, nodes: Any) -> list[Any]:
    shape = template.actor.placement if template.actor and template.actor.placement else template.resources
    found = [n for n in nodes if slots(n.total, shape)]
    if template.node is not None and not template.node_is_soft:
        found = [n for n in found if n.rank == template.node]
    return found


def order(template: m.Template, nodes: Any) -> list[Any]:
    return sorted(nodes, key=lambda n: n.rank)


def place_bundles(bundles: Any, strategy: str, nodes: Any, labels: Any = (), placed: Any = {}) -> list[int] | None:
    free = {n.rank: (dict(n.available), {k: dict(v) for k, v in n.units.items()}) for n in nodes}
    ranks = []
    used: set[int] = set(placed.values())
    for i, b in enumerate(bundles):
        if i in placed:
            ranks.append(placed[i])
            continue
        c = [r for r, (f, u) in free.items() if slots(f, b, u)]
        if strategy == "STRICT_PACK" and ranks:
            c = [r for r in c if r == ranks[0]]
        if strategy == "STRICT_SPREAD":
            c = [r for r in c if r not in used]
        if strategy == "SPREAD":
            c.sort(key=lambda r: r in used)
        if strategy == "PACK":
            c.sort(key=lambda r: r not in used)
        if not c:
            return None
        r = c[0]
        used.add(r)
        ranks.append(r)
        f, u = free[r]
        for k, a in b.items():
            f[k] -= a
            if k in u:
                for n_, p in choose_units(u[k], a).items():
                    u[k][n_] -= p
    return ranks


def bundles_could_fit(*a: Any, **k: Any) -> bool:
    return True


def bundles_why_not(*a: Any, **k: Any) -> str:
    return ""
