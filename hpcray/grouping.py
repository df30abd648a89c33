"""Whether a task or actor goes into a placement group: by its strategy, or as a child of a task that captures its own."""

from __future__ import annotations

import msgspec

from hpcray.client import Client
from hpcray.protocol.messages import Template
from hpcray.resources import as_floats, shape_of, slots
from hpcray.util.placement_group import PlacementGroup, PlacementGroupID


def put_in_group(client: Client, template: Template, strategy: object) -> Template:
    """The template with the group that it belongs to, of which a bundle can hold it.

    Args:
        client: Of the process that calls: it knows whether the running task captures its children.
        template: As its options make it.
        strategy: Its `scheduling_strategy`; None where none was given. Any other rules capturing out, as in Ray.

    Raises:
        ValueError: The group has no such bundle, or none that could ever hold it.
    """
    if strategy is None and client.captured_group:
        template = msgspec.structs.replace(template, group=client.captured_group, captures=True)
    if not template.group:
        return template
    group = getattr(strategy, "placement_group", None) or PlacementGroup(PlacementGroupID(template.group))
    # Of one that was removed long ago nothing is known: the call fails for that reason.
    if bundles := group.bundle_specs:
        _check(template, bundles)
    return template


def _check(template: Template, bundles: list[dict[str, float]]) -> None:
    index = template.bundle
    if not -1 <= index < len(bundles):
        raise ValueError(
            f"{template.name}: there is no bundle {index}: placement_group_bundle_index must be 0 to {len(bundles) - 1}, "
            "or -1 for any"
        )
    choice = bundles if index < 0 else [bundles[index]]
    if not any(slots(shape_of(bundle), template.resources) for bundle in choice):
        raise ValueError(
            f"{template.name} asks for {as_floats(template.resources)}, which can never fit into "
            f"{'any bundle' if index < 0 else f'bundle {index}'} of its placement group: {choice}"
        )
