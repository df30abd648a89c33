"""Which nodes a class of tasks or actors may run on at all, by what every rank knows of all others. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hpcray.gcs.policies import demand_of, matches
from hpcray.protocol.messages import Template
from hpcray.resources import Shape, as_floats

if TYPE_CHECKING:
    from hpcray.raylet.core import NodeInfo


def suits(template: Template, rank: int, nodes: Sequence[NodeInfo]) -> bool:
    """Whether a node is one of those that a class asks for; of a preference, whether nobody can have a better one."""
    me = nodes[rank]
    if not matches(template.labels, me.labels):
        return False
    if len(nodes) == 1 and (template.node is None or template.node_is_soft):
        return True
    return template.node in (None, rank) and matches(template.liked_labels, me.labels)


def why_bound_in_vain(template: Template, nodes: Sequence[NodeInfo]) -> str:
    """Why a class that is bound to one node can never run, as a sentence for people; empty if it is not, or can."""
    if template.node is None or template.node_is_soft:
        return ""
    bound = f"{template.name} is bound to a node by NodeAffinitySchedulingStrategy(soft=False)"
    if not 0 <= template.node < len(nodes):
        return f"{bound}, but there is no such node in this job. Take one of hpcray.nodes(), or soft=True"
    node = nodes[template.node]
    shape = demand_of(template)
    if not _has(node, shape):
        most = {name: node.resources.get(name, 0) for name in shape}
        return (
            f"{bound} that has {as_floats(most)} in all, but needs {as_floats(shape)}. Ask for less, or take soft=True"
        )
    if not matches(template.labels, node.labels):
        return f"{bound} that has not the labels that it asks for, too"
    return ""


def why_infeasible(template: Template, nodes: Sequence[NodeInfo]) -> str:
    """Why no node of the job could ever run a class, as half a sentence that begins with its name; empty if one could."""
    if template.group:
        return ""  # its bundles were checked when it was called
    shape = demand_of(template)
    labelled = [node for node in nodes if matches(template.labels, node.labels)]
    if any(_has(node, shape) for node in labelled):
        return ""
    if not labelled:
        return f"{template.name} asks for labels that no node of this job has"
    most = {name: max(node.resources.get(name, 0) for node in labelled) for name in shape}
    kind = "with the labels that it asks for " if template.labels else "of this job "
    return f"{template.name} needs {as_floats(shape)}, but no node {kind}has more than {as_floats(most)}"


def _has(node: NodeInfo, shape: Shape) -> bool:
    return all(node.resources.get(name, 0) >= amount for name, amount in shape.items())
