"""Frames: a batch of messages as one msgpack array; on byte streams a four-byte length goes before it.

Decoding validates every type, so a damaged or hostile frame is a `FrameError`, never an execution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from hpcray.protocol.messages import ClientMessage, PeerMessage, RayletToClient

LENGTH_SIZE = 4
MAX_STREAM_FRAME = 1 << 30
"""Bytes. Larger payloads travel through the arena; a longer length on a socket means a broken peer."""

_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode


class FrameError(ValueError):
    """The peer sent bytes that are no frame of this protocol; the connection cannot go on."""


class _Decoder:
    def __init__(self, union: Any) -> None:
        self._decode = msgspec.msgpack.Decoder(list[union]).decode

    def __call__(self, frame: bytes | bytearray | memoryview) -> list[Any]:
        try:
            return self._decode(frame)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise FrameError(f"not a frame of hpcray ({len(frame)} bytes): {error}") from error


decode_from_client = _Decoder(ClientMessage)
decode_from_raylet = _Decoder(RayletToClient)
decode_from_peer = _Decoder(PeerMessage)


def stream_frame(messages: Sequence[Any]) -> bytes:
    """A batch as it goes over a socket: four bytes of length (big-endian), then the frame."""
    return prefixed(encode(messages))


def prefixed(frame: bytes) -> bytes:
    """A frame with its length, as `split_stream` takes it apart."""
    return len(frame).to_bytes(LENGTH_SIZE, "big") + frame


def split_stream(buffer: bytearray) -> list[bytes]:
    """Take all complete frames off the front of `buffer`.

    Raises:
        FrameError: A length is beyond `MAX_STREAM_FRAME`.
    """
    frames: list[bytes] = []
    start, end = 0, len(buffer)
    while end - start >= LENGTH_SIZE:
        length = int.from_bytes(buffer[start : start + LENGTH_SIZE], "big")
        if length > MAX_STREAM_FRAME:
            raise FrameError(f"a frame of {length} bytes was announced; {MAX_STREAM_FRAME} is the limit")
        stop = start + LENGTH_SIZE + length
        if stop > end:
            break
        frames.append(bytes(buffer[start + LENGTH_SIZE : stop]))
        start = stop
    if start:
        del buffer[:start]
    return frames
