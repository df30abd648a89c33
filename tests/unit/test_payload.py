"""The bytes of objects: kinds, errors, and where buffers lie."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hpcray import payload


@given(pickle=st.binary(max_size=300), parts=st.lists(st.binary(max_size=300), max_size=5))
def test_buffers_come_back_aligned_and_unchanged(pickle, parts):
    layout = payload.Layout(pickle, [memoryview(part) for part in parts])
    data = layout.to_bytes()
    assert len(data) == layout.size
    assert data[0] == payload.BUFFERS
    body, buffers = payload.split_buffers(memoryview(data))
    assert bytes(body) == pickle
    assert [bytes(buffer) for buffer in buffers] == parts
    assert all(offset % payload.ALIGNMENT == 0 for offset in layout.offsets)


def test_a_layout_writes_into_memory_that_is_larger():
    layout = payload.Layout(b"pickle", [memoryview(b"buffer")])
    target = bytearray(layout.size + 100)
    layout.write(memoryview(target))
    assert bytes(target[: layout.size]) == layout.to_bytes()
    assert not any(target[layout.size :])


def test_values_are_no_errors():
    assert not payload.is_error(payload.NONE)
    assert not payload.is_error(bytes([payload.RAW]))
    assert not payload.is_error(payload.Layout(b"", []).to_bytes())


def test_system_errors_say_class_and_arguments():
    error = payload.system_error("ObjectLostError", "text", 7)
    assert payload.is_error(error)
    assert payload.describe_system_error(error) == ("ObjectLostError", ["text", 7])


def test_errors_of_arguments_hold_the_error():
    inner = payload.system_error("ObjectLostError", "text")
    error = payload.dependency_error("f", inner)
    assert payload.is_error(error)
    assert payload.describe_dependency_error(error) == ("f", inner)


def test_errors_of_creations_hold_the_error():
    inner = payload.system_error("ObjectLostError", "text")
    error = payload.creation_error(b"x" * 24, "A", inner)
    assert payload.is_error(error)
    assert payload.describe_creation_error(error)[1:] == ("A", inner)


def test_the_death_of_an_actor_names_class_and_reason():
    name, (text, *_) = payload.describe_system_error(payload.actor_died(b"x" * 24, "Counter", "it was tired."))
    assert name == "ActorDiedError"
    assert "(Counter) died: it was tired." in text
