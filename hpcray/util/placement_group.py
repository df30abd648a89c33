"""Placement groups: bundles of resources that are set aside together, for tasks and actors that belong together.

A *bundle* is set aside on one node (rank). All bundles of a group are, or none; until there is room for all, the group is
pending, and what was submitted to it waits. Names and semantics are Ray's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from hpcray import ids
from hpcray.client import require_client
from hpcray.exceptions import GetTimeoutError, TaskPlacementGroupRemoved
from hpcray.labels import label_rules
from hpcray.object_ref import ObjectRef
from hpcray.protocol import messages as m
from hpcray.resources import Shape, shape_of
from hpcray.runtime_context import current_group
from hpcray.worker.serialization import serialize

STRATEGIES = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
_ID_SIZE = 18


class PlacementGroupID:
    """The id of a placement group."""

    __slots__ = ("_id",)

    def __init__(self, identifier: bytes) -> None:
        self._id = identifier

    def binary(self) -> bytes:
        return self._id

    def hex(self) -> str:
        return self._id.hex()

    def is_nil(self) -> bool:
        """Whether it is the id of no group."""
        return self._id == b"\xff" * _ID_SIZE

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PlacementGroupID) and other._id == self._id

    def __hash__(self) -> int:
        return hash(self._id)

    def __reduce__(self) -> Any:
        return PlacementGroupID, (self._id,)

    def __repr__(self) -> str:
        return f"PlacementGroupID({self.hex()})"


class PlacementGroup:
    """A handle of a placement group. It may be passed anywhere; the group lives until it is removed or its job ends."""

    def __init__(self, identifier: PlacementGroupID, bundle_cache: list[dict[str, float]] | None = None) -> None:
        self.id = identifier
        self._bundles = bundle_cache

    @staticmethod
    def empty() -> PlacementGroup:
        """The handle of no group."""
        return PlacementGroup(PlacementGroupID(b"\xff" * _ID_SIZE), [])

    @property
    def is_empty(self) -> bool:
        """Whether it is the handle of no group."""
        return self.id.is_nil()

    @property
    def bundle_specs(self) -> list[dict[str, float]]:
        """The resources of each bundle."""
        if self._bundles is None:
            known = _ask(self.id.binary())
            self._bundles = [] if known is None else [known["bundles"][i] for i in range(len(known["bundles"]))]
        return self._bundles

    @property
    def bundle_count(self) -> int:
        """How many bundles there are."""
        return len(self.bundle_specs)

    def ready(self) -> ObjectRef[PlacementGroup]:
        """A reference to this handle that comes to exist when all bundles are set aside.

        `get` raises TaskPlacementGroupRemoved if the group is removed before.
        """
        client = require_client()
        value = serialize(self)
        identifier = ids.object_id(client.new_task_id(), 0)
        return client.submit(m.AwaitPlacementGroup(identifier, self.id.binary(), value.to_bytes()), [identifier])[0]

    def wait(self, timeout_seconds: float = 30) -> bool:
        """Block until all bundles are set aside, or the time is over, or the group was removed: whether they are."""
        ref = self.ready()
        try:
            require_client().get([ref.binary()], timeout_seconds)
        except (GetTimeoutError, TaskPlacementGroupRemoved):
            return False
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PlacementGroup) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __reduce__(self) -> Any:
        return PlacementGroup, (self.id, self._bundles)

    def __repr__(self) -> str:
        return f"PlacementGroup({self.id.hex()})"


def placement_group(
    bundles: list[dict[str, float]],
    strategy: str = "PACK",
    name: str = "",
    lifetime: str | None = None,
    *,
    bundle_label_selector: Sequence[Mapping[str, str]] | None = None,
) -> PlacementGroup:
    """Ask for bundles of resources, all of them or none. Returns at once: see `PlacementGroup.ready` and `wait`.

    Args:
        bundles: Per bundle, amounts by resource: `{"CPU": 2, "GPU": 1}`; `memory` in bytes.
        strategy: PACK: on as few nodes as possible; SPREAD: on as many as possible; STRICT_PACK: on one node or not at
            all; STRICT_SPREAD: each on another node or not at all. A node is a rank.
        name: For `get_placement_group`; unique in its namespace.
        lifetime: None: until the driver's job ends; "detached": until the whole job ends.
        bundle_label_selector: Per bundle, what its node's labels must be.

    Raises:
        ValueError: A wrong bundle, strategy or lifetime.
        RaySystemError: The name is taken.
        TypeError: The name is no string.
    """
    shapes = _check_bundles(bundles)
    if not isinstance(name, str):
        raise TypeError(f"the name of a placement group must be a string, not {name!r}")
    if strategy not in STRATEGIES:
        raise ValueError(f"the strategy of a placement group must be one of {', '.join(STRATEGIES)}, not {strategy!r}")
    if lifetime not in (None, "detached"):
        raise ValueError(f"lifetime must be None or 'detached', not {lifetime!r}")
    selectors = bundle_label_selector or []
    if selectors and len(selectors) != len(bundles):
        raise ValueError(f"bundle_label_selector has {len(selectors)} entries for {len(bundles)} bundles")
    if not isinstance(name, str):
        raise TypeError(f"the name of a placement group must be a string, not {name!r}")
    rules = [label_rules(selector) for selector in selectors]
    client = require_client()
    identifier = os.urandom(_ID_SIZE)
    if name:
        client.query("claim_group_name", [client.namespace, name, identifier])
    is_detached = lifetime == "detached"
    client.send(
        m.CreatePlacementGroup(
            identifier, client.job_definition, name, client.namespace, strategy, shapes, is_detached, rules
        )
    )
    return PlacementGroup(
        PlacementGroupID(identifier), [{k: float(v) for k, v in bundle.items()} for bundle in bundles]
    )


def _check_bundles(bundles: Any) -> list[Shape]:
    if not isinstance(bundles, list):
        raise ValueError(f"bundles must be a list of dictionaries, not {type(bundles).__name__}")
    if not bundles:
        raise ValueError("a placement group needs at least one bundle: bundles is empty")
    shapes: list[Shape] = []
    for bundle in bundles:
        if not isinstance(bundle, dict):
            raise ValueError(f"a bundle must be a dictionary from resources to amounts, not {bundle!r}")
        for resource, amount in bundle.items():
            if not isinstance(resource, str) or isinstance(amount, bool) or not isinstance(amount, (int, float)):
                raise ValueError(f"a bundle maps resources to amounts, not {resource!r} to {amount!r}")
        shape = shape_of(bundle)
        if not shape:
            raise ValueError(f"a bundle must ask for something: {bundle!r} is empty or all zeros")
        shapes.append(shape)
    return shapes


def remove_placement_group(placement_group: PlacementGroup) -> None:
    """Give a group's bundles back. Does not wait. Removing a group that is gone does nothing.

    Workers in it are killed. Tasks without a retry left that ran there raise WorkerCrashedError, the others and those that
    waited TaskPlacementGroupRemoved; calls to actors there raise ActorDiedError.

    Raises:
        ValueError: None instead of a group.
    """
    if placement_group is None:
        raise ValueError("remove_placement_group needs a placement group, not None")
    require_client().send(m.RemovePlacementGroup(placement_group.id.binary()))


def get_placement_group(placement_group_name: str) -> PlacementGroup:
    """The group of this name in the driver's namespace.

    Raises:
        ValueError: There is none.
    """
    if not placement_group_name:
        raise ValueError("get_placement_group needs a name")
    client = require_client()
    known = _ask(b"", client.namespace, placement_group_name)
    if known is None:
        raise ValueError(
            f"there is no placement group named {placement_group_name!r} in namespace {client.namespace!r}"
        )
    bundles = [known["bundles"][index] for index in sorted(known["bundles"])]
    return PlacementGroup(PlacementGroupID(bytes.fromhex(known["placement_group_id"])), bundles)


def placement_group_table(placement_group: PlacementGroup | None = None) -> dict[str, Any]:
    """State, strategy, bundles and nodes of a group; of all groups, by their ids, without one."""
    if placement_group is not None:
        return _ask(placement_group.id.binary()) or {}
    return {group["placement_group_id"]: group for group in require_client().query("placement_groups", None)}


def get_current_placement_group() -> PlacementGroup | None:
    """The group that the running task or actor is in; None in drivers and where there is none."""
    group = current_group()
    return PlacementGroup(PlacementGroupID(group)) if group else None


def _ask(group: bytes, namespace: str = "", name: str = "") -> dict[str, Any] | None:
    known: dict[str, Any] | None = require_client().query("placement_group", [group, namespace, name])
    return known
