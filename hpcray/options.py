"""The options of remote functions and actors: names, types and defaults are Ray's."""

from __future__ import annotations

import difflib
import math
import pickle
from collections.abc import Mapping
from typing import Any

from hpcray.environments.wanted import Environment
from hpcray.labels import label_rules
from hpcray.protocol.messages import ActorOptions, Template
from hpcray.resources import Shape, shape_of
from hpcray.runtime_context import NOWHERE, Surroundings
from hpcray.runtime_env import parse
from hpcray.strategies import check_group_options, check_strategy, strategy_fields

_NUMBER = (int, float)
_COMMON: dict[str, tuple[type, ...]] = {
    "num_cpus": _NUMBER,
    "num_gpus": _NUMBER,
    "memory": _NUMBER,
    "accelerator_type": (str,),
    "resources": (dict,),
    "name": (str,),
    "scheduling_strategy": (object,),
    "label_selector": (dict,),
    "placement_group": (object,),
    "placement_group_bundle_index": (int,),
    "placement_group_capture_child_tasks": (bool,),
    "runtime_env": (object,),
}
_OF_TASKS: dict[str, tuple[type, ...]] = {
    **_COMMON,
    "num_returns": (int,),
    "max_retries": (int,),
    "retry_exceptions": (bool, list, tuple),
}
_OF_ACTORS: dict[str, tuple[type, ...]] = {
    **_COMMON,
    "namespace": (str,),
    "lifetime": (str,),
    "max_restarts": (int,),
    "max_task_retries": (int,),
    "get_if_exists": (bool,),
}
_OF_METHODS: dict[str, tuple[type, ...]] = {"num_returns": (int,), "name": (str,)}
OPTIONS = {"functions": frozenset(_OF_TASKS), "actors": frozenset(_OF_ACTORS)}
"""Names of options by what they are for."""


def check_task_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse what a remote function cannot be told; the options as they are kept.

    Raises:
        ValueError: An unknown name or impossible value.
        TypeError: A value of a wrong type.
    """
    checked = _check(options, _OF_TASKS, "remote functions")
    if (retry := options.get("retry_exceptions")) and not isinstance(retry, bool):
        for cls in retry:
            if not (isinstance(cls, type) and issubclass(cls, BaseException)):
                raise ValueError(f"retry_exceptions must list exception classes, not {cls!r}")
    return checked


def check_actor_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse what an actor class cannot be told; as `check_task_options`."""
    checked = _check(options, _OF_ACTORS, "actors")
    if options.get("lifetime") not in (None, "detached", "non_detached"):
        raise ValueError(f"lifetime must be 'detached', 'non_detached' or None, not {options['lifetime']!r}")
    for key in ("name", "namespace"):
        if options.get(key) == "":
            raise ValueError(f"an actor's {key} must not be the empty string")
    if options.get("get_if_exists") and not options.get("name"):
        raise ValueError("get_if_exists needs a name")
    return checked


def check_method_options(options: Mapping[str, Any]) -> None:
    """Refuse what a method call cannot be told; as `check_task_options`, but TypeError for unknown names."""
    for key in options:
        if key not in _OF_METHODS:
            raise TypeError(f"{key!r} is not an option of actor methods; valid are {sorted(_OF_METHODS)}")
    _check(options, _OF_METHODS, "actor methods")


def _check(options: Mapping[str, Any], known: Mapping[str, tuple[type, ...]], kind: str) -> dict[str, Any]:
    checked = dict(options)
    for key, value in options.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{key!r} is not an option of {kind}.{hint} Valid are {sorted(known)}.")
        if value is None:
            continue
        types = known[key]
        if not _is_one_of(value, types):
            names = " or ".join(cls.__name__ for cls in types)
            raise TypeError(f"the option {key!r} must be {names}, not {type(value).__name__}: {value!r}")
        if key in ("num_cpus", "num_gpus", "memory"):
            _check_amount(key, value)
        elif key == "resources":
            _check_resources(value)
        elif key == "scheduling_strategy":
            check_strategy(value)
        elif key == "label_selector":
            label_rules(value)
        elif key == "num_returns" and value < 0:
            raise ValueError(f"num_returns must be zero or more, not {value}")
        elif key.startswith("max_") and value < -1:
            raise ValueError(f"{key} must be -1 (for ever), zero or more, not {value}")
        elif key == "runtime_env":
            checked[key] = parse(value)
    check_group_options(options)
    if not checked.get("runtime_env"):
        checked.pop("runtime_env", None)  # as if it were not given: what it would replace stays
    return checked


def _is_one_of(value: Any, types: tuple[type, ...]) -> bool:
    # To Python, True is an int.
    return isinstance(value, types) and (not isinstance(value, bool) or bool in types or object in types)


def _check_amount(name: str, value: float) -> None:
    if math.isnan(value) or value < 0:
        raise ValueError(f"the quantity of resource {name} cannot be negative: {value!r}")
    shape_of({name: value})


def _check_resources(resources: Mapping[Any, Any]) -> None:
    for name, amount in resources.items():
        if not isinstance(name, str) or not isinstance(amount, (int, float)):
            raise TypeError(f"resources must map names to numbers, not {name!r} to {amount!r}")
        if name in ("CPU", "GPU"):
            raise ValueError(f"use num_{name.lower()}s= instead of {name!r} in resources")
        if name == "memory":
            raise ValueError("use memory= instead of 'memory' in resources")
        if name == "object_store_memory":
            raise ValueError("resources cannot hold 'object_store_memory': object stores are shared by all")
        _check_amount(name, amount)


def _shape(options: Mapping[str, Any], cpus: float) -> Shape:
    amounts = {**(options.get("resources") or {})}
    amounts["CPU"] = cpus if options.get("num_cpus") is None else options["num_cpus"]
    amounts["GPU"] = options.get("num_gpus") or 0
    amounts["memory"] = options.get("memory") or 0
    if kind := options.get("accelerator_type"):
        amounts[f"accelerator_type:{kind}"] = 0.001  # so little, as in Ray, that it never runs out
    return shape_of(amounts)


def _retry_exceptions(value: Any) -> bytes | None:
    if not value:
        return None
    return b"" if value is True else pickle.dumps(tuple(value))


def task_template(
    job: bytes,
    function: bytes,
    name: str,
    options: Mapping[str, Any],
    environment: Environment,
    caller: Surroundings = NOWHERE,
) -> Template:
    """The template of a remote function with checked options.

    Raises:
        ValueError: The placement group has no such bundle, or none that is large enough.
    """
    resources = _shape(options, 1)
    retries = options.get("max_retries")
    returns = options.get("num_returns")
    return Template(
        job=job,
        function=function,
        name=options.get("name") or name,
        num_returns=1 if returns is None else returns,
        resources=resources,
        max_retries=3 if retries is None else retries,
        retry_exceptions=_retry_exceptions(options.get("retry_exceptions")),
        environment=environment.id,
        packages=list(environment.packages),
        **strategy_fields(options, name, resources, {}, caller),
    )


def actor_template(
    job: bytes,
    cls: bytes,
    name: str,
    options: Mapping[str, Any],
    environment: Environment,
    caller: Surroundings = NOWHERE,
) -> Template:
    """The template of an actor class with checked options.

    One that asks for GPUs or custom resources has a CPU unless `num_cpus` says otherwise; one that asks for nothing needs one
    to be placed, and none to run (Ray's rules).

    Raises:
        ValueError: As `task_template`.
    """
    asks = any(options.get(name) is not None for name in ("num_gpus", "resources"))
    running = _shape(options, 1 if asks else 0)
    placement = {} if options.get("num_cpus") is not None else {**running, "CPU": shape_of({"CPU": 1})["CPU"]}
    return Template(
        job=job,
        function=cls,
        name=name,
        num_returns=0,
        resources=running,
        max_retries=0,
        actor=ActorOptions(
            max_restarts=options.get("max_restarts") or 0,
            max_task_retries=options.get("max_task_retries") or 0,
            placement=placement,
            name=options.get("name") or "",
        ),
        environment=environment.id,
        packages=list(environment.packages),
        **strategy_fields(options, name, running, placement, caller),
    )
