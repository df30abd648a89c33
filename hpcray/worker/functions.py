"""Functions and classes on their way to workers: exported once under the hash of their pickle."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from hpcray.protocol.messages import Template

_encode = msgspec.msgpack.Encoder(order="sorted").encode


def export(function: Any) -> tuple[bytes, bytes]:
    """Id and pickle of a function or class.

    Raises:
        Exception: It captures something that cannot be pickled.
    """
    import cloudpickle

    blob: bytes = cloudpickle.dumps(function)
    return content_id(blob), blob


def content_id(blob: bytes) -> bytes:
    """The id under which a definition travels."""
    return hashlib.blake2b(blob, digest_size=16).digest()


def template_id(template: Template) -> bytes:
    """The id of a template: equal templates are one scheduling class, whoever made them."""
    return content_id(_encode(template))
