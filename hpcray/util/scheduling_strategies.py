"""Where a task or actor should run: what `scheduling_strategy` takes besides "DEFAULT" and "SPREAD". Names are Ray's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from hpcray import ids

if TYPE_CHECKING:
    from hpcray.util.placement_group import PlacementGroup

_NODE_ID = re.compile(rf"[0-9a-fA-F]{{{2 * ids.OBJECT_ID_SIZE}}}")


class PlacementGroupSchedulingStrategy:
    """Run in a bundle of a placement group. What is wrong with it is said by `remote()`.

    Args:
        placement_group: The group; None: in none, not even that of the running task.
        placement_group_bundle_index: Which bundle; -1: any.
        placement_group_capture_child_tasks: Whether what the task or actor itself submits runs in the group, too.
    """

    def __init__(
        self,
        placement_group: PlacementGroup | None,
        placement_group_bundle_index: int = -1,
        placement_group_capture_child_tasks: bool | None = None,
    ) -> None:
        self.placement_group = placement_group
        self.placement_group_bundle_index = placement_group_bundle_index
        self.placement_group_capture_child_tasks = placement_group_capture_child_tasks


class NodeAffinitySchedulingStrategy:
    """Run on one node (rank), and wait for room there.

    Args:
        node_id: Its id, as in `hpcray.nodes()`.
        soft: Run elsewhere if there is no such node, or it could never have room; without, such a task fails.

    Raises:
        ValueError: Not the id of a node.
    """

    def __init__(self, node_id: str | bytes, soft: bool) -> None:
        text = node_id if isinstance(node_id, str) else node_id.hex()
        if not _NODE_ID.fullmatch(text) or not text.lower().strip("f"):
            raise ValueError(
                f"Invalid node_id {text!r}: it must be {2 * ids.OBJECT_ID_SIZE} hexadecimal digits, as in the 'NodeID' of "
                "hpcray.nodes() or hpcray.get_runtime_context().get_node_id()"
            )
        self.node_id = text
        self.soft = soft


class In:
    """The label is one of these. Raises ValueError for none, or for what is no string."""

    def __init__(self, *values: str) -> None:
        self.values = _checked("In", values)


class NotIn:
    """The label is none of these, or there is none. Raises ValueError for none, or for what is no string."""

    def __init__(self, *values: str) -> None:
        self.values = _checked("NotIn", values)


class Exists:
    """There is such a label."""


class DoesNotExist:
    """There is no such label."""


LabelMatchExpressionsT: TypeAlias = Mapping[str, In | NotIn | Exists | DoesNotExist]


class NodeLabelSchedulingStrategy:
    """Run on a node with certain labels: `NodeLabelSchedulingStrategy({"zone": In("a", "b")}, soft={"disk": Exists()})`.

    Args:
        hard: What must hold for the node's labels.
        soft: What should, where a node has room for which it does.

    Raises:
        ValueError: Both are empty, or something is not a dictionary from strings to operators.
    """

    def __init__(self, hard: LabelMatchExpressionsT | None, *, soft: LabelMatchExpressionsT | None = None) -> None:
        self.hard = _expressions("hard", hard)
        self.soft = _expressions("soft", soft)
        if not self.hard and not self.soft:
            raise ValueError("hard and soft of a NodeLabelSchedulingStrategy cannot both be empty")


def _checked(operator: str, values: tuple[Any, ...]) -> list[str]:
    if not values:
        raise ValueError(f"{operator} needs at least one value: {operator}('value1', 'value2')")
    for position, value in enumerate(values):
        if not isinstance(value, str):
            raise ValueError(f"the value in position {position} of {operator} must be a string, not {value!r}")
    return list(values)


def _expressions(name: str, given: Any) -> dict[str, In | NotIn | Exists | DoesNotExist]:
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise ValueError(f'{name} must be a dictionary such as {{"zone": In("a")}}, not {given!r}')
    for key, value in given.items():
        if not isinstance(key, str):
            raise ValueError(f"a key of {name} must be a string, the name of a label, not {key!r}")
        if not isinstance(value, (In, NotIn, Exists, DoesNotExist)):
            raise ValueError(
                f"the value of {key!r} in {name} must be one of the operators In, NotIn, Exists and DoesNotExist, not {value!r}"
            )
    return dict(given)
