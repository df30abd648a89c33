"""Counters, gauges and histograms of the user's own. Names and checks are Ray's.

Values are kept in the process that records them, and are exported nowhere: there is no metrics agent in an MPI job. Programs that
record run unchanged; one that wants to see values calls `recorded()` in the same process.
"""

from __future__ import annotations

import re
import threading
import warnings
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

__all__ = ["Counter", "Gauge", "Histogram"]

_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")  # Prometheus'

_Key = tuple[str, tuple[tuple[str, str], ...]]
_lock = threading.Lock()
_values: dict[_Key, Any] = {}
"""By name and tags: a number, or a histogram's counts per bucket."""


def recorded() -> dict[str, dict[tuple[tuple[str, str], ...], Any]]:
    """What this process has recorded, by name and by (sorted) tags: a number; for histograms, a count for each bucket."""
    found: dict[str, dict[tuple[tuple[str, str], ...], Any]] = {}
    with _lock:
        for (name, tags), value in _values.items():
            found.setdefault(name, {})[tags] = list(value) if isinstance(value, list) else value
    return found


class Metric:
    """What all kinds share.

    Args:
        name: Letters, digits, `_`. With another, a warning is given and nothing is recorded.
        description: For people.
        tag_keys: Tags that each record must have.

    Raises:
        ValueError: The name is empty.
        TypeError: `tag_keys` is not a tuple of strings.
    """

    def __init__(self, name: str, description: str = "", tag_keys: tuple[str, ...] | None = None) -> None:
        if not name:
            raise ValueError("Empty name is not allowed. Please provide a metric name.")
        self._is_valid = _NAME.fullmatch(name) is not None
        if not self._is_valid:
            warnings.warn(
                f"Invalid metric name: {name}. Metric will be discarded and data will not be collected. Metric names can only "
                "contain letters, numbers, _, and :, and cannot start with numbers.",
                UserWarning,
                stacklevel=3,
            )
        if tag_keys is not None and not isinstance(tag_keys, tuple):
            raise TypeError(f"tag_keys should be a tuple type, got: {type(tag_keys)}")
        for key in tag_keys or ():
            if not isinstance(key, str):
                raise TypeError(f"Tag keys must be str, got {type(key)}.")
        self._name = name
        self._description = description
        self._tag_keys = tag_keys or ()
        self._default_tags: dict[str, str] = {}

    def set_default_tags(self, default_tags: dict[str, str]) -> Metric:
        """Tags for all records that do not say otherwise; returns the metric itself.

        Raises:
            ValueError: A key that is not in `tag_keys`.
            TypeError: A value that is no string.
        """
        for key, value in default_tags.items():
            if key not in self._tag_keys:
                raise ValueError(f"Unrecognized tag key {key}.")
            _check_tag(value)
        self._default_tags = default_tags
        return self

    @property
    def info(self) -> dict[str, Any]:
        """Name, description, tag keys and default tags."""
        return {
            "name": self._name,
            "description": self._description,
            "tag_keys": self._tag_keys,
            "default_tags": self._default_tags,
        }

    def _key(self, tags: dict[str, str] | None) -> _Key | None:
        """Where a record goes; None: nowhere.

        Raises:
            ValueError: A tag of `tag_keys` is missing.
            TypeError: A tag is no string.
        """
        if not self._is_valid:
            return None
        for value in (tags or {}).values():
            _check_tag(value)
        together = {**self._default_tags, **(tags or {})}
        if missing := [key for key in self._tag_keys if key not in together]:
            raise ValueError(f"Missing value for tag key(s): {','.join(missing)}.")
        return self._name, tuple(sorted(together.items()))

    def __reduce__(self) -> Any:
        return type(self), (self._name, self._description, self._tag_keys)


class Counter(Metric):
    """A sum that only grows."""

    def inc(self, value: float = 1.0, tags: dict[str, str] | None = None) -> None:
        """Add a value.

        Raises:
            TypeError: Not a number.
            ValueError: Not above 0; and as for `Metric` about tags.
        """
        _check_number(value)
        if value <= 0:
            raise ValueError(f"value must be >0, got {value}")
        if (key := self._key(tags)) is not None:
            with _lock:
                _values[key] = _values.get(key, 0.0) + value


class Gauge(Metric):
    """The value that was set last."""

    def set(self, value: float | None, tags: dict[str, str] | None = None) -> None:
        """Set the value; None changes nothing. Raises as `Counter.inc`."""
        if value is None:
            return
        _check_number(value)
        if (key := self._key(tags)) is not None:
            with _lock:
                _values[key] = value


class Histogram(Metric):
    """How many values lie between which boundaries.

    Args:
        name: As for `Metric`.
        description: Likewise.
        boundaries: Upper bounds of the buckets, rising; above the last is one more.
        tag_keys: As for `Metric`.

    Raises:
        ValueError: No boundaries, or one that is not above 0.
    """

    def __init__(
        self,
        name: str,
        description: str = "",
        boundaries: Sequence[float] | None = None,
        tag_keys: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__(name, description, tag_keys)
        if not boundaries:
            raise ValueError(
                "boundaries argument should be provided when using the Histogram class. e.g., "
                'Histogram("name", boundaries=[1.0, 2.0])'
            )
        for index, boundary in enumerate(boundaries):
            if boundary <= 0:
                raise ValueError(
                    f"Invalid `boundaries` argument at index {index}, {boundaries}. Use positive values for the arguments."
                )
        self.boundaries = boundaries

    def observe(self, value: float, tags: dict[str, str] | None = None) -> None:
        """Count a value. Raises as `Counter.inc`."""
        _check_number(value)
        if (key := self._key(tags)) is not None:
            with _lock:
                counts = _values.setdefault(key, [0] * (len(self.boundaries) + 1))
                counts[bisect_left(self.boundaries, value)] += 1

    @property
    def info(self) -> dict[str, Any]:
        """As that of `Metric`, and the boundaries."""
        return {**super().info, "boundaries": self.boundaries}

    def __reduce__(self) -> Any:
        return Histogram, (self._name, self._description, self.boundaries, self._tag_keys)


def _check_number(value: Any) -> None:
    if not isinstance(value, (int, float)):
        raise TypeError(f"value must be int or float, got {type(value)}.")


def _check_tag(value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(f"Tag values must be str, got {type(value)}.")
