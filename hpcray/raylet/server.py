"""The rank process: the thin shell around `RayletCore` and, on rank 0, `GcsCore`.

It moves bytes between sockets, MPI and the cores, starts and reaps processes through the fork server, and ends the job.
One thread; everything happens in callbacks of the event loop or in `_end_turn`, which sends what the turn produced.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import socket
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

import msgspec

import hpcray
from hpcray.config import Config
from hpcray.exceptions import InternalError
from hpcray.gcs.core import GcsCore
from hpcray.launcher.attach import DRIVER_SETTINGS, address_of
from hpcray.launcher.mpirun import STOP_SIGNAL
from hpcray.observe.logfiles import LogFiles
from hpcray.protocol import messages as m
from hpcray.protocol.codec import FrameError, decode_from_peer, encode
from hpcray.raylet.binding import Binding
from hpcray.raylet.channel import Channel
from hpcray.raylet.clients import Client
from hpcray.raylet.core import NodeInfo, RayletCore
from hpcray.raylet.forkserver import Exited, Spawned, SpawnFailed
from hpcray.raylet.lanes import Key
from hpcray.raylet.processes import ForkServer, ServerEnded
from hpcray.raylet.workers import WorkerProcesses, exit_code
from hpcray.store.arena import CONTROL_PAGE, Arena
from hpcray.store.entry import Extent
from hpcray.store.memory import Block
from hpcray.store.pulls import Done, Transfer
from hpcray.store.spillfiles import SpillFiles
from hpcray.transport.poller import EventLoop
from hpcray.worker.functions import content_id

if TYPE_CHECKING:
    from hpcray.transport.mpi import MpiTransport

TERMINAL_DELAY = 1.0
"""Seconds that a script has to end after a Ctrl-C of its terminal, before it is told again: that one may have been a
signal for this process alone."""
DRIVER_TOKEN = 0
"""The fork server's token for the driver; clients count from 1."""
PREFAULT_PAUSE = 0.02
"""Seconds between two steps of touching the arena's pages."""
PREFAULT_BYTES = 128 << 20
"""Bytes that are touched ahead of their first use: enough for what a program puts at its beginning, and no more
memory than a job may be charged for without having asked."""


class RankServer:
    """One rank of a running job.

    Args:
        rank: This rank.
        nodes: All ranks, as agreed at boot.
        nonce: The job's.
        arena: This rank's arena.
        forks: This rank's fork server.
        config: The settings.
        spill_dir: Directory for objects that do not fit into memory.
        log_dir: Directory for full logs, or None.
        binding: Where workers run; None: wherever the system likes.
    """

    def __init__(
        self,
        rank: int,
        nodes: list[NodeInfo],
        nonce: bytes,
        *,
        loop: EventLoop,
        arena: Arena,
        forks: ForkServer,
        config: Config,
        spill_dir: str,
        log_dir: str | None,
        binding: Binding | None,
    ) -> None:
        self.rank = rank
        self.nodes = nodes
        self.loop = loop
        self.exit_code: int | None = None
        self.was_interrupted = False
        self._is_stopping = False
        self.address = address_of(nonce)
        self.arena = arena
        self.arenas: dict[int, Arena] = {rank: arena}
        self._forks = forks
        self._config = config
        self.transport: MpiTransport | None = None
        self._outboxes: dict[int, list[m.PeerMessage]] = {}
        self._channels: dict[int, Channel] = {}
        self._dirty: set[Channel] = set()
        self._drivers: dict[int, Channel] = {}
        self._primary: int | None = None
        self._driver_pid: int | None = None
        self._jobs = 0
        self._listener: socket.socket | None = None
        self._prefaulted = 0
        self._has_news = True
        """Whether something happened in this turn that the core may act on."""
        self._timer_at: float | None = None
        self._spill_files = SpillFiles(spill_dir, lambda block: arena.view(block.offset, block.size), self._call_soon)
        self._logs = LogFiles(log_dir, nodes[rank].host, rank) if log_dir else None
        self.core = RayletCore(
            rank,
            nodes,
            nonce,
            arena_start=CONTROL_PAGE,
            inline_limit=config.inline_limit,
            store_timeout=config.store_timeout,
            fail_infeasible=config.fail_infeasible,
            out=self,
            binding=binding,
        )
        self.gcs: GcsCore | None = None
        if rank == 0:
            self.gcs = self.core.gcs = GcsCore(nodes, nonce, self.core.template, _GcsOut(self))
        self.workers = WorkerProcesses(loop, forks, nodes[rank].host, self)
        loop.add_reader(forks.fd, self._on_fork_server)
        self._prefault()

    # --------------------------------------------------------------------------------------------------------- running
    def attach_transport(self, transport: MpiTransport) -> None:
        """Take part in a job of several ranks."""
        self.transport = transport
        transport.on_handed_over = self.on_handed_over

    def add_peer_arena(self, rank: int, arena: Arena, bell: int) -> None:
        """A rank of this host handed its arena and its bell over."""
        self.arenas[rank] = arena
        assert self.transport is not None
        self.transport.add_peer_arena(rank, arena, bell)

    def run(self) -> int:
        """Serve until the job ends; its exit code. Blocks."""
        # Only now, so that a driver that was asked for is started before them.
        self.core.pool.prestart(min(self._config.prestart, self.nodes[self.rank].resources.get("CPU", 0) // 10_000))
        self.loop.run(self.transport, self._end_turn)
        self._close()
        return self.exit_code if self.exit_code is not None else 1

    def end_job(self, code: int) -> None:
        """Rank 0 decides that the job ends with this code, and tells all."""
        if self.exit_code is not None:
            return
        self.exit_code = code
        for node in self.nodes:
            if node.rank != self.rank:
                self.send(node.rank, m.Shutdown(code))
        self.loop.stop()

    def _close(self) -> None:
        for channel in list(self._channels.values()):
            channel.flush()
        if self._listener is not None:
            self.loop.remove_reader(self._listener.fileno())
            self._listener.close()
        self.loop.remove_reader(self._forks.fd)
        self._forks.end_children()
        for channel in list(self._channels.values()):
            channel.close()
        self._spill_files.close()
        if self._logs is not None:
            self._logs.close()

    def _end_turn(self) -> None:
        core = self.core
        if self._has_news:
            self._has_news = False
            core.end_turn(self.loop.now)
            if self._config.check:
                core.check()
            self._set_timer(core.next_due)
        for channel in self._dirty:
            channel.flush()
        self._dirty.clear()
        transport = self.transport
        if transport is not None and self._outboxes:
            for rank in [rank for rank in self._outboxes if transport.can_send(rank)]:
                transport.send(rank, encode(self._outboxes.pop(rank)))

    def _set_timer(self, due: float | None) -> None:
        """Have the core look at the time then, or earlier if that is planned anyway."""
        if due is not None and (self._timer_at is None or due < self._timer_at):
            self._timer_at = due
            self.loop.call_at(due, self._look_at_time)

    def _look_at_time(self) -> None:
        self._timer_at = None
        self._has_news = True

    def _prefault(self) -> None:
        try:
            done = self.arena.prefault_step()
        except OSError:
            return  # no memory to give: the first write into the arena will say so
        self._prefaulted += done
        if done and self._prefaulted < PREFAULT_BYTES:
            self.loop.call_at(self.loop.now + PREFAULT_PAUSE, self._prefault)

    # ------------------------------------------------------------------------------------------------- RayletCore's out
    def send(self, rank: int, message: m.PeerMessage) -> None:
        outbox = self._outboxes.get(rank)
        if outbox is None:
            outbox = self._outboxes[rank] = []
        outbox.append(message)

    def to_client(self, client: Client, message: m.RayletToClient) -> None:
        channel = self._channels.get(client.number)
        if channel is not None:
            channel.outbox.append(message)
            if isinstance(message, m.Registered):
                channel.descriptors.append(self.arena.fd)
                if client.worker is not None:
                    channel.descriptors.append(self.workers.tokens_of(client))
            self._dirty.add(channel)

    def send_arena(self, client: Client, rank: int) -> None:
        self.to_client(client, m.MapArena(rank, self.nodes[rank].arena_size))
        self._channels[client.number].descriptors.append(self.arenas[rank].fd)

    def start_worker(self, client: Client) -> None:
        self._channels[client.number] = self.workers.start(client)

    def kill_client(self, client: Client) -> None:
        self.workers.kill(client)

    def add_tokens(self, worker: Client, count: int) -> None:
        self.workers.add_tokens(worker, count)

    def take_tokens(self, worker: Client) -> int:
        return self.workers.take_tokens(worker)

    def new_tag(self, rank: int) -> int:
        assert self.transport is not None
        return self.transport.new_tag(rank)

    def receive(self, transfer: Transfer, done: Done) -> None:
        assert self.transport is not None
        rank, tag, filling = transfer.rank, transfer.tag, transfer.filling
        self.transport.receive_into(rank, tag, self._view(transfer), self._telling(done), filling)

    def end_receive(self, rank: int, tag: int, size: int, why: str) -> None:
        assert self.transport is not None
        self.transport.end_receive(rank, tag, size, why)

    def serve(self, transfer: Transfer, done: Done) -> None:
        assert self.transport is not None
        self.transport.send_from(
            transfer.rank,
            transfer.tag,
            self._view(transfer),
            self._telling(done),
            priority=transfer.urgency,
            filling=transfer.filling,
            start=transfer.start,
        )

    def hasten(self, rank: int, tag: int, urgency: int) -> None:
        assert self.transport is not None
        self.transport.hasten(rank, tag, urgency)

    def end_serve(self, rank: int, tag: int, why: str) -> int:
        assert self.transport is not None
        return self.transport.end_send(rank, tag, why)

    def join(self, worker: Client, key: Key, *, is_leased: bool) -> bool:
        """Make a socket between a worker and a driver of this host; False if that is not possible now."""
        home, number, lane = key
        try:
            for_driver, for_worker = socket.socketpair()
        except OSError:
            return False  # no descriptors left: calls go by the raylets
        if home == self.rank:
            self._give_lane(number, lane, for_driver)
        elif self.transport is None or not self.transport.hand_over(home, encode([number, lane]), for_driver.fileno()):
            for_driver.close()
            for_worker.close()
            return False
        else:
            for_driver.close()
        channel = self._channels[worker.number]
        self.to_client(worker, m.ServeLane(home, number, lane, is_leased))
        channel.descriptors.append(for_worker)
        return True

    def _give_lane(self, number: int, lane: int, sock: socket.socket) -> None:
        channel = self._channels.get(number)
        if channel is None:
            sock.close()  # the driver is gone, and its raylet says so
            return
        self.to_client(channel.client, m.LaneOpened(lane))
        channel.descriptors.append(sock)

    def on_handed_over(self, payload: bytes, descriptor: int) -> None:
        """Another rank of this host joined one of its workers with a driver of ours."""
        number, lane = msgspec.msgpack.decode(payload, type=tuple[int, int])
        self._give_lane(number, lane, socket.socket(fileno=descriptor))

    def _telling(self, done: Callable[[str | None], None]) -> Callable[[str | None], None]:
        def told(error: str | None) -> None:
            self._has_news = True
            done(error)

        return told

    def spill(self, blocks: list[Block], done: Callable[[list[Extent], str | None], None]) -> None:
        self._spill_files.spill(blocks, done)

    def restore(self, extent: Extent, block: Block, done: Callable[[str | None], None]) -> None:
        self._spill_files.restore(extent, block, done)

    def forget(self, extent: Extent) -> None:
        self._spill_files.forget(extent)

    def _call_soon(self, callback: Callable[[], None]) -> None:
        def call() -> None:
            self._has_news = True
            callback()

        self.loop.call_soon_threadsafe(call)

    def _view(self, transfer: Transfer) -> memoryview:
        block, start = transfer.block, transfer.start
        return self.arenas[block.rank].view(block.offset + start, block.size - start)

    def show(self, lines: m.LogLines) -> None:
        """Bring lines to the drivers they are for."""
        if self.rank != 0:
            self.send(0, lines)
            return
        shown = False
        for channel in self._drivers.values():
            client = channel.client
            if not lines.name or (client.wants_logs and client.job == lines.job):
                self.to_client(client, lines)
                shown = True
        if not shown and not lines.name:
            for line in lines.lines:
                print(f"hpcray: {line}", file=sys.stderr, flush=True)

    # ------------------------------------------------------------------------------------------------------------ peers
    def on_frame(self, source: int, frame: bytes) -> None:
        """A batch of messages from another rank."""
        self._has_news = True
        core, gcs = self.core, self.gcs
        for message in decode_from_peer(frame):
            if isinstance(message, m.Shutdown):
                self.exit_code = message.code
                self.loop.stop()
            elif not core.on_peer_message(source, message):
                if gcs is None:
                    raise InternalError(
                        f"rank {source} sent {type(message).__name__} to rank {self.rank}, which has no GCS"
                    )
                gcs.on_message(source, message)

    # ---------------------------------------------------------------------------------------------------------- workers
    def on_message(self, client: Client, message: m.ClientMessage) -> None:
        """A worker's message."""
        self._has_news = True
        self.core.on_client_message(client, message)

    def on_worker_gone(self, client: Client, why: str) -> None:
        self._has_news = True
        self._channels.pop(client.number, None)
        self.core.on_client_gone(client, why)

    def on_output(self, lines: m.LogLines) -> None:
        if self._logs is not None:
            self._logs.write(lines)
        self.show(lines)

    def _on_fork_server(self) -> None:
        for event in self._forks.read():
            if isinstance(event, Spawned):
                if event.token == DRIVER_TOKEN:
                    self._driver_pid = event.pid
                else:
                    self.workers.on_spawned(event.token, event.pid)
            elif isinstance(event, SpawnFailed):
                if event.token == DRIVER_TOKEN:
                    print(f"hpcray: the script could not be started: {event.error}", file=sys.stderr, flush=True)
                    self.end_job(127)
                else:
                    self.workers.on_spawn_failed(event.token, event.error)
            elif isinstance(event, Exited):
                if event.pid == self._driver_pid:
                    self.on_driver_exited(event.status)
                else:
                    self.workers.on_exited(event.pid, event.status)
            elif isinstance(event, ServerEnded):
                self.loop.remove_reader(self._forks.fd)
                if self.exit_code is None:
                    raise InternalError(f"the fork server of rank {self.rank} died; its workers died with it")

    # ---------------------------------------------------------------------------------------------------------- drivers
    def spawn_driver(
        self, argv: list[str], settings: dict[str, str | bool | None], environment: Mapping[str, str]
    ) -> None:
        """Start the script that this job is for; its exit is the job's end. `settings` are for its `init`."""
        ours, theirs = socket.socketpair()
        self.add_driver(ours, is_primary=True)
        self._forks.spawn_driver(
            DRIVER_TOKEN,
            argv,
            {DRIVER_SETTINGS: json.dumps(settings), **environment},
            str(Path.cwd()),
            theirs.fileno(),
            own_group=not self._has_terminal,
        )
        theirs.close()

    def watch_driver(self, pid: int) -> None:
        """The driver is a child of this process: its exit is the job's end."""
        self._driver_pid = pid
        descriptor = os.pidfd_open(pid)

        def ended() -> None:
            self.loop.remove_reader(descriptor)
            os.close(descriptor)
            self.on_driver_exited(os.waitpid(pid, 0)[1])

        self.loop.add_reader(descriptor, ended)

    def on_driver_exited(self, status: int) -> None:
        """The primary driver's process is gone: the job ends with its exit code."""
        self._driver_pid = None
        for channel in list(self._drivers.values()):
            if channel.client.number == self._primary:
                channel.read_all()
        self.end_job(exit_code(status))

    @property
    def driver_pid(self) -> int | None:
        """The process of the script, while it runs."""
        return self._driver_pid

    def signal_driver(self, signum: int) -> None:
        """Pass a signal on to the script."""
        if self._driver_pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._driver_pid, signum)

    def add_driver(self, sock: socket.socket, *, is_primary: bool) -> None:
        """A driver's socket; it says who it is by `RegisterDriver`."""
        client = self.core.add_client(is_driver=True)
        channel = Channel(self.loop, sock, client, self._on_driver_message, self._on_driver_end)
        self._channels[client.number] = channel
        if is_primary:
            self._primary = client.number

    def _on_driver_message(self, client: Client, message: m.ClientMessage) -> None:
        self._has_news = True
        if isinstance(message, m.RegisterDriver):
            self._register(client, message)
        elif isinstance(message, m.StopJob):
            self.end_job(message.code)
        else:
            try:
                self.core.on_client_message(client, message)
            except (FrameError, KeyError) as error:
                print(f"hpcray: a driver was dropped: {error!r}", file=sys.stderr, flush=True)
                self._drop_driver(self._channels[client.number])

    def _register(self, client: Client, message: m.RegisterDriver) -> None:
        ours = (hpcray.__version__, platform.python_version())
        theirs = (message.version, message.python)
        if ours != theirs:
            text = (
                f"the job runs hpcray {ours[0]} on Python {ours[1]}, this driver hpcray {theirs[0]} on Python {theirs[1]}: "
                "use the same environment for both"
            )
            self.to_client(client, m.Refused(text))
            return
        self._jobs += 1
        job = self._jobs.to_bytes(4, "little")
        client.pid = message.pid
        client.namespace = message.namespace
        client.wants_logs = message.log_to_driver
        config = m.JobConfig(job.hex(), message.namespace, message.cwd, message.sys_path, message.as_ray)
        blob = msgspec.json.encode(config)
        client.job = definition = content_id(blob)
        self.core.define(m.Define(definition, blob))
        self._drivers[client.number] = self._channels[client.number]
        self.core.welcome(client, job)

    def _on_driver_end(self, channel: Channel) -> None:
        self._drop_driver(channel)
        if channel.client.number == self._primary and self._driver_pid is None:
            # A driver that is no child of ours: its end of the socket is all that tells of its end.
            self.end_job(0)

    def _drop_driver(self, channel: Channel) -> None:
        self._has_news = True
        channel.close()
        client = channel.client
        self._channels.pop(client.number, None)
        if self._drivers.pop(client.number, None) is not None and self.gcs is not None:
            self.core.to_gcs(m.EndJob(client.job))
        self.core.on_client_gone(client, "it ended")

    def listen(self, name: bytes) -> None:
        """Let drivers of the same user attach by this abstract socket name."""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(name)
        self._listener.listen()
        self._listener.setblocking(False)
        self.loop.add_reader(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        if struct.unpack("3i", credentials)[1] != os.getuid():
            sock.close()
            return
        self.add_driver(sock, is_primary=False)

    def interrupt(self, signum: int) -> None:
        """The job was told to stop (Ctrl-C, SIGTERM): the script first, everything after a grace."""
        if self.rank != 0 or self.exit_code is not None:
            return
        if self._is_stopping:
            if signum == signal.SIGTERM:  # the launcher's patience is over
                self.end_job(128 + signum)
            return
        self._is_stopping = True
        if signum == STOP_SIGNAL:
            # `hpcray run -n` has been interrupted, and has said so.
            signum = signal.SIGINT
        else:
            self.was_interrupted = True
        code = 128 + signum
        if self._driver_pid is None:
            self.end_job(code)
            return
        # A terminal's Ctrl-C reaches the script by itself; a second one would interrupt its cleaning up.
        delay = TERMINAL_DELAY if signum == signal.SIGINT and self._has_terminal else 0.0
        now = monotonic()
        self.loop.call_at(now + delay, lambda: self.signal_driver(signum))
        self.loop.call_at(now + self._config.shutdown_grace, lambda: self.end_job(code))

    @property
    def _has_terminal(self) -> bool:
        """Whether the script belongs to this process's group, for its terminal's sake: not under an MPI launcher, which
        may signal that whole group."""
        return self.transport is None


class _GcsOut:
    """How the GCS speaks: to the raylet of its own process within the turn, to others by MPI."""

    def __init__(self, server: RankServer) -> None:
        self._server = server

    def send(self, rank: int, message: m.PeerMessage) -> None:
        if rank == self._server.rank:
            self._server.core.deliver_here(message)
        else:
            self._server.send(rank, message)
