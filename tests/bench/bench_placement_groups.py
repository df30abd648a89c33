"""Placement groups made and removed per second, as JSON: ``hpcray run [-n 8] tests/bench/bench_placement_groups.py [--quick]``.

Batch: all are asked for, then all are waited for, then all are removed, as in Ray's microbenchmark. One at a time: each is
waited for and removed before the next. Its yardstick is a Unix-socket round trip between two Python processes.
"""

from __future__ import annotations

import argparse

from common import Bench, Ratio, echo, options, per_second

import hpcray
from hpcray.util import PlacementGroup, placement_group, placement_group_table, remove_placement_group

PROMISED = 2000 * 24e-6
"""Groups per round trip in one rank: 2,000/s where a round trip takes 24 us."""
PROMISED_IN_RANKS = 500 * 24e-6
TINY = [{"CPU": 0.001}]


def made(count: int, bundles: list[dict[str, float]] = TINY, strategy: str = "PACK") -> list[PlacementGroup]:
    """So many groups that have their bundles."""
    groups = [placement_group(bundles, strategy=strategy) for _ in range(count)]
    for group in groups:
        assert group.wait(60)
    return groups


def removed(groups: list[PlacementGroup]) -> None:
    """Until the control store has removed them all."""
    for group in groups:
        remove_placement_group(group)
    placement_group_table(groups[-1])


def main() -> None:
    """Measure all in turns."""
    parsed = options(argparse.ArgumentParser(description=__doc__))
    batch, many, single = (20, 50, 10) if parsed.quick else (100, 1000, 300)
    hpcray.init()
    nodes = [node for node in hpcray.nodes() if node["Resources"].get("CPU")]
    ranks = len(hpcray.nodes())
    bench = Bench(f"placement groups, {ranks} rank{'s' * (ranks > 1)}")
    bench.facts |= {"ranks": ranks, "nodes with CPUs": len(nodes), "batch": batch, "large batch": many}
    spread = [*TINY] * len(nodes)

    def run_batch() -> None:
        removed(made(batch))

    def run_large_batch() -> None:
        removed(made(many))

    def run_one_at_a_time() -> None:
        for _ in range(single):
            removed(made(1))

    def run_over_all_nodes() -> None:
        removed(made(batch, spread, "SPREAD"))

    run_batch()
    with echo() as round_trips:
        bench.run(
            parsed.rounds,
            {
                "socket round trips": ("1/s", round_trips),
                "groups, batch": ("1/s", lambda: per_second(run_batch, batch)),
                "groups, large batch": ("1/s", lambda: per_second(run_large_batch, many)),
                "groups, one at a time": ("1/s", lambda: per_second(run_one_at_a_time, single)),
                "groups of a bundle per node, batch": ("1/s", lambda: per_second(run_over_all_nodes, batch)),
            },
        )
    promised = PROMISED if ranks == 1 else PROMISED_IN_RANKS
    bench.report(
        {
            "groups, batch": Ratio("groups, batch", "socket round trips", at_least=promised),
            "groups, large batch": Ratio("groups, large batch", "socket round trips", at_least=promised),
            "groups, one at a time": Ratio("groups, one at a time", "socket round trips"),
        }
    )


if __name__ == "__main__":
    main()
