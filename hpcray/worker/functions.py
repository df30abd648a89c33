"""Functions and classes on their way to workers: exported once under the hash of their pickle."""

from __future__ import annotations

import hashlib
import io
from collections import ChainMap
from collections.abc import Callable
from pickle import PickleBuffer
from types import CodeType
from typing import Any, ClassVar

import cloudpickle
import msgspec

from hpcray.protocol.messages import Template
from hpcray.worker.serialization import reducers

_encode = msgspec.msgpack.Encoder(order="sorted").encode


def _reduce_code(code: CodeType) -> Any:
    make, arguments = cloudpickle.Pickler.dispatch_table[CodeType](code)
    # cloudpickle leaves the file's name out; tracebacks of tasks need it to show the user's source.
    return make, tuple(code.co_filename if part == "<dynamic-code>" else part for part in arguments)


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    dispatch_table: ClassVar[Any] = ChainMap(reducers, {CodeType: _reduce_code}, cloudpickle.Pickler.dispatch_table)


def pickle_by_value(value: Any, buffer_callback: Callable[[PickleBuffer], bool] | None = None) -> bytes:
    """The pickle of a value, with functions and classes that workers cannot import inside it.

    Raises:
        Exception: Whatever pickle raises for what it cannot take.
    """
    with io.BytesIO() as file:
        _Pickler(file, 5, buffer_callback=buffer_callback).dump(value)
        return file.getvalue()


def export(function: Any) -> tuple[bytes, bytes]:
    """Id and pickle of a function or class.

    Raises:
        Exception: It captures something that cannot be pickled.
    """
    blob = pickle_by_value(function)
    return content_id(blob), blob


def content_id(blob: bytes) -> bytes:
    """The id under which a definition travels."""
    return hashlib.blake2b(blob, digest_size=16).digest()


def template_id(template: Template) -> bytes:
    """The id of a template: equal templates are one scheduling class, whoever made them."""
    return content_id(_encode(template))
