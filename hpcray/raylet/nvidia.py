"""NVIDIA's GPUs and their MIG instances, by NVML."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from hpcray.raylet.accelerators import Device, DeviceReport, choose_by_slurm, choose_visible

_LIBRARY = "libnvidia-ml.so.1"
# Ray's pattern: "Tesla V100-SXM2-16GB" is a V100, "NVIDIA RTX PRO 6000 Blackwell" an RTX-PRO-6000.
_KIND = re.compile(r"\w+\s+((?:[A-Z]+\s+)*[A-Z0-9]*\d[A-Z0-9]*)")


class Nvidia:
    """An `Accelerator`. Where there are MIG instances, they count as GPUs in place of theirs."""

    variable = "CUDA_VISIBLE_DEVICES"

    def detect(self, env: Mapping[str, str], root: Path) -> DeviceReport:
        """See `Accelerator`. Takes milliseconds where the driver is in use, else up to seconds: it is started then."""
        try:
            ctypes.CDLL(_LIBRARY)
        except OSError:
            return DeviceReport()  # known after 0.2 ms; importing pynvml would take 30
        try:
            import pynvml
        except ImportError as error:
            return DeviceReport(problem=f"nvidia-ml-py cannot be imported: {error}")
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError_DriverNotLoaded:
            return DeviceReport(reason="the NVIDIA driver is not loaded")
        except pynvml.NVMLError as error:
            return DeviceReport(problem=f"the NVIDIA driver does not answer: {error}")
        problems: list[str] = []
        try:
            devices = list(_look(pynvml, problems))
        except pynvml.NVMLError as error:
            return DeviceReport(problem=f"the NVIDIA driver does not tell its GPUs: {error}")
        finally:
            pynvml.nvmlShutdown()
        return _report(devices, env, "; ".join(problems))


def _report(found: list[Device], env: Mapping[str, str], problem: str) -> DeviceReport:
    if (visible := env.get(Nvidia.variable)) is not None:
        chosen, told = choose_visible(found, visible), f"{Nvidia.variable}={visible}"
    else:
        chosen, told = choose_by_slurm(found, env)
    if len(chosen) == len(found):
        told = "" if found else "the NVIDIA driver knows no GPU"
    return DeviceReport(tuple(chosen), reason=told, problem=problem)


def _look(nvml: ModuleType, problems: list[str]) -> Iterator[Device]:
    for index in range(nvml.nvmlDeviceGetCount()):
        # One that has fallen off the bus takes none of the others along.
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            whole = _describe(nvml, handle, index)
            found = list(_instances(nvml, handle, whole)) if _is_split(nvml, handle) else [whole]
        except nvml.NVMLError as error:
            problems.append(f"GPU {index} does not answer: {error}")
            continue
        if not found:
            problems.append(f"GPU {index} is set to MIG, but has no instances that can be used here")
        yield from found


def _describe(nvml: ModuleType, handle: Any, index: int, whole: Device | None = None) -> Device:
    uuid, name = _text(nvml.nvmlDeviceGetUUID(handle)), _text(nvml.nvmlDeviceGetName(handle))
    return Device(
        uuid=uuid,
        id=uuid,
        index=index,
        name=name,
        memory=int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
        kind=whole.kind if whole else kind_of(name),
        file_number=whole.file_number if whole else _minor_number(nvml, handle, index),
        part_of=whole.uuid if whole else "",
    )


def _is_split(nvml: ModuleType, handle: Any) -> bool:
    try:
        current, _ = nvml.nvmlDeviceGetMigMode(handle)
    except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):
        return False
    return bool(current == nvml.NVML_DEVICE_MIG_ENABLE)


def _instances(nvml: ModuleType, handle: Any, whole: Device) -> Iterator[Device]:
    for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            instance = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
        except nvml.NVMLError_NotFound:
            continue  # numbers may have gaps
        yield _describe(nvml, instance, whole.index, whole)


def _minor_number(nvml: ModuleType, handle: Any, index: int) -> int:
    try:
        return int(nvml.nvmlDeviceGetMinorNumber(handle))
    except nvml.NVMLError_NotSupported:
        return index


def kind_of(name: str) -> str:
    """Ray's accelerator type for a product's name: ``H100`` for "NVIDIA H100 80GB HBM3"."""
    match = _KIND.match(name)
    if match and len(match[1]) > 1:
        return match[1].replace(" ", "-")
    return re.sub(r"^NVIDIA\s+", "", name).strip().replace(" ", "-")


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
