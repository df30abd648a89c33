"""Rules on nodes' labels, as users write them. The syntax of keys and values is that of Kubernetes, as in Ray."""

from __future__ import annotations

import re
from collections.abc import Mapping

from hpcray.protocol.messages import LabelRule

_WORD = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_NAME = re.compile(_WORD)
_DNS = r"[A-Za-z0-9](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9])?"
_PREFIX = re.compile(rf"{_DNS}(?:\.{_DNS})*")
_LONGEST_PREFIX = 253  # characters, as in Kubernetes
_SELECTOR = re.compile(rf"(?P<no>!?)(?:(?P<one>{_WORD})|in\((?P<many>{_WORD}(?:, ?{_WORD})*)\))")
_HOW = "letters, digits, '-', '_' and '.', beginning and ending with a letter or digit, at most 63 characters"


def label_rules(selector: Mapping[str, str]) -> list[LabelRule]:
    """The rules of a `label_selector`: values are "v", "!v", "in(v,w)" or "!in(v,w)"; "" asks for the empty label.

    Raises:
        ValueError: A key or value has a wrong form.
        TypeError: Not a dictionary from strings to strings.
    """
    if not isinstance(selector, Mapping):
        raise TypeError(f"a label selector must be a dictionary from labels to values, not {selector!r}")
    return [_rule(key, value) for key, value in selector.items()]


def _rule(key: object, value: object) -> LabelRule:
    if not isinstance(key, str) or not isinstance(value, str):
        raise TypeError(f"a label selector must map strings to strings, not {key!r} to {value!r}")
    _check_key(key)
    if not value:
        return LabelRule(key, "in", ("",))
    parts = _SELECTOR.fullmatch(value)
    if parts is None:
        raise ValueError(
            f"Invalid label selector value {value!r} of {key!r}: it must be 'v', '!v', 'in(v,w)' or '!in(v,w)', its values {_HOW}"
        )
    values = (parts["one"],) if parts["one"] else tuple(word.strip() for word in parts["many"].split(","))
    return LabelRule(key, "not in" if parts["no"] else "in", values)


def _check_key(key: str) -> None:
    """Raise ValueError unless it can be a label's key, `name` or `prefix/name`."""
    prefix, has_prefix, name = key.rpartition("/")
    if not _NAME.fullmatch(name):
        raise ValueError(f"Invalid label key name {name!r} in {key!r}: it must be {_HOW}")
    if has_prefix and (len(prefix) > _LONGEST_PREFIX or not _PREFIX.fullmatch(prefix)):
        raise ValueError(
            f"Invalid label key prefix {prefix!r} in {key!r}: it must be words of letters, digits and '-' separated by dots, "
            f"{_LONGEST_PREFIX} characters at most"
        )
