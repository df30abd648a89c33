"""What deciding where things go costs, as JSON: ``python tests/bench/bench_policies.py [--quick] [--nodes 1000]``.

One process, no job: a cluster of `--nodes` raylets, 4 to a host, 20 to a switch, of which an idle one and one where each has some
CPUs and memory free at random. The yardstick sorts as many objects by a quotient of two of their entries.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from common import Bench, Ratio, median_us, options

from hpcray.gcs.policies import STRATEGIES, bundles_why_not, feasible, order, place_bundles, why_not
from hpcray.protocol.messages import Template
from hpcray.resources import UNIT, Shape, Units, shape_of

CPUS = 64
GIB = 1 << 30
BUNDLES = 100
TASKS = 100  # places of one class that are taken in one turn


@dataclass
class Raylet:
    rank: int
    total: Shape
    available: Shape
    host: str
    switch: tuple[str, ...]
    units: Units = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)


def cluster(count: int, *, is_busy: bool) -> list[Raylet]:
    """As many raylets of 64 CPUs and 256 GiB."""
    choose = random.Random(1)
    raylets = []
    for rank in range(count):
        total = shape_of({"CPU": CPUS, "memory": 256 * GIB})
        free = shape_of({"CPU": choose.randint(1, CPUS), "memory": choose.randint(1, 256) * GIB}) if is_busy else total
        raylets.append(Raylet(rank, total, dict(free), f"h{rank // 4}", (f"s{rank // 200}", f"t{rank // 20}")))
    return raylets


def template(cpus: float) -> Template:
    resources = shape_of({"CPU": cpus})
    return Template(job=b"job", function=b"f", name="f", num_returns=1, resources=resources, max_retries=0)


def take_places(raylets: list[Raylet]) -> None:
    """What the GCS does in a turn for one class: go through the order and take the room of each node."""
    left = TASKS
    for raylet in order(template(1), raylets):
        left -= raylet.available["CPU"] // UNIT
        if left <= 0:
            return


def main() -> None:
    """Measure all in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=1000)
    parsed = options(parser)
    times = 3 if parsed.quick else 20
    idle, busy = cluster(parsed.nodes, is_busy=False), cluster(parsed.nodes, is_busy=True)
    alike = [shape_of({"CPU": 4})] * BUNDLES
    unlike = [shape_of({"CPU": 2 + 2 * (n % 3), "memory": 8 * GIB}) for n in range(BUNDLES)]
    actions: dict[str, Callable[[], object]] = {
        "sort": lambda: sorted(busy, key=lambda raylet: raylet.available["CPU"] / raylet.total["CPU"]),
        "feasible": lambda: feasible(template(1), busy),
        "order, idle": lambda: order(template(1), idle),
        "order, busy": lambda: order(template(1), busy),
        "100 places, busy": lambda: take_places(busy),
        "why not": lambda: why_not(template(2 * CPUS), busy),
        "why not, bundles": lambda: bundles_why_not([shape_of({"CPU": 2 * CPUS})] * BUNDLES, "PACK", busy),
    }
    for strategy in STRATEGIES:
        some = 10 if strategy == "STRICT_PACK" else BUNDLES
        actions[f"{strategy}, {some} alike, idle"] = lambda s=strategy, n=some: place_bundles(alike[:n], s, idle)  # type: ignore[misc]
        actions[f"{strategy}, {some} unlike, busy"] = lambda s=strategy, n=some: place_bundles(unlike[:n], s, busy)  # type: ignore[misc]
    bench = Bench("policies")
    bench.facts |= {"nodes": parsed.nodes, "bundles": BUNDLES}
    bench.run(
        parsed.rounds,
        {name: ("us", lambda action=action: median_us(action, times)) for name, action in actions.items()},  # type: ignore[misc]
    )
    for _ in range(parsed.rounds):
        bench.add("a place of 100, busy", "us", median_us(lambda: take_places(busy), times) / TASKS)
    ratios = {name: Ratio(name, "sort") for name in actions if name != "sort"}
    bench.report(ratios, {"a place of 100, busy": {"at_most": 20.0}})


if __name__ == "__main__":
    main()
