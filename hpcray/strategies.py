"""From the options that say where something runs to the fields of its template."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from hpcray import ids
from hpcray.client import current_client
from hpcray.labels import label_rules
from hpcray.protocol.messages import NO_NODE, LabelRule
from hpcray.resources import Shape, as_floats, shape_of
from hpcray.runtime_context import Surroundings
from hpcray.util.placement_group import PlacementGroup, PlacementGroupID
from hpcray.util.scheduling_strategies import (
    Exists,
    In,
    LabelMatchExpressionsT,
    NodeAffinitySchedulingStrategy,
    NodeLabelSchedulingStrategy,
    NotIn,
    PlacementGroupSchedulingStrategy,
)

_LEGACY = ("placement_group", "placement_group_bundle_index", "placement_group_capture_child_tasks")


def check_strategy(strategy: object) -> None:
    """Refuse what is no scheduling strategy.

    Raises:
        ValueError: An unknown name.
        TypeError: Neither a name nor a strategy.
    """
    if isinstance(strategy, str):
        if strategy not in ("DEFAULT", "SPREAD"):
            raise ValueError(f"scheduling_strategy must be 'DEFAULT' or 'SPREAD', not {strategy!r}")
    elif not isinstance(
        strategy, (NodeAffinitySchedulingStrategy, NodeLabelSchedulingStrategy, PlacementGroupSchedulingStrategy)
    ):
        raise TypeError(
            "scheduling_strategy must be 'DEFAULT', 'SPREAD' or a strategy from hpcray.util.scheduling_strategies, not "
            f"{strategy!r}"
        )


def check_group_options(options: Mapping[str, Any]) -> None:
    """Refuse the options of placement groups that Ray deprecates, where they are wrong; warn of them else.

    Raises:
        ValueError: There is a scheduling strategy, too.
        TypeError: `placement_group` is no placement group.
    """
    group = options.get("placement_group", "default")
    if group in ("default", None):
        pass
    elif not hasattr(group, "bundle_specs"):
        raise TypeError(f"the option 'placement_group' must be a PlacementGroup or None, not {group!r}")
    elif options.get("scheduling_strategy") is not None:
        raise ValueError(
            "give the placement group in scheduling_strategy=PlacementGroupSchedulingStrategy(...); the option "
            "placement_group is deprecated and excludes any other strategy"
        )
    if legacy := [name for name in _LEGACY if name in options]:
        # Up to the call of options().
        warnings.warn(
            f"{' and '.join(legacy)}: deprecated, use scheduling_strategy=PlacementGroupSchedulingStrategy(...)",
            DeprecationWarning,
            stacklevel=5,
        )


def strategy_fields(
    options: Mapping[str, Any], name: str, resources: Shape, placement: Shape, caller: Surroundings
) -> dict[str, Any]:
    """The fields of a template that say where it runs, from checked options.

    Args:
        name: Of the function or class, for errors.
        resources: What it needs to run.
        placement: What an actor needs to be placed, where that is more.
        caller: Where the caller runs.

    Raises:
        ValueError: The placement group has no such bundle, or none that is large enough.
        TypeError: The placement group is none, or its bundle's index no integer.
    """
    strategy = options.get("scheduling_strategy")
    labels = label_rules(options.get("label_selector") or {})
    fields: dict[str, Any] = {}
    if strategy is None or isinstance(strategy, PlacementGroupSchedulingStrategy):
        given = vars(strategy) if strategy is not None else {key: options[key] for key in _LEGACY if key in options}
        fields = _group_fields(given, name, resources, placement, caller)
    elif strategy == "SPREAD":
        fields = {"spread": True}
    elif isinstance(strategy, NodeAffinitySchedulingStrategy):
        fields = {"node": _rank_of(strategy.node_id), "node_is_soft": bool(strategy.soft)}
    elif isinstance(strategy, NodeLabelSchedulingStrategy):
        labels += _rules(strategy.hard)
        if strategy.soft:
            fields = {"liked_labels": tuple(_rules(strategy.soft))}
    if labels:
        fields["labels"] = tuple(labels)
    return fields


def _rank_of(node_id: str) -> int:
    rank = ids.rank_of_node(node_id)
    client = current_client()
    # An id of another job would name a rank of this one.
    is_of_job = client is None or ids.node_id(ids.nonce_of(client.prefix), rank) == node_id.lower()
    return rank if is_of_job else NO_NODE


def _rules(expressions: LabelMatchExpressionsT) -> list[LabelRule]:
    rules = []
    for key, value in expressions.items():
        if isinstance(value, (In, NotIn)):
            rules.append(LabelRule(key, "in" if isinstance(value, In) else "not in", tuple(value.values)))
        else:
            rules.append(LabelRule(key, "exists" if isinstance(value, Exists) else "does not exist"))
    return rules


def _group_fields(
    given: Mapping[str, Any], name: str, resources: Shape, placement: Shape, caller: Surroundings
) -> dict[str, Any]:
    group = given.get("placement_group", "default")
    index = given.get("placement_group_bundle_index", -1)
    captures = given.get("placement_group_capture_child_tasks")
    captures = caller.captures if captures is None else captures
    if not isinstance(index, int):
        raise TypeError(f"the index of a bundle must be an integer, not {index!r}")
    if group == "default" and captures and caller.group:
        group = PlacementGroup(PlacementGroupID(caller.group))
        if not group.bundle_specs:  # removed so long ago that nothing is known of it: the call fails for that
            return {"group": caller.group, "bundle": index, "captures": True}
    if group in ("default", None) or getattr(group, "is_empty", False):
        if index != -1:
            raise ValueError(f"without a placement group the index of its bundle must be -1, not {index}")
        return {}
    if not hasattr(group, "bundle_specs"):
        raise TypeError(f"the placement group of a PlacementGroupSchedulingStrategy must be one or None, not {group!r}")
    if not -1 <= index < group.bundle_count:
        raise ValueError(
            f"placement group bundle index {index} is invalid: it must be 0 to {group.bundle_count - 1}, or -1 for any"
        )
    _check_fit(group.bundle_specs, index, name, resources, placement)
    fields = {"group": group.id.binary(), "bundle": index}
    return {**fields, "captures": True} if captures else fields


def _check_fit(specs: Sequence[Mapping[str, float]], index: int, name: str, resources: Shape, placement: Shape) -> None:
    bundles = [shape_of(spec) for spec in (specs if index < 0 else [specs[index]])]
    where = "any bundle of the placement group" if index < 0 else f"bundle {index} of the placement group"
    shown = [dict(spec) for spec in specs]
    if not any(_covers(bundle, resources) for bundle in bundles):
        raise ValueError(
            f"Cannot schedule {name} with the placement group: what it needs, {as_floats(resources)}, does not fit into {where}: "
            f"{shown}"
        )
    if not any(_covers(bundle, placement) for bundle in bundles):
        raise ValueError(
            f"Cannot schedule {name} with the placement group: an actor needs 1 CPU to be created unless num_cpus says "
            f"otherwise, and that does not fit into {where}: {shown}. Give a bundle a CPU, or the actor num_cpus=0."
        )


def _covers(bundle: Shape, demand: Shape) -> bool:
    return all(bundle.get(name, 0) >= amount for name, amount in demand.items())
