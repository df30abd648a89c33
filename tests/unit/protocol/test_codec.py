"""Frames: whatever is no frame is a `FrameError`, and a stream may be cut anywhere."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcray.protocol import messages as m
from hpcray.protocol.codec import (
    LENGTH_SIZE,
    MAX_STREAM_FRAME,
    FrameError,
    decode_from_client,
    decode_from_peer,
    decode_from_raylet,
    encode,
    split_stream,
    stream_frame,
)

DECODERS = [decode_from_client, decode_from_raylet, decode_from_peer]
BATCH = [m.Release([b"x" * 28]), m.Get([b"y" * 28, b"z" * 28], blocks=True), m.Unblocked()]
pure = settings(deadline=None, derandomize=True, max_examples=200)


def test_a_batch_keeps_its_order():
    assert decode_from_client(encode(BATCH)) == BATCH


def test_an_empty_batch_is_a_frame():
    assert decode_from_peer(encode([])) == []


@pytest.mark.parametrize("cut", range(len(encode(BATCH))))
def test_a_truncated_frame_is_an_error(cut):
    with pytest.raises(FrameError):
        decode_from_client(encode(BATCH)[:cut])


def test_trailing_bytes_are_an_error():
    with pytest.raises(FrameError):
        decode_from_client(encode(BATCH) + b"\0")


@pytest.mark.parametrize("decode", DECODERS)
@given(data=st.binary(max_size=200))
@pure
def test_random_bytes_are_an_error_or_a_batch(decode, data):
    try:
        batch = decode(data)
    except FrameError:
        return
    assert isinstance(batch, list)


@given(position=st.integers(0, 200), value=st.integers(0, 255))
@pure
def test_a_damaged_byte_is_an_error_or_another_batch(position, value):
    frame = bytearray(encode(BATCH))
    frame[position % len(frame)] = value
    try:
        batch = decode_from_client(frame)
    except FrameError:
        return
    assert isinstance(batch, list)


@pytest.mark.parametrize(
    "wrong",
    [
        [[999]],  # no such tag
        [[15, "not a list"]],
        [[15, [1, 2, 3]]],  # ids are bytes
        [[15]],  # a field is missing
        {"a": 1},
        None,
        7,
    ],
)
def test_frames_of_wrong_types_are_errors(wrong):
    with pytest.raises(FrameError):
        decode_from_client(msgspec.msgpack.encode(wrong))


def test_a_message_of_another_direction_is_an_error():
    with pytest.raises(FrameError):
        decode_from_client(encode([m.Exit()]))
    with pytest.raises(FrameError):
        decode_from_raylet(encode([m.Release([])]))


@given(cuts=st.lists(st.integers(0, 120), max_size=6), count=st.integers(1, 4))
@pure
def test_a_stream_may_be_cut_anywhere(cuts, count):
    stream = stream_frame(BATCH) * count
    buffer, received, last = bytearray(), [], 0
    for cut in [*sorted(cut for cut in cuts if cut < len(stream)), len(stream)]:
        buffer += stream[last:cut]
        last = cut
        received += split_stream(buffer)
    assert [decode_from_client(frame) for frame in received] == [BATCH] * count
    assert not buffer


def test_an_oversized_frame_is_refused_before_it_is_read():
    with pytest.raises(FrameError, match="is the limit"):
        split_stream(bytearray((MAX_STREAM_FRAME + 1).to_bytes(LENGTH_SIZE, "big")))


def test_the_largest_frame_is_waited_for():
    buffer = bytearray(MAX_STREAM_FRAME.to_bytes(LENGTH_SIZE, "big"))
    assert split_stream(buffer) == []
    assert len(buffer) == LENGTH_SIZE
