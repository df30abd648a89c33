"""AMD's GPUs, as the kernel's driver (KFD) lists them in /sys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from hpcray.raylet.accelerators import Device, DeviceReport, choose_by_slurm, choose_visible

_NODES = "sys/class/kfd/kfd/topology/nodes"
_VRAM = ("1", "2")  # heap types of a GPU's own memory: seen by the CPU, and not
# Ray's names, by PCI device id.
_KINDS = {
    0x66A1: "AMD-Instinct-MI50",
    0x738C: "AMD-Instinct-MI100",
    0x7408: "AMD-Instinct-MI250X",
    0x740C: "AMD-Instinct-MI250X-MI250",
    0x740F: "AMD-Instinct-MI210",
    0x74A0: "AMD-Instinct-MI300A",
    0x74A1: "AMD-Instinct-MI300X-OAM",
    0x74A2: "AMD-Instinct-MI308X-OAM",
    0x74A9: "AMD-Instinct-MI300X-HF",
    0x74A5: "AMD-Instinct-MI325X-OAM",
    0x75A0: "AMD-Instinct-MI350X-OAM",
    0x75A3: "AMD-Instinct-MI355X-OAM",
    0x6798: "AMD-Radeon-R9-200-HD-7900",
    0x6799: "AMD-Radeon-HD-7900",
    0x679A: "AMD-Radeon-HD-7900",
    0x679B: "AMD-Radeon-HD-7900",
}


class Amd:
    """An `Accelerator`.

    ROCR_VISIBLE_DEVICES comes first: HIP_VISIBLE_DEVICES counts what that leaves, and so do the ids of devices.
    """

    variable = "HIP_VISIBLE_DEVICES"

    def detect(self, env: Mapping[str, str], root: Path) -> DeviceReport:
        """See `Accelerator`."""
        found = list(_look(root))
        if not found:
            return DeviceReport()
        told: list[str] = []
        chosen = found
        if (visible := env.get("ROCR_VISIBLE_DEVICES")) is not None:
            chosen = choose_visible(chosen, visible)
            told.append(f"ROCR_VISIBLE_DEVICES={visible}")
        chosen = [replace(device, index=index, id=str(index)) for index, device in enumerate(chosen)]
        # HIP takes CUDA's variable for its own where the latter is not set.
        for variable in (self.variable, "CUDA_VISIBLE_DEVICES"):
            if (visible := env.get(variable)) is not None:
                chosen = choose_visible(chosen, visible)
                told.append(f"{variable}={visible}")
                break
        if not told:
            chosen, by_slurm = choose_by_slurm(chosen, env)
            told.append(by_slurm)
        reason = "" if len(chosen) == len(found) else ", ".join(told)
        return DeviceReport(tuple(chosen), variable=self.variable, reason=reason)


def _look(root: Path) -> Iterator[Device]:
    folder = root / _NODES
    nodes = sorted((path for path in folder.glob("*") if path.name.isdecimal()), key=lambda path: int(path.name))
    count = 0
    for node in nodes:
        # Those that a control group withholds cannot be read; CPUs have no GPU id.
        if _read(node / "gpu_id") in ("", "0") or not (facts := _facts(node / "properties")):
            continue
        unique, place = int(facts.get("unique_id", "0")), f"{facts.get('domain', '0')}:{facts.get('location_id', '0')}"
        kind = _KINDS.get(int(facts.get("device_id", "0")), "")
        yield Device(
            # Without a number of its own (consumer products) it is known by its place in its host.
            uuid=f"GPU-{unique:016x}" if unique else f"{_host(root)} {place}",
            id=str(count),
            index=count,
            name=kind.replace("-", " ") or _read(node / "name") or "AMD GPU",
            memory=sum(_banks(node)),
            kind=kind,
            file_number=int(facts.get("drm_render_minor", "-1")),
        )
        count += 1


def _banks(node: Path) -> Iterator[int]:
    for bank in node.glob("mem_banks/*/properties"):
        facts = _facts(bank)
        if facts.get("heap_type") in _VRAM:
            yield int(facts["size_in_bytes"])


def _facts(path: Path) -> dict[str, str]:
    return dict(line.split(maxsplit=1) for line in _read(path).splitlines() if len(line.split()) == 2)


def _host(root: Path) -> str:
    return _read(root / "proc/sys/kernel/random/boot_id")


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
