"""Enumerations over the declarations: each message survives the codec, has a tag of its own, and somebody who handles it."""

from __future__ import annotations

import inspect
import types
import typing
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hpcray.client
import hpcray.raylet.server
from hpcray.protocol import messages as m
from hpcray.protocol.codec import decode_from_client, decode_from_peer, decode_from_raylet, encode
from hpcray.testing.cluster import Cluster

UNIONS = {
    "ClientMessage": (m.ClientMessage, decode_from_client),
    "RayletToClient": (m.RayletToClient, decode_from_raylet),
    "PeerMessage": (m.PeerMessage, decode_from_peer),
}
PAIRS = [(union, kind) for union, (alias, _) in UNIONS.items() for kind in typing.get_args(alias)]
ALL = sorted({kind for _, kind in PAIRS}, key=lambda kind: kind.__name__)


def values(annotation: Any) -> st.SearchStrategy[Any]:
    """All values of a field's type."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*map(values, arguments))
    if origin is list:
        return st.lists(values(arguments[0]), max_size=3)
    if origin is tuple:
        return st.lists(values(arguments[0]), max_size=3).map(tuple)
    if origin is dict:
        return st.dictionaries(values(arguments[0]), values(arguments[1]), max_size=3)
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        return structs(annotation)
    simple: dict[Any, st.SearchStrategy[Any]] = {
        bytes: st.binary(max_size=30),
        str: st.text(max_size=10),
        int: st.integers(-(1 << 63), (1 << 64) - 1),
        bool: st.booleans(),
        float: st.floats(allow_nan=False),
        type(None): st.none(),
    }
    return simple[annotation]


def structs(kind: type) -> st.SearchStrategy[Any]:
    hints = {name: hint for name, hint in typing.get_type_hints(kind).items() if name in kind.__struct_fields__}
    return st.builds(kind, **{name: values(hint) for name, hint in hints.items()})


@pytest.mark.parametrize(("union", "kind"), PAIRS, ids=lambda value: getattr(value, "__name__", value))
@given(data=st.data())
@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_a_message_survives_the_codec(union, kind, data):
    message = data.draw(structs(kind))
    assert UNIONS[union][1](encode([message, message])) == [message, message]


def test_tags_are_unique():
    tags = [kind.__struct_config__.tag for kind in ALL]
    assert len(tags) == len(set(tags))


def test_every_declared_message_can_be_sent_to_somebody():
    declared = {kind for _, kind in inspect.getmembers(m, inspect.isclass) if issubclass(kind, m.Message)}
    assert declared - {m.Message} == set(ALL)


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_a_message_is_documented(kind):
    assert kind.__doc__
    assert not kind.__doc__.startswith(f"{kind.__name__}(")


def test_every_message_of_a_client_has_a_handler():
    core = Cluster([1]).ranks[0].core
    at_the_shell = {m.RegisterDriver, m.StopJob}
    assert set(core._from_client) | at_the_shell == set(typing.get_args(m.ClientMessage))
    assert not set(core._from_client) & at_the_shell


def test_every_message_to_a_client_has_a_handler():
    source = inspect.getsource(hpcray.client.Client)
    from_workers = {m.LaneReply}  # on a lane
    for kind in set(typing.get_args(m.RayletToClient)) - from_workers:
        assert f"m.{kind.__name__}:" in source, f"the client does not handle {kind.__name__}"


def test_every_message_between_ranks_has_exactly_one_handler():
    node = Cluster([1, 1]).ranks[0]
    assert node.gcs is not None
    of_raylet, of_gcs = set(node.core._from_peer), set(node.gcs._handlers)
    at_the_shell = {m.Shutdown}
    assert of_raylet | of_gcs | at_the_shell == set(typing.get_args(m.PeerMessage))
    assert not of_raylet & of_gcs
    assert not (of_raylet | of_gcs) & at_the_shell
    source = inspect.getsource(hpcray.raylet.server)
    assert all(f"m.{kind.__name__}" in source for kind in at_the_shell)
