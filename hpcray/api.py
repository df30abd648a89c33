"""Ray's API: `init`, `remote`, `get`, `put`, `wait` and what belongs to them."""

from __future__ import annotations

import atexit
import contextlib
import inspect
import math
import os
import platform
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from time import monotonic
from typing import Any

import hpcray
from hpcray import config as configuration
from hpcray.actors.actor_class import ActorClass
from hpcray.actors.handle import ActorHandle
from hpcray.client import Client, current_client, require_client, set_client
from hpcray.exceptions import RayError, RaySystemError
from hpcray.object_ref import ObjectRef
from hpcray.observe.logs import LogFolder
from hpcray.options import check_actor_options, check_task_options
from hpcray.protocol import messages as m
from hpcray.remote_function import RemoteFunction
from hpcray.runtime_context import gpu_ids
from hpcray.runtime_env import parse
from hpcray.worker.inspection import explain
from hpcray.worker.serialization import serialize

_IGNORED_BY_INIT = frozenset(
    {"include_dashboard", "dashboard_host", "dashboard_port", "configure_logging", "logging_level",
     "logging_format", "logging_config", "job_config", "local_mode", "_driver_object_store_memory",
     "_enable_object_reconstruction", "_memory", "_metrics_export_port", "_node_ip_address", "_node_name", "_plasma_directory",
     "_redis_password", "_redis_username", "_system_config", "_temp_dir", "_tracing_startup_hook"}
)  # fmt: skip
"""Parameters of Ray's `init` that have no meaning in an MPI job; programs that pass them run all the same."""
MINIMUM_STORE = 16 << 20
"""Bytes. Below, a handful of arrays would fill the store."""


class Context(Mapping[str, Any]):
    """What `init` returns: facts about the job, and a context manager that shuts it down."""

    def __init__(self, client: Client) -> None:
        self.address_info: dict[str, Any] = {
            "node_id": hpcray.get_runtime_context().get_node_id(),
            "address": os.environ.get("HPCRAY_ADDRESS", ""),
            "node_ip_address": client.host,
        }
        self.dashboard_url = ""
        self.python_version = platform.python_version()
        self.ray_version = hpcray.__version__

    def __getitem__(self, key: str) -> Any:
        return self.address_info[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.address_info)

    def __len__(self) -> int:
        return len(self.address_info)

    def __enter__(self) -> Context:  # noqa: PYI034 - Self is not in Python 3.10
        return self

    def __exit__(self, *exc: object) -> None:
        shutdown()

    def disconnect(self) -> None:
        """As `shutdown()`."""
        shutdown()

    def __repr__(self) -> str:
        return f"<hpcray job, node {self.address_info['node_id'][:12]}>"


def init(
    address: str | None = None,
    *,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    resources: Mapping[str, float] | None = None,
    labels: Mapping[str, str] | None = None,
    object_store_memory: int | None = None,
    namespace: str | None = None,
    runtime_env: Mapping[str, Any] | None = None,
    log_to_driver: bool = True,
    ignore_reinit_error: bool = False,
    **ray_only: Any,
) -> Context:
    """Join the job that this process was started in, or start one.

    Under `hpcray run`, the script's job is there already. Under a plain `mpirun`, all ranks call this: rank 0
    goes on as the driver, the others serve the job and never return. Elsewhere a job of one rank starts on
    this machine.

    Args:
        address: None for the above, "local" to start a job here, "auto" or a job's address to attach to a
            running one; in a script that `hpcray run` started, "auto" is its own job.
        num_cpus: CPUs of the job that is started here (default: what this process may use).
        num_gpus: GPUs likewise (default: what it sees).
        resources: Custom resources likewise.
        labels: Labels of its nodes likewise.
        object_store_memory: Bytes of each rank's object store likewise.
        namespace: Where this driver's named actors are found (default: one of its own).
        runtime_env: What the workers of this driver's tasks and actors are set up with; see `hpcray.runtime_env`.
        log_to_driver: Whether what workers print appears here.
        ignore_reinit_error: Return the present job's context instead of raising where there is one.

    Raises:
        RuntimeError: There is a connection already, or an argument is unknown.
        ValueError: An amount is negative, the object store larger than the memory, more GPUs were asked for than this process
            may use, a label or address is none, or the runtime environment cannot be had.
        ConnectionError: No running job was found to attach to.
    """
    if unknown := sorted(set(ray_only) - _IGNORED_BY_INIT):
        raise RuntimeError(f"unknown arguments of init(): {', '.join(unknown)}")
    present = current_client()
    if present is not None:
        if ignore_reinit_error:
            return Context(present)
        raise RuntimeError(
            "init() was called twice: pass ignore_reinit_error=True if that is intended, or call "
            "hpcray.shutdown() first"
        )
    _check_init(num_cpus, num_gpus, resources, labels, object_store_memory, namespace)
    environment = parse(runtime_env) if runtime_env else {}
    from hpcray.launcher.connect import Wish, connect

    gpus = None if num_gpus is None else int(num_gpus)
    wish = Wish(address, num_cpus, gpus, dict(resources or {}), dict(labels or {}), object_store_memory)
    connection = connect(wish)
    client = Client(connection.sock, is_driver=True)
    log_printer = _LogPrinter()
    client.on_log = log_printer.show
    try:
        client.register(
            namespace or connection.namespace or str(uuid.uuid4()),
            [str(Path(path).absolute()) for path in sys.path],
            log_to_driver=log_to_driver and connection.log_to_driver,
        )
        client.environments.enter(client, environment)
    except BaseException:
        client.close()
        connection.end()
        raise
    set_client(client)
    global _session
    _session = _Session(client, connection.end, log_printer)
    client.start_reader()
    return Context(client)


def _check_init(
    num_cpus: Any,
    num_gpus: Any,
    resources: Any,
    labels: Any,
    object_store_memory: int | None,
    namespace: str | None,
) -> None:
    from hpcray.launcher.options import check_labels, check_resources

    for name, amount in (("num_cpus", num_cpus), ("num_gpus", num_gpus)):
        if amount is None:
            continue
        if isinstance(amount, bool) or not isinstance(amount, (int, float)):
            raise TypeError(f"{name} must be a number, not {amount!r}")
        if not math.isfinite(amount) or amount < 0 or amount != int(amount):
            resource = name.removeprefix("num_")[:-1].upper()
            raise ValueError(f"{name} (the resource {resource}) must be a whole number, nonnegative, not {amount!r}")
    for name, mapping, check in (("resources", resources, check_resources), ("labels", labels, check_labels)):
        if mapping is not None and not isinstance(mapping, Mapping):
            raise TypeError(f"{name} must be a mapping, not {mapping!r}")
        check(mapping or {})
    if object_store_memory is not None and object_store_memory < MINIMUM_STORE:
        raise ValueError(
            f"object_store_memory={object_store_memory} is too small: it takes at least {MINIMUM_STORE} bytes"
        )
    if namespace is not None and not isinstance(namespace, str):
        raise TypeError(f"namespace must be a string, not {namespace!r}")
    if namespace == "":
        raise ValueError("namespace must not be the empty string: leave it out for a namespace of this driver's own")


class _LogPrinter:
    """Prints workers' lines; called by whichever thread reads the socket."""

    def __init__(self) -> None:
        self._folder = LogFolder(folds=configuration.load().dedup_logs)
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None

    def show(self, lines: m.LogLines) -> None:
        with self._lock:
            self._print(self._folder.feed(lines, monotonic()))
            self._set_timer()

    def _set_timer(self) -> None:
        due = self._folder.next_flush
        if due is not None and self._timer is None:
            self._timer = threading.Timer(max(0.0, due - monotonic()) + 0.01, self._flush_due)
            self._timer.name = "hpcray-log-folding"
            self._timer.daemon = True
            self._timer.start()

    def _flush_due(self) -> None:
        with self._lock:
            self._timer = None
            self._print(list(self._folder.flush(monotonic())))
            self._set_timer()

    def finish(self) -> None:
        """Print what is still counted."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            self._print(list(self._folder.flush(float("inf"))))

    def _print(self, lines: list[tuple[bool, str]]) -> None:
        for is_error in (False, True):
            text = "".join(f"{line}\n" for error, line in lines if error is is_error)
            if text:
                stream = sys.stderr if is_error else sys.stdout
                with contextlib.suppress(ValueError, OSError):  # closed by the user
                    stream.write(text)
                    stream.flush()


class _Session:
    """This process's time in a job, as its driver."""

    def __init__(self, client: Client, end: Callable[[], None], printer: _LogPrinter) -> None:
        self.client = client
        self.end = end
        self.printer = printer
        self.pid = os.getpid()


_session: _Session | None = None


def shutdown(*, wait_for_processes: bool = False) -> None:  # noqa: ARG001 - a parameter of Ray's
    """Leave the job; one that `init` started here ends, with its processes. Harmless without a job."""
    global _session
    session, _session = _session, None
    if session is None or session.pid != os.getpid():
        return
    set_client(None)
    session.client.drain_logs()
    session.client.close()
    session.printer.finish()
    session.end()


atexit.register(shutdown)


def is_initialized() -> bool:
    """Whether this process is connected to a job."""
    return current_client() is not None


def remote(*args: Any, **options: Any) -> Any:
    """Turn a function into a remote function, a class into an actor class; or, with options, do so later.

    Raises:
        TypeError: Neither a function nor a class.
        ValueError: An unknown option or impossible value.
    """
    if len(args) == 1 and not options:
        return _make_remote(args[0], {})
    if args or not options:
        raise TypeError(
            "use @hpcray.remote on a function or class, or with keyword options: @hpcray.remote(num_cpus=2)"
        )
    _check_known_to_any(options)
    return lambda target: _make_remote(target, options)


def _check_known_to_any(options: Mapping[str, Any]) -> None:
    try:
        check_task_options(options)
    except ValueError:
        check_actor_options(options)


def _make_remote(target: Any, options: Mapping[str, Any]) -> RemoteFunction | ActorClass:
    if inspect.isfunction(target):
        return RemoteFunction(target, check_task_options(options))
    if inspect.isclass(target):
        return ActorClass(target, check_actor_options(options))
    raise TypeError(f"@hpcray.remote must be applied to either a function or a class, not {target!r}")


def get(object_refs: Any, *, timeout: float | None = None) -> Any:
    """The value of a reference, or of each in a list, in order. Blocks until they exist and are on this node.

    Arrays in values are read-only views of the node's shared memory.

    Args:
        object_refs: An `ObjectRef` or a list of them.
        timeout: Seconds; None or a negative number waits for ever, 0 only looks.

    Raises:
        GetTimeoutError: Not all came in time; nothing is lost.
        RayTaskError: The task raised; also an instance of what it raised.
        RayError: The value cannot be had; the class says why.
        ValueError: Neither a reference nor a list.
        TypeError: The list holds something else than references.
    """
    if isinstance(object_refs, ObjectRef):
        return _get([object_refs], timeout)[0]
    if not isinstance(object_refs, list):
        raise ValueError(f"get() takes an ObjectRef or a list of ObjectRefs, not {type(object_refs)}: {object_refs!r}")
    for ref in object_refs:
        if not isinstance(ref, ObjectRef):
            raise TypeError(f"get() was called on a list that holds {ref!r}, which is not an ObjectRef")
    return _get(object_refs, timeout)


def _get(refs: list[ObjectRef[Any]], timeout: float | None) -> list[Any]:
    try:
        return require_client().get([ref.binary() for ref in refs], _timeout(timeout))
    except RayError as error:
        # Where in hpcray it was raised is of no interest: its text tells where in the task.
        raise error.with_traceback(None) from None


def _timeout(timeout: float | None) -> float | None:
    return None if timeout is None or timeout < 0 else timeout


def put(value: Any) -> ObjectRef[Any]:
    """Store a value in the job and return a reference to it. Blocks while a full store makes room.

    Raises:
        TypeError: The value is a reference already, or cannot be pickled.
        ObjectStoreFullError: There is no room, and none came in time.
    """
    if isinstance(value, ObjectRef):
        raise TypeError(
            "put() of an ObjectRef is not allowed: it refers to a stored object already (wrap it in a list "
            "if a reference to the reference is meant)"
        )
    client = require_client()
    try:
        serialized = serialize(value)
    except Exception as error:
        raise TypeError(f"could not serialize the put value {value!r:.200}: {explain(value, error)}") from error
    try:
        return client.put(serialized)
    except RayError as error:
        raise error.with_traceback(None) from None


def wait(
    ray_waitables: list[ObjectRef[Any]],
    *,
    num_returns: int = 1,
    timeout: float | None = None,
    fetch_local: bool = True,
) -> tuple[list[ObjectRef[Any]], list[ObjectRef[Any]]]:
    """Block until some of the given objects exist.

    Args:
        ray_waitables: Distinct references; their order is kept in both results.
        num_returns: How many to wait for, 1 to ``len(ray_waitables)``.
        timeout: Seconds; None waits for ever, 0 only looks.
        fetch_local: Whether they must also be on this node, so that `get` will not wait.

    Returns:
        ``(ready, pending)``; ``len(ready) <= num_returns``. A task that failed counts as ready.

    Raises:
        TypeError: Not a list of references.
        ValueError: Duplicates, `num_returns` out of range, or a negative timeout. Nothing was waited for.
    """
    if not isinstance(ray_waitables, list):
        raise TypeError(f"wait() expected a list of ObjectRefs, got a {type(ray_waitables)}")
    if set(map(type, ray_waitables)) - {ObjectRef}:
        for ref in ray_waitables:
            if not isinstance(ref, ObjectRef):
                raise TypeError(f"wait() expected a list of ObjectRefs, got a list containing {type(ref)}")
    if timeout is not None and timeout < 0:
        raise ValueError(f"the timeout of wait() must be nonnegative, not {timeout}")
    if not ray_waitables:
        return [], []
    identifiers = [ref._id for ref in ray_waitables]
    if len(set(identifiers)) != len(identifiers):
        raise ValueError("wait() requires a list of unique ObjectRefs")
    if num_returns <= 0:
        raise ValueError(f"invalid number of objects to wait for: num_returns={num_returns}")
    if num_returns > len(ray_waitables):
        raise ValueError(
            f"num_returns={num_returns} cannot be greater than the number of objects, {len(ray_waitables)}"
        )
    # Programs wait for thousands one by one, so nothing here may cost more than a list's copy.
    ready: list[ObjectRef[Any]] = []
    pending: list[ObjectRef[Any]] = []
    passed = 0
    for index in require_client().wait(identifiers, num_returns, timeout, fetch=fetch_local):
        ready.append(ray_waitables[index])
        pending += ray_waitables[passed:index]
        passed = index + 1
    return ready, pending + ray_waitables[passed:]


def kill(actor: ActorHandle, *, no_restart: bool = True) -> None:
    """End an actor at once; its unfinished calls fail with `ActorDiedError`. Does not wait for it.

    Raises:
        ValueError: Not an actor handle.
    """
    if not isinstance(actor, ActorHandle):
        raise ValueError(f"kill() ends actors, not {type(actor)}: give it what .remote() of an actor class returned")
    require_client().kill(actor._actor, no_restart=no_restart)


def get_actor(name: str, namespace: str | None = None) -> ActorHandle:
    """A handle of a named actor.

    Raises:
        ValueError: There is none of this name in the namespace.
    """
    client = require_client()
    if not name:
        raise ValueError("get_actor() needs the name of an actor")
    blob = client.query("get_actor", [namespace or client.namespace, name])
    import pickle

    actor, description = pickle.loads(blob)
    return ActorHandle.adopt(actor, description)


def _present_client() -> Client:
    client = current_client()
    if client is None:
        raise RaySystemError("hpcray has not been started yet: call hpcray.init() first")
    return client


def nodes() -> list[dict[str, Any]]:
    """All nodes (ranks) of the job, with Ray's keys.

    Raises:
        RaySystemError: There is no job; asking starts none.
    """
    answer: list[dict[str, Any]] = _present_client().query("nodes", None)
    return answer


def cluster_resources() -> dict[str, float]:
    """All resources of the job; raises as `nodes`."""
    answer: dict[str, float] = _present_client().query("cluster_resources", None)
    return answer


def available_resources() -> dict[str, float]:
    """What of the job's resources is free; a little late, and without what is used up; raises as `nodes`."""
    answer: dict[str, float] = _present_client().query("available_resources", None)
    return answer


def get_gpu_ids() -> list[str | int]:
    """Ids of the GPUs that the running task or actor was given, as in CUDA_VISIBLE_DEVICES; none in a driver.

    They are UUIDs where a driver tells them, else what that variable named when the rank started, and numbers (from 0) where
    there is nothing but the number of GPUs that the rank was asked to offer.
    """
    return gpu_ids()
