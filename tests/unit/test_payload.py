"""The bytes of objects: kinds, errors, and where buffers lie."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from hpcray import payload


@given(pickle=st.binary(max_size=300), buffers=st.lists(st.binary(max_size=300), max_size=5))
def test_buffers_come_back_aligned_and_unchanged(pickle, buffers):
    parts = payload.join_buffers(pickle, [memoryview(buffer) for buffer in buffers])
    data = b"".join(parts)
    assert data[0] == payload.BUFFERS
    body, found = payload.split_buffers(memoryview(data))
    assert bytes(body) == pickle
    assert [bytes(buffer) for buffer in found] == buffers
    ends = itertools.accumulate(map(len, parts))
    starts = [end - len(part) for part, end in zip(parts, ends, strict=True) if isinstance(part, memoryview)]
    assert all(start % payload.ALIGNMENT == 0 for start in starts)


def test_buffers_are_not_copied_and_large_ones_begin_on_a_page():
    buffers = [memoryview(bytearray(size)) for size in (100, payload.LARGE, 7)]
    parts = payload.join_buffers(b"pickle", buffers)
    assert [part for part in parts if isinstance(part, memoryview)] == buffers
    assert all(any(part is buffer for part in parts) for buffer in buffers)
    before_the_large_one = parts[: next(i for i, part in enumerate(parts) if part is buffers[1])]
    assert sum(map(len, before_the_large_one)) % payload.PAGE == 0


def test_values_are_no_errors():
    assert not payload.is_error(payload.NONE)
    assert not payload.is_error(bytes([payload.RAW]))
    assert not payload.is_error(b"".join(payload.join_buffers(b"", [])))


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
