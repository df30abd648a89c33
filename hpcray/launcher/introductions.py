"""Who each rank is and what it may use, as it tells all others at boot; and the job's nodes, which follow from that.

All ranks make the same nodes, since each makes them from what everybody said.
"""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

import hpcray
from hpcray.ids import new_nonce, node_id
from hpcray.launcher.options import JobOptions
from hpcray.launcher.roles import offers_cpus, offers_gpus
from hpcray.raylet.accelerators import DeviceReport, visible_entries
from hpcray.raylet.cgroup import read_limits
from hpcray.raylet.core import NodeInfo
from hpcray.raylet.detect import detect_cpus, detect_devices, detect_memory
from hpcray.raylet.sharing import RankMask, RankMemory, share_cpus, share_gpus, share_memory
from hpcray.resources import shape_of


class SeenGpu(msgspec.Struct, frozen=True):
    """A GPU that a rank may use: see `Device`."""

    uuid: str
    id: str
    kind: str = ""


class Introduction(msgspec.Struct):
    """What each rank tells all others at boot. Versions come first: all else is read only if they agree."""

    version: str
    python: str
    host: str
    machine: str
    """Which ranks can map each other's memory: host, boot and network namespace."""
    pid: int
    affinity: list[int]
    cpus_on_host: int
    """How many CPUs the job may use on this host."""
    cpus_of_rank: int | None
    """How many this rank may use, where the launcher says so."""
    memory: int
    """Bytes that the job may use on this host."""
    gpus: list[SeenGpu] | None
    """None: it does not know which GPUs there are."""
    gpu_variable: str
    num_cpus: float | None
    """How many it was asked to offer, as `num_gpus`, `head_cpus` and `store` (bytes, 0: not asked)."""
    num_gpus: int | None
    head_cpus: float | None
    resources: dict[str, float]
    labels: dict[str, str]
    switch: list[str]
    """The switches that lead to its host, outermost first, where Slurm tells."""
    doorbell: bytes
    nonce: bytes
    store: int


def introduce(options: JobOptions, env: Mapping[str, str], doorbell: bytes = b"") -> Introduction:
    """This process as a rank. Asks the drivers of GPUs unless it is to offer none.

    Args:
        options: What was asked of this rank.
        env: Its environment.
        doorbell: By which the other ranks of its host wake it.
    """
    limits = read_limits()
    cpus = detect_cpus(env, os.sched_getaffinity(0), limits=limits)
    machine = _machine()
    devices = DeviceReport() if options.num_gpus == 0 else detect_devices(env)
    return Introduction(
        version=hpcray.__version__,
        python=platform.python_version(),
        host=socket.gethostname(),
        machine=machine,
        pid=os.getpid(),
        affinity=sorted(cpus.affinity),
        cpus_on_host=cpus.shared,
        cpus_of_rank=cpus.slurm_per_task,
        memory=detect_memory(env, limits=limits).usable,
        gpus=_seen_gpus(options, devices, env, machine),
        gpu_variable=devices.variable,
        num_cpus=options.num_cpus,
        num_gpus=options.num_gpus,
        head_cpus=options.head_cpus,
        resources=dict(options.resources),
        labels=dict(options.labels),
        switch=env.get("SLURM_TOPOLOGY_ADDR", "").split(".")[:-1],  # "spine.leaf.node"
        doorbell=doorbell,
        nonce=new_nonce(),
        store=options.object_store_memory or 0,
    )


def _seen_gpus(
    options: JobOptions, devices: DeviceReport, env: Mapping[str, str], machine: str
) -> list[SeenGpu] | None:
    if devices.devices:
        return [SeenGpu(device.uuid, device.id, device.kind) for device in devices.devices]
    visible = env.get(devices.variable)
    if not options.num_gpus or visible is None:
        return None
    # No driver tells of them, but whoever set the variable knows their names.
    return [SeenGpu(f"{machine} {entry}", entry) for entry in visible_entries(visible)]


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()} {boot} {Path('/proc/self/ns/net').stat().st_ino} {Path('/proc/self/ns/pid').stat().st_ino}"


def make_nodes(everybody: Sequence[Introduction], store_share: float) -> list[NodeInfo]:
    """The nodes of a job of these ranks, in their order. Pure.

    Args:
        everybody: What each rank said of itself.
        store_share: Part of a host's memory for its ranks' object stores.

    Raises:
        ValueError: A rank was asked to offer more than there is; the text has the figures.
    """
    machines = [one.machine for one in everybody]
    own_cpus = _deal_cpus(everybody, machines)
    gpus = _deal_gpus(everybody, machines)
    memories = _deal_memory(everybody, machines, store_share)
    nodes: list[NodeInfo] = []
    for rank, one in enumerate(everybody):
        memory, known = memories[rank], gpus[rank].known
        kind = known[0].kind if known else ""  # as in Ray, the first one's speaks for all
        amounts = {
            **one.resources,
            "CPU": _cpus_offered(rank, everybody, own_cpus.get(rank)),
            "GPU": gpus[rank].count,
            "memory": memory.total - memory.store,
            "object_store_memory": memory.store,
            f"node:{one.host}": 1,
            "node:__internal_head__": int(rank == 0),
            **({f"accelerator_type:{kind}": 1} if kind else {}),
        }
        nodes.append(
            NodeInfo(
                rank,
                one.host,
                one.machine,
                one.pid,
                shape_of(amounts),
                memory.store,
                labels={
                    "ray.io/node-id": node_id(everybody[0].nonce, rank),
                    "hpcray/rank": str(rank),
                    "hpcray/hostname": one.host,
                    **({"ray.io/accelerator-type": kind} if kind else {}),
                    **one.labels,
                },
                gpus=[gpu.id for gpu in known],
                gpu_variable=one.gpu_variable,
                switch=tuple(one.switch),
                cpus=tuple(own_cpus.get(rank, ())) if _are_all_the_jobs(everybody, one.machine) else (),
            )
        )
    return nodes


def _deal_cpus(everybody: Sequence[Introduction], machines: Sequence[str]) -> dict[int, list[int]]:
    """The CPUs of each rank that offers what it finds."""
    dealt: dict[int, list[int]] = {}
    for here in _by_machine(machines):
        some = [rank for rank in here if offers_cpus(rank, machines, everybody[0].head_cpus)]
        masks = [
            RankMask(frozenset(everybody[r].affinity), everybody[r].cpus_on_host, everybody[r].cpus_of_rank)
            for r in some
        ]
        dealt.update(zip(some, share_cpus(masks), strict=True))
    return dealt


def _cpus_offered(rank: int, everybody: Sequence[Introduction], own: list[int] | None) -> float:
    head_cpus = everybody[0].head_cpus
    if rank == 0 and head_cpus is not None:
        return head_cpus
    if own is None:
        return 0
    asked = everybody[rank].num_cpus
    return max(1, len(own)) if asked is None else asked


def _are_all_the_jobs(everybody: Sequence[Introduction], machine: str) -> bool:
    """Whether the job may use all CPUs that its ranks on a host may run on; if not, others may be using just the same ones."""
    here = [one for one in everybody if one.machine == machine]
    return len({cpu for one in here for cpu in one.affinity}) <= min(one.cpus_on_host for one in here)


def _deal_memory(
    everybody: Sequence[Introduction], machines: Sequence[str], store_share: float
) -> dict[int, RankMemory]:
    dealt: dict[int, RankMemory] = {}
    for here in _by_machine(machines):
        usable, stores = [everybody[rank].memory for rank in here], [everybody[rank].store or None for rank in here]
        dealt.update(zip(here, share_memory(usable, stores, store_share), strict=True))
    return dealt


@dataclass(frozen=True)
class _Gpus:
    """What one rank offers: how many, and which if that is known."""

    count: int
    known: list[SeenGpu] = field(default_factory=list)


def _deal_gpus(everybody: Sequence[Introduction], machines: Sequence[str]) -> list[_Gpus]:
    head_cpus = everybody[0].head_cpus
    offering = [offers_gpus(rank, machines, head_cpus) for rank in range(len(everybody))]
    # A UUID is nobody else's, so ranks share by UUID, also where two containers are one host.
    hands = [
        [gpu.uuid for gpu in one.gpus or ()] if offers else [] for one, offers in zip(everybody, offering, strict=True)
    ]
    dealt: list[_Gpus] = []
    for rank, uuids in enumerate(share_gpus(hands, [one.num_gpus for one in everybody])):
        one = everybody[rank]
        if not offering[rank]:
            dealt.append(_Gpus(0))
        elif one.gpus is None:
            dealt.append(_Gpus(one.num_gpus or 0))
        elif one.num_gpus is not None and len(uuids) < one.num_gpus:
            raise ValueError(
                f"rank {rank} on {one.host} was asked to offer {one.num_gpus} GPUs (--num-gpus, for each rank), but its share of "
                f"the {len(one.gpus)} that it may use is {len(uuids)}: ask for less, or leave the number out"
            )
        else:
            by_uuid = {gpu.uuid: gpu for gpu in one.gpus}
            dealt.append(_Gpus(len(uuids), [by_uuid[uuid] for uuid in uuids]))
    return dealt


def _by_machine(machines: Sequence[str]) -> Iterable[list[int]]:
    for machine in dict.fromkeys(machines):
        yield [rank for rank, other in enumerate(machines) if other == machine]
