"""What `hpcray run` was asked to do: one frozen value, built by the command line and by `init()`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from hpcray.resources import shape_of

_NOTHING: Mapping[str, Any] = MappingProxyType({})

_UNITS = {
    "": 1,
    "B": 1,
    "K": 10**3,
    "KB": 10**3,
    "KIB": 2**10,
    "M": 10**6,
    "MB": 10**6,
    "MIB": 2**20,
    "G": 10**9,
    "GB": 10**9,
    "GIB": 2**30,
    "T": 10**12,
    "TB": 10**12,
    "TIB": 2**40,
}
_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)", re.ASCII)

# Resources with an option of their own; a custom resource may not take their names.
_RESERVED = {
    "CPU": "num_cpus (--num-cpus)",
    "GPU": "num_gpus (--num-gpus)",
    "memory": "the memory of the host",
    "object_store_memory": "object_store_memory (--object-store-memory)",
}
# Kubernetes' rules for labels, as in Ray.
_LABEL_PART = r"[a-zA-Z0-9]([a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
_LABEL_KEY = re.compile(rf"((?=.{{1,253}}/){_LABEL_PART}/)?{_LABEL_PART}")
_LABEL_VALUE = re.compile(rf"({_LABEL_PART})?")


@dataclass(frozen=True)
class JobOptions:
    """How to start a job. ``None`` always means: detect it, or use the default.

    Attributes:
        script: The driver's whole command line (``[python, *flags, script, *args]``), or None for a job
            that stays up and waits for drivers to attach.
        num_cpus: CPUs that each rank offers.
        num_gpus: GPUs that each rank offers, of those that it sees.
        resources: Custom resources that each rank offers, by name.
        labels: Labels of each rank's node, by key.
        object_store_memory: Bytes of each rank's arena.
        head_cpus: CPUs that rank 0 offers, whatever else runs on its host.
        spill_dir: Directory on each node's own disk for objects that do not fit into memory.
        log_dir: Directory for the job's full logs; None keeps no files.
        bind_workers: Whether each worker runs on CPUs of its own.
        fail_infeasible: Whether tasks and actors fail that no node could ever run.
        log_to_driver: Whether what workers print appears at the driver.
        namespace: The driver's namespace for named actors.
        as_ray: Whether `import ray` means hpcray in the script and its workers.
    """

    script: list[str] | None = None
    num_cpus: float | None = None
    num_gpus: int | None = None
    resources: Mapping[str, float] = field(default_factory=lambda: _NOTHING)
    labels: Mapping[str, str] = field(default_factory=lambda: _NOTHING)
    object_store_memory: int | None = None
    head_cpus: float | None = None
    spill_dir: str | None = None
    log_dir: str | None = None
    bind_workers: bool = False
    fail_infeasible: bool = False
    log_to_driver: bool = True
    namespace: str | None = None
    as_ray: bool = False


def job_arguments(options: JobOptions) -> list[str]:
    """The command-line options (without the script) from which `hpcray run` makes these options again."""
    arguments: list[str] = []
    for name, value in (
        ("--num-cpus", options.num_cpus),
        ("--num-gpus", options.num_gpus),
        ("--resources", json.dumps(dict(options.resources)) if options.resources else None),
        ("--labels", json.dumps(dict(options.labels)) if options.labels else None),
        ("--object-store-memory", options.object_store_memory),
        ("--head-cpus", options.head_cpus),
        ("--namespace", options.namespace),
        ("--spill-dir", options.spill_dir),
        ("--log-dir", options.log_dir),
    ):
        if value is not None:
            arguments += [name, str(value)]
    if options.bind_workers:
        arguments.append("--bind-workers")
    if options.fail_infeasible:
        arguments.append("--fail-infeasible")
    if not options.log_to_driver:
        arguments.append("--no-log-to-driver")
    if options.as_ray:
        arguments.append("--as-ray")
    return arguments


def interpreter_flags(orig_argv: Sequence[str]) -> list[str]:
    """Python's own options (``-u``, ``-X dev``, …) in a ``sys.orig_argv``; the script runs under them too."""
    flags: list[str] = []
    rest = iter(orig_argv[1:])
    for argument in rest:
        if not argument.startswith("-") or argument == "-":
            break
        if argument in ("-W", "-X", "--check-hash-based-pycs"):
            flags += [argument, next(rest, "")]
        elif argument.startswith(("-W", "-X", "--")):
            flags.append(argument)
        else:
            # A cluster such as -Im: what follows the m (or c) is the program, not an option.
            options = re.split("[mc]", argument, maxsplit=1)[0]
            if options != "-":
                flags.append(options)
            if options != argument:
                break
    return flags


def parse_size(text: str) -> int:
    """Bytes for ``200MB`` (decimal), ``4GiB`` (binary), ``1.5G`` or a bare number.

    Raises:
        ValueError: Not a size, or less than one byte.
    """
    match = _SIZE.fullmatch(text.strip())
    factor = _UNITS.get(match[2].upper()) if match else None
    if match is None or factor is None:
        raise ValueError(f"{text!r} is not a size; write for example 200MB, 4GiB or a number of bytes")
    size = int(float(match[1]) * factor) if "." in match[1] else int(match[1]) * factor
    if size < 1:
        raise ValueError(f"{text!r} is less than one byte")
    return size


def parse_amount(text: str) -> float:
    """A number of CPUs, as an int where it is whole.

    Raises:
        ValueError: Not a finite number >= 0.
    """
    try:
        amount = float(text)
    except ValueError:
        amount = math.nan
    if not math.isfinite(amount) or amount < 0:
        raise ValueError(f"{text!r} is not a number >= 0")
    return int(amount) if amount.is_integer() else amount


def parse_count(text: str) -> int:
    """A number of GPUs.

    Raises:
        ValueError: Not a whole number >= 0.
    """
    if not (text.isascii() and text.isdecimal()):
        raise ValueError(f"{text!r} is not a whole number >= 0")
    return int(text)


def parse_resources(text: str) -> dict[str, float]:
    """Custom resources from a JSON object such as ``{"licence": 2}``.

    Raises:
        ValueError: Not a JSON object of names and numbers >= 0, or a name that hpcray uses itself.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error}); write for example '{{\"licence\": 2}}'") from None
    if not isinstance(value, dict):
        raise ValueError(f"must be a JSON object such as '{{\"licence\": 2}}', not {text}")
    check_resources(value)
    return {name: float(amount) for name, amount in value.items()}


def check_resources(resources: Mapping[Any, Any]) -> None:
    """Refuse what cannot be a node's custom resources.

    Raises:
        ValueError: A name that is empty or hpcray's own, or an amount that is not a finite number >= 0.
    """
    for name, amount in resources.items():
        if not isinstance(name, str) or not name:
            raise ValueError(f"a resource needs a name, not {name!r}")
        if name in _RESERVED:
            raise ValueError(f"{name!r} is not a custom resource; it comes from {_RESERVED[name]}")
        if name.startswith("node:"):
            raise ValueError(f"{name!r} is not a custom resource; every node has its own")
        if isinstance(amount, bool) or not isinstance(amount, int | float) or not math.isfinite(amount):
            raise ValueError(f"the amount of {name!r} must be a number, not {json.dumps(amount, default=repr)}")
        if amount < 0:
            raise ValueError(f"the amount of {name!r} must not be negative: {amount}")
        shape_of({name: amount})


def parse_labels(text: str) -> dict[str, str]:
    """Labels from ``key=value,key=value`` or a JSON object.

    Raises:
        ValueError: Neither, or not what a label may be.
    """
    labels: dict[str, Any] = {}
    if text.lstrip().startswith("{"):
        try:
            labels = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON ({error}); write for example rack=7,kind=fast") from None
    else:
        for pair in filter(None, text.split(",")):
            key, equals, value = pair.partition("=")
            if not equals:
                raise ValueError(f"{pair!r} is not a label; write for example rack=7,kind=fast")
            labels[key.strip()] = value.strip()
    check_labels(labels)
    return labels


def check_labels(labels: Mapping[Any, Any]) -> None:
    """Refuse what cannot be a node's labels. The rules are those of Kubernetes, as in Ray.

    Raises:
        ValueError: A key or value that is none, or a key that hpcray sets itself.
    """
    for key, value in labels.items():
        if not isinstance(key, str) or not _LABEL_KEY.fullmatch(key):
            raise ValueError(
                f"{key!r} is not the key of a label: up to 63 letters, digits, '-', '_' and '.', the first and last a letter or "
                "digit, perhaps after a domain and '/'"
            )
        if key == "ray.io/node-id" or key.startswith("hpcray/"):
            raise ValueError(f"the label {key!r} is set by hpcray itself")
        if not isinstance(value, str) or not _LABEL_VALUE.fullmatch(value):
            raise ValueError(
                f"{value!r} is not a value of the label {key!r}: up to 63 letters, digits, '-', '_' and '.', the first and last "
                "a letter or digit"
            )


_VARIABLES: Mapping[str, Callable[[str], Any]] = {
    "num_cpus": parse_amount,
    "num_gpus": parse_count,
    "head_cpus": parse_amount,
    "object_store_memory": parse_size,
    "resources": parse_resources,
    "labels": parse_labels,
}
"""Options that the environment may give, too, as HPCRAY_NUM_CPUS and so on, in the form of the command line."""


def with_environment(options: JobOptions, env: Mapping[str, str]) -> JobOptions:
    """These options, and for what they leave open those of this rank's environment; resources and labels are merged.

    Raises:
        ValueError: A variable that counts does not parse; the message names it.
    """
    found: dict[str, Any] = {}
    for name, parse in _VARIABLES.items():
        present = getattr(options, name)
        if not (text := env.get(variable := f"HPCRAY_{name.upper()}")) or not (
            present is None or isinstance(present, Mapping)
        ):
            continue
        try:
            value = parse(text)
        except ValueError as error:
            raise ValueError(f"the environment variable {variable}: {error}") from None
        found[name] = {**value, **present} if isinstance(present, Mapping) else value
    return replace(options, **found)
