"""Every setting that comes from the environment: type, unit, default, and what it trades."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Config:
    """Settings of one job, read once per process: `HPCRAY_<NAME>`."""

    inline_limit: int = 100 * 1024
    """Bytes. Objects up to this size ride in messages and live in raylets' memory; larger ones go to the arena.
    (Ray's limit. Larger: fewer arena round trips; smaller: less copying in raylets.)"""

    store_timeout: float = 30.0
    """Seconds without any room coming free in a full store, after which who waits for some gets `ObjectStoreFullError`."""

    spill_dir: str = ""
    """Directory on each node's own disk for objects that do not fit into memory (`--spill-dir`). Without it, $SLURM_TMPDIR,
    $TMPDIR or /tmp. A disk that is shared by all nodes works, and is slow for all; one in memory (tmpfs) frees none."""

    env_dir: str = ""
    """Directory on each node for what runtime environments unpack and install. Without it, a directory of the user's in
    $SLURM_TMPDIR, $TMPDIR or /tmp. (One that all nodes share: installed once for all, and slow to import from.)"""

    store_share: float = 0.3
    """Part of the memory that the job may use on a host which its ranks' object stores take there (Ray's default)."""

    dedup_logs: bool = True
    """Whether repeated lines of workers are folded at the driver."""

    fail_infeasible: bool = False
    """Whether tasks and actors that no node could ever run fail (`--fail-infeasible`), rather than wait for ever as Ray's do
    for its autoscaler."""

    bind_workers: bool = False
    """Whether each worker is bound to as many of its rank's CPUs as its task asks for (`--bind-workers`), of one memory node
    where that goes. (Bound: no migrations, memory stays near; not bound: a task may use what others leave idle.)"""

    check: bool = False
    """Whether raylets check their invariants after every turn. Slow; for tests and bug reports."""

    shutdown_grace: float = 2.0
    """Seconds between asking and killing, when processes are to end."""

    prestart: int = 2
    """Workers that each raylet starts at boot, ahead of demand (at most its CPUs)."""


def load(env: Mapping[str, str] = os.environ) -> Config:
    """The settings of this environment.

    Raises:
        ValueError: A variable does not parse; the message names it.
    """
    values: dict[str, object] = {}
    for field in fields(Config):
        name = f"HPCRAY_{field.name.upper()}"
        if (text := env.get(name)) is None:
            continue
        try:
            if field.type == "bool":
                values[field.name] = {"1": True, "0": False, "true": True, "false": False}[text.lower()]
            elif field.type == "int":
                values[field.name] = int(text)
            elif field.type == "str":
                values[field.name] = text
            else:
                values[field.name] = float(text)
        except (ValueError, KeyError):
            raise ValueError(f"the environment variable {name}={text!r} is not a valid {field.type}") from None
    return Config(**values)  # type: ignore[arg-type]
