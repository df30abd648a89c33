"""The raylet: what clients and peers tell it, brought to the part that it concerns.

    ObjectTable   where objects are, who waits for them         (store/table.py)
    Tasks         tasks whose home this raylet is               (raylet/tasks.py)
    Calls         actor calls of this raylet's clients          (raylet/calls.py)
    Pool          workers, and what runs on them                (raylet/pool.py)
    HostedActors  actors that live here                         (raylet/actors.py)
    Groups        placement groups: bundles, and who waits      (raylet/groups.py)
    Lanes         drivers that speak to workers themselves      (raylet/lanes.py)

Rules:
  1. No clock, socket, process, MPI or randomness here: `now` and events come in, calls on `out` go out.
  2. Handlers only change state; placing and dispatching happen once per turn, in `end_turn`.
  3. User payloads are never opened.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from hpcray import payload
from hpcray.exceptions import InternalError
from hpcray.ids import client_prefix, object_id, task_of
from hpcray.observe.findings import Finding
from hpcray.observe.statistics import Traffic
from hpcray.protocol import messages as m
from hpcray.raylet.actors import HostedActors
from hpcray.raylet.binding import Binding
from hpcray.raylet.calls import Calls
from hpcray.raylet.clients import Client, Work, Worker
from hpcray.raylet.explaining import explain
from hpcray.raylet.feasibility import suits, why_bound_in_vain, why_infeasible
from hpcray.raylet.groups import Groups
from hpcray.raylet.lanes import Key, Lanes
from hpcray.raylet.ledger import Ledger
from hpcray.raylet.pool import Pool
from hpcray.raylet.states import Report, states
from hpcray.raylet.surveys import TOPICS, Surveys
from hpcray.raylet.tasks import Tasks
from hpcray.resources import Shape, Units
from hpcray.store.allocator import Allocator
from hpcray.store.entry import HERE, INLINE, MAPPED, SPILLED, Entry, Extent
from hpcray.store.memory import Block
from hpcray.store.pulls import Done, Transfer
from hpcray.store.table import ObjectTable

if TYPE_CHECKING:
    from hpcray.gcs.actors import ActorRecord

LOAD_DELAY = 0.01
"""Seconds by which the GCS may hear late that a raylet has less room than it said."""

_ADVICE = "Ask for less, or give the job more (e.g. --num-cpus, --resources, --labels)."


class RayletOut(Protocol):
    """The only way out of a raylet."""

    def send(self, rank: int, message: m.PeerMessage) -> None: ...
    def to_client(self, client: Client, message: m.RayletToClient) -> None: ...
    def send_arena(self, client: Client, rank: int) -> None: ...
    def start_worker(self, client: Client) -> None: ...
    def kill_client(self, client: Client) -> None: ...
    def receive(self, transfer: Transfer, done: Done) -> None: ...
    def end_receive(self, rank: int, tag: int, size: int, why: str) -> None: ...
    def serve(self, transfer: Transfer, done: Done) -> None: ...
    def hasten(self, rank: int, tag: int, urgency: int) -> None: ...
    def end_serve(self, rank: int, tag: int, why: str) -> int: ...
    def spill(self, blocks: list[Block], done: Callable[[list[Extent], str | None], None]) -> None: ...
    def restore(self, extent: Extent, block: Block, done: Callable[[str | None], None]) -> None: ...
    def forget(self, extent: Extent) -> None: ...
    def show(self, lines: m.LogLines) -> None: ...
    def new_tag(self, rank: int) -> int: ...
    def join(self, worker: Client, key: Key, *, is_leased: bool) -> bool: ...
    def add_tokens(self, worker: Client, count: int) -> None: ...
    def take_tokens(self, worker: Client) -> int: ...


class GcsHere(Protocol):
    """The GCS, as the raylet of the same process calls it."""

    @property
    def is_waiting_for_room(self) -> bool: ...
    @property
    def next_due(self) -> float | None: ...
    def on_message(self, rank: int, message: m.PeerMessage) -> None: ...
    def end_turn(self, now: float) -> None: ...
    def explain(self, asked: str) -> list[Finding]: ...
    def living_actors(self) -> list[ActorRecord]: ...


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """What every rank knows of every other from the boot on.

    Attributes:
        machine: Ranks with the same one can map each other's memory.
        resources: What it offers, in fixed point.
        arena_size: Bytes.
        labels: By key.
        gpus: The GPUs that it offers, as `gpu_variable` names them, in the order in which programs number them. Empty if it was
            only told how many there are: their names are then "0", "1", and so on.
        gpu_variable: The environment variable that tells a process which GPUs to use.
        switch: The switches that lead to it, outermost first; empty if nobody tells.
        cpus: The CPUs of its host that are its own; empty if there are none that no other rank or job may be using.
    """

    rank: int
    host: str
    machine: str
    pid: int
    resources: Shape
    arena_size: int
    labels: dict[str, str] = field(default_factory=dict)
    gpus: list[str] = field(default_factory=list)
    gpu_variable: str = "CUDA_VISIBLE_DEVICES"
    switch: tuple[str, ...] = ()
    cpus: tuple[int, ...] = ()

    def gpu(self, number: int) -> str | int:
        """What `gpu_variable` calls one of its GPUs; the number itself where they have no names."""
        return self.gpus[number] if self.gpus else number


class RayletCore:
    """One rank's raylet: a pure core.

    Args:
        rank: Whose raylet this is.
        nodes: All ranks of the job.
        nonce: The job's nonce, part of all ids.
        arena_start: First offset of the arena that objects may use.
        inline_limit: Bytes up to which objects ride in messages.
        store_timeout: Seconds without anything coming free, after which who waits for room is told that there is none.
        binding: Where its workers run; None: wherever the system likes.
        fail_infeasible: Whether tasks and actors fail that no node could ever run, rather than wait.
        out: The way out.
    """

    def __init__(
        self,
        rank: int,
        nodes: list[NodeInfo],
        nonce: bytes,
        *,
        arena_start: int,
        inline_limit: int,
        store_timeout: float,
        out: RayletOut,
        binding: Binding | None = None,
        fail_infeasible: bool = False,
    ) -> None:
        me = nodes[rank]
        self.rank = rank
        self.nodes = nodes
        self.nonce = nonce
        self.is_alone = len(nodes) == 1
        self.now = 0.0
        self._out = out
        self._inline_limit = inline_limit
        self.blobs: dict[bytes, bytes] = {}
        self.templates: dict[bytes, m.Template] = {}
        self._peers_know: dict[int, set[bytes]] = {}
        self.clients: dict[int, Client] = {}
        self._clients_made = 0
        allocator = Allocator(arena_start, me.arena_size)
        self.table = ObjectTable(rank, allocator, self, patience=store_timeout)
        self.surveys = Surveys(rank, nodes, self.clients, self.table, allocator, self)
        self.references = self.table.references
        self.memory = self.table.memory
        self.transfers = self.table.transfers
        self.ledger = Ledger(me.resources)
        self.pool = Pool(self.ledger, self.table, self, binding)
        self.tasks = Tasks(self.table, self.pool, self)
        self.groups = Groups(self.pool, self.tasks, self.table, self)
        self.calls = Calls(self.table, self)
        self.hosted = HostedActors(self.pool, self)
        self.lanes = Lanes(self.pool, self.tasks, self.calls, self.hosted, self)
        self._loopback: list[m.PeerMessage] = []
        """Messages of this rank to itself; handled before the turn ends."""
        self._reported: m.Load | None = None
        self.report_due: float | None = None
        """When a report that could wait has to be made."""
        self._granted_classes: dict[bytes, int] = {}
        self._fail_infeasible = fail_infeasible
        self._warned: set[str] = set()
        self.gcs: GcsHere | None = None
        """On rank 0: the GCS of the same process."""
        self._from_client: dict[type, Callable[[Client, Any], None]] = {
            m.Submit: self._on_submit, m.TaskDone: self._on_task_done, m.Get: self._on_get, m.Release: self._on_release,
            m.Call: self._on_call, m.Watch: self._on_watch, m.StopGetting: self._on_stop_getting,
            m.PutInline: self._on_put_inline, m.Reserve: self._on_reserve, m.Seal: self._on_seal, m.Unreserve: self._on_unreserve,
            m.AddReferences: self._on_add_references, m.Unpin: self._on_unpin, m.KeepForever: self._on_keep_forever,
            m.HandBack: self._on_hand_back, m.Unblocked: self._on_unblocked, m.ActorReady: self._on_actor_ready,
            m.CreateActor: self._on_create_actor, m.Kill: self._on_kill, m.Query: self._on_query,
            m.Define: self._on_client_define, m.DefineTemplate: self._on_client_define,
            m.OpenLane: self.lanes.on_open, m.CloseLane: self.lanes.on_close, m.LaneDone: self._on_lane_done,
            m.RecallDone: self._on_recall_done, m.LaneIdle: lambda _, x: self.lanes.on_idle((x.home, x.client, x.lane)),
            m.CreatePlacementGroup: lambda _, x: self.to_gcs(x),
            m.RemovePlacementGroup: lambda _, x: self.groups.on_remove(x),
            m.AwaitPlacementGroup: self._on_await_group,
            m.SetupFailed: self._on_setup_failed,
        }  # fmt: skip
        self._from_peer: dict[type, Callable[[int, Any], None]] = {
            m.Execute: self._on_execute, m.ExecuteCall: self._on_execute_call, m.Finished: self._on_finished,
            m.Crashed: self._on_crashed, m.StartActor: lambda rank, x: self.hosted.on_start(x, rank),
            m.Locate: lambda rank, x: self.table.on_locate(x.id, rank), m.Located: lambda _, x: self.table.on_located(x),
            m.Borrow: self._on_borrow, m.Borrowed: lambda rank, _: self.references.on_borrowed(rank),
            m.Unborrow: lambda rank, x: self.references.on_unborrow(x.id, rank, x.count),
            m.CopyAdded: lambda rank, x: self.transfers.on_copy_added(x, rank),
            m.CopyDropped: lambda rank, x: self.transfers.on_copy_dropped(x.id, rank), m.Free: self._on_free,
            m.Pull: lambda rank, x: self.transfers.on_pull(x, rank),
            m.MapObject: lambda rank, x: self.transfers.on_map(x.id, rank, x.urgency),
            m.ObjectMapped: lambda rank, x: self.transfers.pulls.on_mapped(x, rank),
            m.UnmapObject: lambda rank, x: self.transfers.on_unmap(x.id, rank),
            m.RecallMapping: lambda rank, x: self.table.pressure.on_recall(x.id, rank),
            m.CopyLost: lambda rank, x: self.table.pressure.on_copy_lost(x, rank),
            m.PullFailed: lambda rank, x: self.transfers.pulls.on_pull_failed(x, rank),
            m.PullFrom: lambda rank, x: self.transfers.pulls.on_redirected(x, rank),
            m.HastenPull: lambda rank, x: self.transfers.on_hasten(x, rank),
            m.Survey: lambda rank, x: self.surveys.on_survey(rank, x),
            m.Surveyed: lambda rank, x: self.surveys.on_surveyed(rank, x),
            m.Define: lambda _, x: self.define(x), m.DefineTemplate: lambda _, x: self.define(x),
            m.Grant: lambda _, x: self.tasks.on_grant(x), m.PlaceActor: lambda _, x: self.calls.on_place(x),
            m.ActorChanged: lambda _, x: self.calls.on_changed(x),
            m.StopActor: lambda _, x: self.hosted.on_stop(x), m.Told: self._on_told,
            m.JobEnded: self._on_job_ended, m.StartLane: self.lanes.on_start, m.EndLane: self.lanes.on_end,
            m.PlacementGroupChanged: lambda _, x: self.groups.on_changed(x.group, x.state),
            m.ReserveBundles: lambda _, x: self.groups.on_reserve(x), m.ReturnBundles: lambda _, x: self.groups.on_return(x),
            m.Returned: self.tasks.on_returned,
            m.LogLines: lambda _, x: self._out.show(x),
            m.LaneLost: lambda _, x: self.lanes.on_lost(x), m.WantLane: lambda _, x: self.lanes.on_wanted(x.client, x.lane),
        }  # fmt: skip

    # ------------------------------------------------------------------------------------------------------- way out
    def send(self, rank: int, message: m.PeerMessage) -> None:
        """To another raylet, or to this one itself at the end of the turn."""
        if rank == self.rank:
            self._loopback.append(message)
        else:
            self._out.send(rank, message)

    def to_gcs(self, message: m.PeerMessage) -> None:
        # The GCS of this process only changes its state now: what it has to say comes back by `deliver_here`.
        if self.gcs is not None:
            self.gcs.on_message(self.rank, message)
        else:
            self._out.send(0, message)

    def share_host(self, rank: int, other: int) -> bool:
        return self.nodes[rank].machine == self.nodes[other].machine

    def new_tag(self, rank: int) -> int:
        return self._out.new_tag(rank)

    def receive(self, transfer: Transfer, done: Done) -> None:
        self._out.receive(transfer, self._counting(self.surveys.received, transfer, done))

    def end_receive(self, rank: int, tag: int, size: int, why: str) -> None:
        self._out.end_receive(rank, tag, size, why)

    def serve(self, transfer: Transfer, done: Done) -> None:
        self._out.serve(transfer, self._counting(self.surveys.sent, transfer, done))

    def _counting(self, traffic: Traffic, transfer: Transfer, done: Done) -> Done:
        def counted(error: str | None) -> None:
            if error is None:
                traffic.add(transfer.block.size - transfer.start, self.now)
            done(error)

        return counted

    def hasten(self, rank: int, tag: int, urgency: int) -> None:
        self._out.hasten(rank, tag, urgency)

    def end_serve(self, rank: int, tag: int, why: str) -> int:
        return self._out.end_serve(rank, tag, why)

    def spill(self, blocks: list[Block], done: Callable[[list[Extent], str | None], None]) -> None:
        self._out.spill(blocks, done)

    def restore(self, extent: Extent, block: Block, done: Callable[[str | None], None]) -> None:
        self._out.restore(extent, block, done)

    def forget(self, extent: Extent) -> None:
        self._out.forget(extent)

    def holders(self) -> list[str]:
        """Which clients look at memory of this arena or are writing into it, and how much, for people."""
        held: list[str] = []
        for client in self.clients.values():
            name = f"the {'driver' if client.is_driver else 'worker'} with pid {client.pid}"
            if client.worker is not None and client.worker.template is not None:
                name += f" ({self.templates[client.worker.template].name})"
            pinned = {b.offset: b.size for blocks in client.pins.values() for b in blocks if b.rank == self.rank}
            for doing, size in (
                ("looks at", sum(pinned.values())),
                ("is writing", sum(block.size for block in client.reserved.values())),
            ):
                if size:
                    held.append(f"{name} {doing} {size:,} bytes")
        return held

    # --------------------------------------------------------------------------------------------------- definitions
    def define(self, message: m.Define | m.DefineTemplate) -> None:
        """Remember a function, class, job configuration or template; the first definition of an id stays."""
        if isinstance(message, m.Define):
            self.blobs.setdefault(message.id, message.blob)
        else:
            self.templates.setdefault(message.id, message.template)

    def _on_client_define(self, client: Client, message: m.Define | m.DefineTemplate) -> None:
        client.known.add(message.id)
        self.define(message)

    def template(self, identifier: bytes) -> m.Template:
        return self.templates[identifier]

    def push_definitions(self, rank: int, template: bytes) -> None:
        """Make sure that a peer has the template and what it names before it is used there."""
        if rank == self.rank:
            return
        known = self._peers_know.setdefault(rank, set())
        if template not in known:
            for message in self._definitions(template, known):
                self._out.send(rank, message)

    def _definitions(self, identifier: bytes, known: set[bytes]) -> list[m.Define | m.DefineTemplate]:
        template = self.templates[identifier]
        messages: list[m.Define | m.DefineTemplate] = []
        needed = [template.job, template.function]
        if template.environment:
            needed += [template.environment, *template.packages]
        for blob in needed:
            if blob not in known:
                known.add(blob)
                messages.append(m.Define(blob, self.blobs[blob]))
        known.add(identifier)
        messages.append(m.DefineTemplate(identifier, template))
        return messages

    def suits(self, template: m.Template) -> bool:
        """Whether this node is one of those that a class asks for; of a preference, whether nobody can have a better one."""
        return suits(template, self.rank, self.nodes)

    def why_never(self, template: m.Template) -> str:
        """Why a class is to fail rather than to wait, as a sentence for people; empty if it is to wait."""
        if why := why_bound_in_vain(template, self.nodes):
            return why
        if self._fail_infeasible and (why := why_infeasible(template, self.nodes)):
            return f"{why}. {_ADVICE}"
        return ""

    def warn_if_infeasible(self, template: m.Template) -> None:
        """Tell drivers, once per class, of a demand that no node of the job can ever meet."""
        why = why_infeasible(template, self.nodes)
        if why and why not in self._warned:
            self._warned.add(why)
            self.notify(f"{why}: it will wait for ever. {_ADVICE}")

    def notify(self, text: str) -> None:
        """Show a line to the users of all drivers."""
        self._out.show(m.LogLines(b"", "", 0, "", is_error=True, lines=[text]))

    # ------------------------------------------------------------------------------------------------------- clients
    def add_client(self, *, is_driver: bool) -> Client:
        """A driver connected, or a worker is being started."""
        self._clients_made += 1
        number = self._clients_made
        client = Client(number, client_prefix(self.rank, self.nonce, number), is_driver=is_driver)
        self.clients[number] = client
        return client

    def welcome(self, client: Client, job: bytes) -> None:
        """The first message to a client: who it is and what it may map; the arena's descriptor goes with it."""
        me = self.nodes[self.rank]
        client.mapped.add(self.rank)
        self._out.to_client(
            client,
            m.Registered(
                self.rank,
                client.prefix,
                job,
                client.job,
                client.namespace,
                self._inline_limit,
                me.arena_size,
                me.host,
            ),
        )

    def spawn_worker(self) -> Worker:
        client = self.add_client(is_driver=False)
        worker = client.worker = Worker(client)
        self._out.start_worker(client)
        self.welcome(client, b"")
        return worker

    def retire_worker(self, worker: Worker) -> None:
        self._out.to_client(worker.client, m.Exit())

    exit_worker = retire_worker

    def kill_worker(self, worker: Worker) -> None:
        self._out.kill_client(worker.client)

    def on_client_message(self, client: Client, message: m.ClientMessage) -> None:
        """A message from a driver or worker.

        Raises:
            InternalError: A message that this kind of client may not send now.
        """
        try:
            handler = self._from_client[type(message)]
        except KeyError:
            raise InternalError(f"a client sent {type(message).__name__} out of place") from None
        handler(client, message)

    def on_client_gone(self, client: Client, why: str) -> None:
        """The client's process ended: fail or retry what it ran, forget what it held."""
        if self.clients.pop(client.number, None) is None:
            return
        # What it waited for is not to be sent any more, let alone pinned for it.
        client.wanted.clear()
        client.watched.clear()
        client.reserving.clear()
        if (worker := client.worker) is not None:
            actor, template = worker.actor, worker.template
            lost = self.pool.on_gone(worker)
            if actor is not None:
                self.hosted.on_worker_gone(actor, lost, why)
                self.lanes.on_worker_gone(worker, self.hosted.epitaph(actor))
            else:
                for work in lost:
                    self._report_crash(work, self._crash_error(work.template, why))
                if template is not None:
                    self.lanes.on_worker_gone(worker, self._crash_error(template, why))
        for blocks in client.pins.values():
            for block in blocks:
                self.memory.unpin(block)
        for block in client.reserved.values():
            self.memory.abandon(block)
        held, client.held = client.held, set()
        for identifier in held:
            self.references.drop(identifier)
        if client.is_driver:
            self.lanes.on_client_gone(client)

    def _crash_error(self, template: bytes, why: str) -> bytes:
        text = f"The worker that ran {self.templates[template].name} died: {why}"
        return payload.system_error("WorkerCrashedError", text)

    # ---------------------------------------------------------------------------------------- references and objects
    def _on_release(self, client: Client, message: m.Release) -> None:
        held = client.held
        for identifier in message.ids:
            if identifier in held:
                held.discard(identifier)
                client.wanted.discard(identifier)
                client.watched.discard(identifier)
                self.references.drop(identifier)

    def _on_add_references(self, client: Client, message: m.AddReferences) -> None:
        for identifier in message.ids:
            if identifier not in client.held:
                client.held.add(identifier)
                self.references.hold(identifier)

    def _on_keep_forever(self, client: Client, message: m.KeepForever) -> None:
        for identifier in message.ids:
            self.references.hold(identifier)

    def _on_put_inline(self, client: Client, message: m.PutInline) -> None:
        self._hold_nested(message.nested)
        self.references.create(message.id)
        client.held.add(message.id)
        self.table.set_inline(message.id, message.data, message.nested)

    def _hold_nested(self, nested: list[bytes]) -> None:
        for inner in nested:
            self.references.hold(inner)

    def _on_reserve(self, client: Client, message: m.Reserve) -> None:
        def is_wanted() -> bool:
            return message.id in client.reserving

        def then(block: Block | None) -> None:
            if not is_wanted():
                if block is not None:
                    self.memory.abandon(block)
                return
            client.reserving.discard(message.id)
            if block is None:
                error = payload.system_error("ObjectStoreFullError", self.table.pressure.why_full(message.size))
                self._out.to_client(client, m.ReserveFailed(message.id, error))
            else:
                client.reserved[message.id] = block
                self._out.to_client(client, m.Reserved(message.id, block.offset))

        client.reserving.add(message.id)
        self.memory.reserve(message.id, message.size, then, is_wanted)

    def _on_seal(self, client: Client, message: m.Seal) -> None:
        block = client.reserved.pop(message.id)
        self._hold_nested(message.nested)
        entry = self.references.create(message.id)
        if message.file:
            entry.maker = (message.file, message.line)
        client.held.add(message.id)
        self.table.set_here(message.id, block, message.nested)

    def _on_unreserve(self, client: Client, message: m.Unreserve) -> None:
        client.reserving.discard(message.id)
        block = client.reserved.pop(message.id, None)
        if block is not None:
            self.memory.abandon(block)

    def _on_unpin(self, client: Client, message: m.Unpin) -> None:
        for identifier in message.ids:
            blocks = client.pins.get(identifier)
            if blocks:
                self.memory.unpin(blocks.pop())
                if not blocks:
                    del client.pins[identifier]

    # ------------------------------------------------------------------------------------------------- get and wait
    def _on_get(self, client: Client, message: m.Get) -> None:
        table = self.table
        for identifier in message.ids:
            if identifier in client.wanted:
                continue
            if identifier not in client.held:
                self._on_add_references(client, m.AddReferences([identifier]))
            is_spilled = table.entries[identifier].state == SPILLED
            if table.when_local(identifier, partial(self._deliver_wanted, client, identifier)):
                self.surveys.hits += 1
                self._send_object(client, table.entries[identifier])
            else:
                self.surveys.misses += is_spilled
                client.wanted.add(identifier)
        if message.blocks:
            self._block_if_waiting(client, message.ids)

    def _block_if_waiting(self, client: Client, identifiers: list[bytes]) -> None:
        if client.worker is not None and (client.wanted or client.watched):
            self.pool.on_blocked(client.worker)
            self.tasks.hasten([i for i in reversed(identifiers) if i in client.wanted or i in client.watched])

    def _unblock_if_served(self, client: Client) -> None:
        # The worker says so itself when it goes on. Until then something new would take its CPU, and might block in turn.
        if client.worker is not None and not client.wanted and not client.watched:
            self.pool.on_unblocked(client.worker)

    def _deliver_wanted(self, client: Client, identifier: bytes, error: bytes | None) -> None:
        if identifier not in client.wanted:
            return
        client.wanted.discard(identifier)
        if error is not None:
            self._out.to_client(client, m.InlineObject(identifier, error))
        else:
            entry = self.table.entries[identifier]
            self.surveys.misses += entry.state == HERE and not entry.is_primary
            self._send_object(client, entry)
        self._unblock_if_served(client)

    def _send_object(self, client: Client, entry: Entry) -> None:
        if entry.state == INLINE:
            self._out.to_client(client, m.InlineObject(entry.id, entry.data))
        else:
            value = self.pin_for(client, entry)
            self._out.to_client(client, m.StoredObject(entry.id, value.rank, value.offset, value.size))

    def pin_for(self, client: Client, entry: Entry) -> m.StoredValue:
        """Keep an object's memory for a client, which gets the arena's descriptor first if it does not map it yet."""
        block = entry.block
        if block is None or entry.state not in (HERE, MAPPED):
            raise InternalError(f"object {entry.id.hex()} is not in an arena of this host")
        if block.rank not in client.mapped:
            client.mapped.add(block.rank)
            self._out.send_arena(client, block.rank)
        self.memory.pin(block)
        client.pins.setdefault(entry.id, []).append(block)
        return m.StoredValue(block.rank, block.offset, block.size, entry.id)

    def _on_stop_getting(self, client: Client, message: m.StopGetting) -> None:
        client.wanted.clear()
        self._on_unblocked(client, m.Unblocked())

    def _on_watch(self, client: Client, message: m.Watch) -> None:
        ready: list[bytes] = []
        for identifier in message.ids:
            if identifier not in client.held:
                self._on_add_references(client, m.AddReferences([identifier]))
            if (
                # No room for it here means ready, too: who gets it is told why it cannot be brought.
                self.table.when_local(identifier, lambda _, i=identifier: self._tell_ready(client, i))  # type: ignore[misc]
                if message.fetch
                else self.table.when_exists(identifier, partial(self._tell_ready, client, identifier))
            ):
                ready.append(identifier)
            else:
                client.watched.add(identifier)
        if ready:
            self._out.to_client(client, m.Ready(ready))
        self._block_if_waiting(client, message.ids)

    def _tell_ready(self, client: Client, identifier: bytes) -> None:
        if identifier in client.watched:
            client.watched.discard(identifier)
            self._out.to_client(client, m.Ready([identifier]))

    def _on_unblocked(self, client: Client, message: m.Unblocked) -> None:
        if client.worker is not None:
            self.pool.on_unblocked(client.worker)

    # -------------------------------------------------------------------------------------------------- tasks, calls
    def _on_submit(self, client: Client, message: m.Submit) -> None:
        count = self.templates[message.template].num_returns
        if message.lane:
            self.tasks.on_submit(message, self.lanes.register(client, message.lane, message.task, is_call=False))
        else:
            self.tasks.on_submit(message)
        self._hold_returns(client, message.task, count)

    def _hold_returns(self, client: Client, task: bytes, count: int) -> None:
        for index in range(1, count + 1):
            self._hold_return(client, object_id(task, index))

    def _hold_return(self, client: Client, identifier: bytes) -> None:
        client.held.add(identifier)
        # A driver gets its results as they come: it need not ask, and its reader thread takes them in.
        if client.is_driver and self.table.when_exists(identifier, partial(self._push, client, identifier)):
            self._push(client, identifier)

    def _push(self, client: Client, identifier: bytes) -> None:
        if identifier in client.held:
            entry = self.table.entries[identifier]
            if entry.state == INLINE:
                self._out.to_client(client, m.InlineObject(identifier, entry.data))
            else:
                self._out.to_client(client, m.Exists([identifier]))

    def _on_await_group(self, client: Client, message: m.AwaitPlacementGroup) -> None:
        self.groups.on_await(message)
        self._hold_return(client, message.id)

    def _on_create_actor(self, client: Client, message: m.CreateActor) -> None:
        client.held.add(object_id(message.actor, 0))
        self.calls.on_create(message)

    def _on_call(self, client: Client, message: m.Call) -> None:
        if message.lane:
            self.lanes.register(client, message.lane, message.task, is_call=True)
        self.calls.on_call(message)
        self._hold_returns(client, message.task, message.num_returns)

    def _on_lane_done(self, client: Client, message: m.LaneDone) -> None:
        self.table.set_inline(object_id(message.task, 1), message.data, [])
        if not self.calls.on_finished_here(message.task):
            self.tasks.on_finished_here(message.task)
        self.lanes.on_finished(message.task, client.number)

    def _on_kill(self, client: Client, message: m.Kill) -> None:
        self.calls.on_kill(message)

    def _on_hand_back(self, client: Client, message: m.HandBack) -> None:
        worker = client.worker
        if worker is None:
            return
        for task in message.tasks:
            if (work := worker.tasks.get(task)) is not None:
                self._unpin_arguments(client, work)
        self.pool.on_handed_back(worker, message.tasks)

    def _unpin_arguments(self, client: Client, work: Work) -> None:
        self._on_unpin(client, m.Unpin([d.id for d in work.dependencies if isinstance(d, m.RemoteDependency)]))

    def add_tokens(self, worker: Worker, count: int) -> None:
        self._out.add_tokens(worker.client, count)

    def take_tokens(self, worker: Worker) -> int:
        return self._out.take_tokens(worker.client)

    def recalled(self, worker: Worker, works: list[Work]) -> None:
        """Tell a worker that these are no longer its."""
        for work in works:
            self._unpin_arguments(worker.client, work)
        self._out.to_client(worker.client, m.Recalled([work.task for work in works]))

    def _on_recall_done(self, client: Client, message: m.RecallDone) -> None:
        if client.worker is not None:
            client.worker.is_recalling = False

    # ------------------------------------------------------------------------------------------------------ executing
    def _on_execute(self, home: int, message: m.Execute) -> None:
        self.count_arrival(message.template)
        self.pool.accept(
            Work(message.task, home, message.attempt, message.template, message.arguments, message.dependencies)
        )

    def count_arrival(self, template: bytes) -> None:
        """A task that the GCS granted to this rank is here: the place it was given is taken."""
        self._granted_classes[template] = self._granted_classes.get(template, 0) + 1

    def _on_execute_call(self, home: int, message: m.ExecuteCall) -> None:
        self.hosted.on_call(message, home)

    def run(self, worker: Worker, work: Work, values: list[m.Value], *, is_behind: bool = False) -> None:
        """Send work to a worker, with the definitions that it lacks."""
        client = worker.client
        template = work.template
        if template and template not in client.known:
            self._push_to_worker(worker, template)
        run = m.Run(work.task, template, work.actor, work.method, work.arguments, values, work.num_returns, is_behind)
        self._out.to_client(client, run)

    def _push_to_worker(self, worker: Worker, template: bytes) -> None:
        client = worker.client
        if template not in client.known:
            for message in self._definitions(template, client.known):
                self._out.to_client(client, message)
            client.job = worker.job

    def tell(self, client: Client, message: m.RayletToClient) -> None:
        self._out.to_client(client, message)

    def join(self, worker: Worker, key: Key, template: bytes) -> bool:
        """Give a worker and a driver of this host a socket between them."""
        if template:
            self._push_to_worker(worker, template)
        return self._out.join(worker.client, key, is_leased=bool(template))

    def bind(self, worker: Worker, cpus: list[int]) -> None:
        """Tell a worker where to run."""
        self._out.to_client(worker.client, m.BindCpus(cpus))

    def assign(self, worker: Worker, units: Units) -> None:
        """Tell a worker which of this node's GPUs are its own; none, if so."""
        me = self.nodes[self.rank]
        ids = [me.gpu(number) for number in units.get("GPU", ())]
        self._out.to_client(worker.client, m.AssignGpus(me.gpu_variable, ids))

    def has_group(self, group: bytes) -> bool:
        """Whether all bundles of a placement group are set aside, as far as is known here."""
        return self.groups.states.get(group) in ("created", "rescheduling")

    def watch_group(self, group: bytes) -> bool:
        """Whether something may run in a placement group, some time; from now on this raylet hears of its changes."""
        self.groups.watch(group)
        return not self.groups.is_removed(group)

    def stored_value(self, worker: Worker, entry: Entry) -> m.StoredValue:
        return self.pin_for(worker.client, entry)

    def could_not_run(self, work: Work, error: bytes) -> None:
        """An argument could not be had, or the actor is gone."""
        if work.actor and not work.method:
            self.hosted.could_not_start(work, error)
        else:
            self._report_crash(work, error)

    def lost_its_bundle(self, work: Work) -> None:
        """Its placement group was removed after it had been sent here."""
        if work.actor:
            self.hosted.lost_its_bundle(work)
        else:
            spec = self.templates[work.template]
            self._report_crash(work, payload.group_removed(spec.group, spec.name))

    def _report_crash(self, work: Work, error: bytes) -> None:
        if work.home != self.rank:
            self.references.after_borrows(lambda: self.send(work.home, m.Crashed(work.task, work.attempt, error)))
        elif not self.calls.on_crashed(work.task, error):
            self.tasks.on_crashed(work.task, work.attempt, error)

    def _on_task_done(self, client: Client, message: m.TaskDone) -> None:
        worker = client.worker
        if worker is None:
            raise InternalError("a driver reported a task")
        if worker.actor is not None:
            work = self.hosted.on_done(worker, message.task)
        else:
            work = self.pool.on_done(worker, message.task, message.seconds)
        if work is None:
            work = self.lanes.work_of(worker, message.task)
        if work is None:
            return
        if work.home == self.rank:
            self._finish_here(client, work, message)
        else:
            self._finish_away(client, work, message)
        if client.reserved:
            # A result was written, then a later one could not be: the task has failed, and nobody will seal the first.
            for identifier in [i for i in client.reserved if task_of(i) == message.task]:
                self.memory.abandon(client.reserved.pop(identifier))

    def _finish_here(self, client: Client, work: Work, message: m.TaskDone) -> None:
        is_call = bool(work.actor)
        if not is_call:
            if message.failed and message.retry and self.tasks.wants_retry(work.task, work.attempt):
                self._abandon_results(client, work, message)
                return
            if not self.tasks.is_current(work.task, work.attempt):
                self._abandon_results(client, work, message)
                return
        table = self.table
        for index, result in enumerate(message.results, 1):
            identifier = object_id(work.task, index)
            for inner in result.nested:
                self.references.hold(inner)
            if isinstance(result, m.InlineResult):
                table.set_inline(identifier, result.data, result.nested)
            else:
                table.set_here(identifier, client.reserved.pop(identifier), result.nested)
        if is_call:
            self.calls.on_finished_here(work.task)
        else:
            self.tasks.on_finished_here(work.task)

    def _abandon_results(self, client: Client, work: Work, message: m.TaskDone) -> None:
        for index, result in enumerate(message.results, 1):
            if isinstance(result, m.StoredResult):
                self.memory.abandon(client.reserved.pop(object_id(work.task, index)))

    def _finish_away(self, client: Client, work: Work, message: m.TaskDone) -> None:
        references = self.references
        for index, result in enumerate(message.results, 1):
            for inner in result.nested:
                references.count_for(inner, work.home)
            if isinstance(result, m.StoredResult):
                identifier = object_id(work.task, index)
                self.table.keep_primary(identifier, client.reserved.pop(identifier))
        reply = m.Finished(work.task, work.attempt, message.results, message.failed, message.retry)
        references.after_borrows(lambda: self._out.send(work.home, reply))

    def _on_finished(self, executor: int, message: m.Finished) -> None:
        if not self.calls.on_finished(message, executor):
            self.tasks.on_finished(message, executor)

    def _on_crashed(self, executor: int, message: m.Crashed) -> None:
        if not self.calls.on_crashed(message.task, message.error):
            self.tasks.on_crashed(message.task, message.attempt, message.error)

    def _on_actor_ready(self, client: Client, message: m.ActorReady) -> None:
        if client.worker is None:
            raise InternalError("a driver reported an actor")
        self.hosted.on_started(client.worker, message)

    def _on_setup_failed(self, client: Client, message: m.SetupFailed) -> None:
        # What it was given fails at once: another worker would fail likewise, and retries are for crashes.
        worker = client.worker
        if worker is None:
            raise InternalError("a driver reported that it could not be set up")
        for work in list(worker.tasks.values()):
            if work.actor:
                self.hosted.on_started(worker, m.ActorReady(work.actor, message.error))
                continue
            del worker.tasks[work.task]
            self.pool.release_arguments(work)
            results: list[m.Result] = [m.InlineResult(message.error, [])] * self.templates[work.template].num_returns
            done = m.TaskDone(work.task, results, failed=True, retry=False, seconds=0.0)
            if work.home == self.rank:
                self._finish_here(client, work, done)
            else:
                self._finish_away(client, work, done)
        self.lanes.on_worker_gone(worker, message.error)
        self.on_client_gone(client, "its runtime environment could not be set up")
        self._out.kill_client(client)

    # ------------------------------------------------------------------------------------------------ other peers' news
    def _on_borrow(self, rank: int, message: m.Borrow) -> None:
        self.references.on_borrow(message.id, message.borrower)
        self.send(rank, m.Borrowed())

    def _on_free(self, rank: int, message: m.Free) -> None:
        for identifier in message.ids:
            self.table.on_free(identifier)

    def _on_job_ended(self, rank: int, message: m.JobEnded) -> None:
        def is_of_job(template: bytes) -> bool:
            return self.templates[template].job == message.job

        self.tasks.end_job(is_of_job)
        for work in self.pool.drop_job(is_of_job):
            name = self.templates[work.template].name
            self._report_crash(work, payload.system_error("WorkerCrashedError", f"the job of {name} has ended"))
        for client in list(self.clients.values()):
            worker = client.worker
            # Actors are the GCS's to end: it knows which are detached.
            if worker is not None and worker.job == message.job and worker.actor is None:
                self._out.kill_client(client)

    def _on_query(self, client: Client, message: m.Query) -> None:
        if message.topic == "ping":
            self._out.to_client(client, m.Answer(message.number, ok=True, payload=b""))
            return
        if message.topic in TOPICS:
            self.surveys.ask(client, message)
            return
        if message.topic == "available_resources" and self.gcs is not None:
            self._reported = self._load()
            self.gcs.on_message(self.rank, self._reported)
        self.to_gcs(m.Ask(client.number, message.number, message.topic, message.arguments))

    def _on_told(self, rank: int, message: m.Told) -> None:
        self.answer(message.client, m.Answer(message.number, message.ok, message.payload))

    def explain(self, asked: str) -> list[Finding]:
        """What is known here of something that a user asks about; on rank 0, the GCS's knowledge included."""
        return explain(self, asked) + (self.gcs.explain(asked) if self.gcs is not None else [])

    def states(self, kind: str) -> list[Report]:
        """What is known here of "tasks", "actors" or "workers"; on rank 0, the GCS's knowledge of actors included."""
        return states(self, kind)

    def answer(self, client: int, answer: m.Answer) -> None:
        """Bring a client the answer to its query, if it still lives."""
        if (asker := self.clients.get(client)) is not None:
            self._out.to_client(asker, answer)

    def client_name(self, client: Client) -> str:
        """A driver or worker and what it does, for people."""
        if (worker := client.worker) is None:
            return f"driver {client.pid}"
        template = worker.template
        if worker.actor is not None and (actor := self.hosted.actors.get(worker.actor)) is not None:
            template = actor.template
        return f"worker {client.pid}" + ("" if template is None else f" ({self.templates[template].name})")

    # --------------------------------------------------------------------------------------------------------- turns
    def on_peer_message(self, rank: int, message: m.PeerMessage) -> bool:
        """A message of another rank's raylet or of the GCS. False: it is not for a raylet."""
        handler = self._from_peer.get(type(message))
        if handler is None:
            return False
        handler(rank, message)
        return True

    @property
    def next_due(self) -> float | None:
        """When `end_turn` is to be called even if nothing happens until then; None: not at all."""
        pool = self.pool
        gcs_due = self.gcs.next_due if self.gcs is not None else None
        own = (self.table.pressure.next_expiry, self.report_due, pool.look_due, pool.return_due, self.tasks.warning_due)
        dues = (*own, gcs_due)
        return min((due for due in dues if due is not None), default=None)

    def end_turn(self, now: float) -> None:
        """Place, dispatch and report what this turn changed, until nothing is left to do inside this rank."""
        self.now = now
        tasks, pool = self.tasks, self.pool
        if pool.look_due is not None and pool.look_due <= now:
            pool.look_behind(now)
        if tasks.queues:
            tasks.warn_if_stuck(now)
        while True:
            self.table.end_turn(now)
            if self.surveys.asked:
                self.surveys.answer(now)
            if tasks.has_work:
                tasks.place()
            if pool.has_work:
                pool.dispatch(now)
            if self.memory.stands_still:
                pool.arguments.make_way()
            if pool.end_idle_leases() and (pool.has_work or tasks.queues):
                continue  # what they held may be just what others wait for
            if not self.is_alone and pool.is_short and self._return_overdue(now):
                continue
            self._report_load()
            if self.gcs is not None:
                self.gcs.end_turn(now)
            if self.lanes.exist and not self._loopback:
                self._free_lanes()
            if not self._loopback and not self.memory.has_news:
                break
            messages, self._loopback = self._loopback, []
            for message in messages:
                self.on_peer_message(self.rank, message)
        pool.add_tokens()

    def _return_overdue(self, now: float) -> bool:
        """Give back to their homes what other ranks may run earlier. True if some of it is of this rank."""
        returned = self.pool.take_overdue(now)
        for work in reversed(returned):
            message = m.Returned(work.task, work.attempt)
            if work.home == self.rank:
                self.tasks.on_returned(self.rank, message)
            else:
                self._out.send(work.home, message)
        return any(work.home == self.rank for work in returned)

    def _free_lanes(self) -> None:
        # What waits still, at the end of a turn, waits for resources.
        if self.pool.ready:
            self.lanes.want_back()
        if self.tasks.queues or self.gcs_wants_load:
            self.lanes.want_own()

    def deliver_here(self, message: m.PeerMessage) -> None:
        """The GCS of the same process speaks to this raylet: handled in this turn."""
        self._loopback.append(message)

    @property
    def gcs_wants_load(self) -> bool:
        """Whether the GCS of this process needs to know what is free."""
        return self.gcs is not None and self.gcs.is_waiting_for_room

    def _load(self) -> m.Load:
        room = {template: self.pool.room(template) for template in self._granted_classes}
        units = {name: dict(each) for name, each in self.ledger.free_units.items()}
        return m.Load(dict(self.ledger.free), units, room, dict(self._granted_classes))

    def _report_load(self) -> None:
        if self.is_alone and not self.gcs_wants_load:
            return  # there is nobody whose tasks could be sent here
        reported = self._reported
        if (
            not self._granted_classes
            and reported is not None
            and reported.available == self.ledger.free
            and reported.units == self.ledger.free_units
        ):
            self.report_due = None
            return  # as on a head that only has a driver
        load = self._load()
        if load == reported:
            self.report_due = None
            return
        if self.gcs is not None:
            self._reported = load
            self.gcs.on_message(self.rank, load)
            return
        if reported is not None and not _offers_more(load, reported):
            # That there is less can wait: the GCS counts what it grants itself. It saves a frame per task.
            if self.report_due is None:
                self.report_due = self.now + LOAD_DELAY
            if self.now < self.report_due:
                return
        self.report_due = None
        self._reported = load
        self._out.send(0, load)

    def report_load(self) -> None:
        """At the end of this turn, whatever was reported before."""
        self._reported = None

    def check(self) -> None:
        """Raise InternalError if any part disagrees with another. Slow: tests and HPCRAY_CHECK=1."""
        self.table.check()
        self.surveys.check()
        self.pool.check()
        held: dict[bytes, int] = {}
        for client in self.clients.values():
            for identifier in client.held:
                held[identifier] = held.get(identifier, 0) + 1
        for identifier, count in held.items():
            entry = self.table.entries.get(identifier)
            if entry is None or entry.holds < count:
                raise InternalError(
                    f"rank {self.rank}: {count} clients hold {identifier.hex()}, which the table disputes"
                )


def _offers_more(load: m.Load, reported: m.Load) -> bool:
    return (
        (load.arrived != reported.arrived and load.room == reported.room)
        or any(room > reported.room.get(template, 0) for template, room in load.room.items())
        or any(amount > reported.available.get(name, 0) for name, amount in load.available.items())
    )
