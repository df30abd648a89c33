"""What makers of accelerators have in common: a device, and the variables by which launchers and users hand devices out.

A new kind of accelerator is one class with the attributes and the method of `Accelerator`, named in `detect.MAKERS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hpcray.raylet.cgroup import parse_cpu_list


@dataclass(frozen=True)
class Device:
    """An accelerator, or a part of one that counts as one (MIG).

    Attributes:
        uuid: Tells it from all others, those of other hosts included.
        id: What the maker's variable takes in this process's environment to name it.
        index: Its number, as that variable counts; parts have their device's.
        name: The product, as the maker calls it.
        memory: Bytes.
        kind: Ray's name for the product, as in ``accelerator_type:H100``; empty if it has none.
        file_number: The number in the name of its device file (3 of /dev/nvidia3), by which Slurm counts.
        part_of: UUID of the device of which it is a part.
    """

    uuid: str
    id: str
    index: int
    name: str
    memory: int
    kind: str = ""
    file_number: int = -1
    part_of: str = ""


@dataclass(frozen=True)
class DeviceReport:
    """The accelerators that this process may use.

    Attributes:
        devices: In the order in which programs number them.
        variable: The environment variable by which a process is told which to use.
        reason: Why there are none or fewer.
        problem: What ought to work and does not.
    """

    devices: tuple[Device, ...] = ()
    variable: str = "CUDA_VISIBLE_DEVICES"
    reason: str = ""
    problem: str = ""


class Accelerator(Protocol):
    """One maker's devices; each is one of the resource "GPU"."""

    @property
    def variable(self) -> str:
        """The environment variable by which a process is told which to use."""
        ...

    def detect(self, env: Mapping[str, str], root: Path) -> DeviceReport:
        """The devices that this process may use. Never raises; an empty report where the maker has no driver here.

        Args:
            env: The process's environment.
            root: Where /proc, /sys and /dev are found.
        """
        ...


def visible_entries(text: str) -> list[str]:
    """The entries of a variable such as CUDA_VISIBLE_DEVICES, up to the first that names nothing."""
    entries: list[str] = []
    for part in text.split(","):
        entry = part.strip()
        if not (entry.isdecimal() or entry.startswith(("GPU-", "MIG-"))):
            break
        entries.append(entry)
    return entries


def choose_visible(devices: Sequence[Device], text: str) -> list[Device]:
    """The devices that such a variable leaves, in its order, as CUDA reads it.

    Entries are numbers or UUIDs, whole or their beginnings; what comes after one that is wrong does not count, and with one that
    is named twice there are none. Who names a device that is in parts gets these.
    """
    chosen: list[Device] = []
    for entry in visible_entries(text):
        named = _named(devices, entry)
        if not named:
            break
        chosen += named
    return chosen if len(set(chosen)) == len(chosen) else []


def _named(devices: Sequence[Device], entry: str) -> list[Device]:
    if entry.isdecimal():
        return [device for device in devices if device.index == int(entry)]
    named = [device for device in devices if device.uuid.startswith(entry)]
    if not named:
        named = [device for device in devices if device.part_of.startswith(entry)]
        return named if len({device.part_of for device in named}) == 1 else []
    return named if len(named) == 1 else []


def choose_by_slurm(devices: Sequence[Device], env: Mapping[str, str]) -> tuple[list[Device], str]:
    """The devices that Slurm gave this step, and the variable that says so; all and "" if Slurm says nothing.

    Slurm names them by their number on the host even where the process sees fewer.
    """
    variable = next((name for name in ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS") if env.get(name)), None)
    if variable is None:
        return list(devices), ""
    told = f"{variable}={env[variable]}"
    try:
        numbers = parse_cpu_list(env[variable])
    except ValueError:
        return list(devices), ""
    by_file = [device for device in devices if device.file_number in numbers]
    return by_file or [device for device in devices if device.index in numbers], told
