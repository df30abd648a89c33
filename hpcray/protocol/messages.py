"""Every message of hpcray, grouped by who speaks to whom.

User payloads (arguments, results, functions) are opaque `bytes`: whoever is not their final reader never looks inside.
Imperative names ask (`Submit`, `Run`), past tense reports (`Finished`, `Located`). What crosses ranks is idempotent at the
receiver or carries an attempt, since either side may die between two messages.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec


class Message(msgspec.Struct, array_like=True, gc=False):
    """Base of all messages: an array on the wire, its tag first."""


# ---------------------------------------------------------------------------------------------------------------- values
class InlineValue(msgspec.Struct, array_like=True, tag=1, gc=False):
    """An object's payload, up to `config.inline_limit` bytes."""

    data: bytes


class StoredValue(msgspec.Struct, array_like=True, tag=2, gc=False):
    """Where a payload lies: the arena of `rank` (this raylet's or one of the same host)."""

    rank: int
    offset: int
    size: int
    id: bytes
    """The object's, under which a worker gives the pin on its argument back."""


Value: TypeAlias = InlineValue | StoredValue


class InlineResult(msgspec.Struct, array_like=True, tag=1):
    """A return value that rides in the reply. `nested`: references inside it."""

    data: bytes
    nested: list[bytes]


class StoredResult(msgspec.Struct, array_like=True, tag=2):
    """A return value that was written into the executing raylet's arena."""

    size: int
    nested: list[bytes]


Result: TypeAlias = InlineResult | StoredResult


class InlineDependency(msgspec.Struct, array_like=True, tag=1, gc=False):
    """An argument that was small enough to ride along."""

    data: bytes


class RemoteDependency(msgspec.Struct, array_like=True, tag=2):
    """An argument that the executing raylet fetches from one of `ranks`."""

    id: bytes
    size: int
    ranks: list[int]


Dependency: TypeAlias = InlineDependency | RemoteDependency


class ActorOptions(msgspec.Struct, array_like=True):
    """What a class's template says beyond a function's."""

    max_restarts: int = 0
    max_task_retries: int = 0
    placement: dict[str, int] = {}
    """Resources needed to be placed, where they exceed what is held while running (Ray: 1 CPU to place, 0 to run)."""
    name: str = ""
    """Of a named actor."""


class LabelRule(msgspec.Struct, array_like=True, frozen=True):
    """What a node's label must be: `operator` is "in", "not in", "exists" or "does not exist"."""

    key: str
    operator: str
    values: tuple[str, ...] = ()


NO_NODE = -1


class Template(msgspec.Struct, array_like=True):
    """What all calls of one remote function with the same options share; sent once per process, named by its hash.

    A template is also the *scheduling class*: tasks with the same template are interchangeable to the scheduler.
    """

    job: bytes
    """Id of the job's configuration definition."""
    function: bytes
    """Id of the definition that holds the pickled function or class."""
    name: str
    num_returns: int
    resources: dict[str, int]
    max_retries: int
    retry_exceptions: bytes | None = None
    """None: never; b"": on any exception; else a pickled tuple of exception classes, opened by the worker."""
    spread: bool = False
    node: int | None = None
    """The rank that it is to run on; `NO_NODE`: one that there is not."""
    node_is_soft: bool = False
    actor: ActorOptions | None = None
    labels: tuple[LabelRule, ...] = ()
    """What the labels of its node must be."""
    liked_labels: tuple[LabelRule, ...] = ()
    """What they should be, where there is a choice."""
    group: bytes = b""
    """The placement group that it runs in."""
    bundle: int = -1
    """Which bundle of the group; -1: any."""
    captures: bool = False
    """What it submits runs in its group, too, unless told otherwise."""
    environment: bytes = b""
    """Id of the definition that holds the runtime environment; empty without one."""
    packages: list[bytes] = []
    """Ids of the definitions that hold what the environment has workers unpack."""


# -------------------------------------------------------------------------------------------------------- client → raylet
class RegisterDriver(Message, tag=1):
    """First message of a driver. Answered by `Registered`, or `Refused` where versions differ."""

    version: str
    python: str
    pid: int
    namespace: str
    cwd: str
    sys_path: list[str]
    as_ray: bool
    """Whether `import ray` means hpcray."""
    log_to_driver: bool


class StopJob(Message, tag=2):
    """`hpcray stop`, or the end of a driver that owns its job: end it with this exit code. No answer but the end."""

    code: int


class Define(Message, tag=3):
    """A definition (function, class, job configuration) ahead of its first use. Also raylet → raylet and raylet → worker."""

    id: bytes
    blob: bytes


class DefineTemplate(Message, tag=4):
    """A template ahead of its first use; what it refers to was defined before. Also raylet → raylet, → worker, → GCS."""

    id: bytes
    template: Template


class Submit(Message, tag=5):
    """Run a task. Its returns are objects homed here and held by the sender; no answer."""

    task: bytes
    template: bytes
    arguments: bytes
    dependencies: list[bytes]
    nested: list[bytes]
    lane: int = 0
    """It runs already, on this lane: only to be remembered. Likewise in `Call`."""


class CreateActor(Message, tag=6):
    """Create an actor; its handle is the object `actor`+0. No answer: failures reach whoever calls it."""

    actor: bytes
    template: bytes
    arguments: bytes
    dependencies: list[bytes]
    nested: list[bytes]
    name: str
    namespace: str
    detached: bool


class Call(Message, tag=7):
    """Call an actor's method; calls of one client to one actor keep their order."""

    task: bytes
    actor: bytes
    method: str
    arguments: bytes
    dependencies: list[bytes]
    nested: list[bytes]
    num_returns: int
    lane: int = 0


class Get(Message, tag=8):
    """Send these objects' values when they exist, as `InlineObject` or `StoredObject`; `blocks`: the worker waits for them."""

    ids: list[bytes]
    blocks: bool


class StopGetting(Message, tag=9):
    """The sender's `get` timed out: it wants no value any more and is not blocked."""


class Watch(Message, tag=10):
    """Say `Ready` when each of these objects exists, with `fetch` once a copy is on this node. A worker counts as blocked."""

    ids: list[bytes]
    fetch: bool


class PutInline(Message, tag=11):
    """A small object, held by the sender from now on."""

    id: bytes
    data: bytes
    nested: list[bytes]


class Reserve(Message, tag=12):
    """Room for an object in the arena. Answered by `Reserved` or `ReserveFailed`."""

    id: bytes
    size: int


class Seal(Message, tag=13):
    """The reserved object is written; held by the sender from now on. `file` and `line`: where the user put it."""

    id: bytes
    nested: list[bytes]
    file: str = ""
    line: int = 0


class Unreserve(Message, tag=30):
    """The object of an unanswered or answered `Reserve` will not be written (the user interrupted it, or it failed)."""

    id: bytes


class AddReferences(Message, tag=14):
    """The sender unpickled references that it did not hold."""

    ids: list[bytes]


class Release(Message, tag=15):
    """The sender's last references to these objects are gone."""

    ids: list[bytes]


class Unpin(Message, tag=16):
    """The sender's last views of these objects' memory are gone (an id once per `StoredObject` received)."""

    ids: list[bytes]


class KeepForever(Message, tag=17):
    """References left hpcray's sight (the user pickled them): hold them as long as the job lives."""

    ids: list[bytes]


class TaskDone(Message, tag=18):
    """A worker finished a task or call. `failed`: it raised; `retry`: and that exception is to be retried."""

    task: bytes
    results: list[Result]
    failed: bool
    retry: bool
    seconds: float


class HandBack(Message, tag=19):
    """A worker that blocks returns what it has not started."""

    tasks: list[bytes]


class ActorReady(Message, tag=20):
    """The worker finished `__init__`: None, or the error's payload."""

    actor: bytes
    error: bytes | None


class SetupFailed(Message, tag=28):
    """The worker cannot be set up with the environment of its first work, and ends: the payload of the error."""

    error: bytes


class Unblocked(Message, tag=21):
    """A worker's `get` or `wait` returned to user code."""


class Kill(Message, tag=22):
    """`hpcray.kill(actor)`."""

    actor: bytes
    no_restart: bool


class Query(Message, tag=23):
    """A question to raylet or GCS, answered by `Answer` with the same number."""

    number: int
    topic: str
    arguments: bytes


class OpenLane(Message, tag=24):
    """A driver waits for each of its calls of this template or actor: may it speak to the worker itself? Answered by
    `LaneOpened` or `LaneClosed`."""

    lane: int
    template: bytes
    actor: bytes


class CloseLane(Message, tag=25):
    """The driver will not use the lane any more, and has no call under way on it."""

    lane: int


class LaneDone(Message, tag=26):
    """What a call that the raylet was told of has returned on its lane; small, and without references inside."""

    task: bytes
    data: bytes


class LaneIdle(Message, tag=27):
    """A worker has served this lane long enough, or waited too long for a call on it. No answer but the lane's end."""

    home: int
    client: int
    lane: int


class AwaitPlacementGroup(Message, tag=29):
    """The sender's new object `id` comes to exist, with this payload, when the group does; with an error if it never will."""

    id: bytes
    group: bytes
    data: bytes


class RecallDone(Message, tag=35):
    """A worker's answer to `Recalled`: it has none of these tasks any more."""


# -------------------------------------------------------------------------------------------------------- raylet → client
class Registered(Message, tag=40):
    """First message to every client; the arena's descriptor comes with it, and for a worker that of its tokens."""

    rank: int
    prefix: bytes
    job: bytes
    definition: bytes
    """Id of the definition that holds the job's configuration; drivers put it into their templates."""
    namespace: str
    inline_limit: int
    arena_size: int
    host: str


class Refused(Message, tag=41):
    """This raylet will not serve that driver; the connection ends."""

    reason: str


class Run(Message, tag=42):
    """Run a task (`actor` empty), create an actor (`method` empty), or call a method."""

    task: bytes
    template: bytes
    actor: bytes
    method: str
    arguments: bytes
    values: list[Value]
    num_returns: int
    is_behind: bool = False
    """It was sent behind another task: not to be started without a token."""


class InlineObject(Message, tag=43):
    """A small object that was asked for."""

    id: bytes
    data: bytes


class StoredObject(Message, tag=44):
    """An object in an arena, pinned for the receiver until it says `Unpin`."""

    id: bytes
    rank: int
    offset: int
    size: int


class Ready(Message, tag=45):
    """These watched objects exist."""

    ids: list[bytes]


class Reserved(Message, tag=46):
    """Write the object at this offset of the raylet's arena, then `Seal` it (or name it in `TaskDone`)."""

    id: bytes
    offset: int


class ReserveFailed(Message, tag=47):
    """There is no room, and none came in time: the payload of an `ObjectStoreFullError`."""

    id: bytes
    error: bytes


class MapArena(Message, tag=48):
    """The arena of another rank of this host; its descriptor comes with it, ahead of any `StoredObject` in it."""

    rank: int
    size: int


class Answer(Message, tag=49):
    """The answer to `Query`: JSON-like data in msgpack, or the payload of an error."""

    number: int
    ok: bool
    payload: bytes


class LogLines(Message, tag=50):
    """Lines that a worker printed. Raylet → rank 0 → driver. An empty `name`: hpcray's own words, to all drivers."""

    job: bytes
    name: str
    pid: int
    host: str
    is_error: bool
    lines: list[str]


class Exit(Message, tag=52):
    """The worker is not needed any more: it ends when it has read this."""


class Exists(Message, tag=53):
    """These returns of the driver's tasks exist and are large; small ones come unasked as `InlineObject`."""

    ids: list[bytes]


class LaneOpened(Message, tag=54):
    """To a driver: here is the socket to the worker, on which `Run` is answered by `LaneReply`."""

    lane: int


class LaneClosed(Message, tag=55):
    """To a driver: there is no such lane, or its worker died and this is the error's payload. Answered by `CloseLane`."""

    lane: int
    error: bytes | None


class LaneWanted(Message, tag=56):
    """To a driver: others wait for what the lane's worker holds. Answered by `CloseLane` when no call is under way."""

    lane: int


class ServeLane(Message, tag=57):
    """To a worker: here is the socket of a driver that will send it calls itself. `is_leased`: of one class of tasks."""

    home: int
    client: int
    lane: int
    is_leased: bool


class AssignGpus(Message, tag=59):
    """To a worker, ahead of what it runs: these GPUs are its own, by what this environment variable calls them, or by their
    numbers."""

    variable: str
    ids: list[str | int]


class BindCpus(Message, tag=61):
    """To a worker, ahead of what it runs: it is to run on these CPUs."""

    cpus: list[int]


class LaneReply(Message, tag=58):
    """Worker → driver on a lane: the payload of the call's result; None: it has to go by the raylets. The driver returns
    that None when its raylet knows of the call."""

    task: bytes
    data: bytes | None


class Recalled(Message, tag=65):
    """To a worker: the raylet has taken the tokens of these tasks, which are its again. Answered by `RecallDone`."""

    tasks: list[bytes]


# -------------------------------------------------------------------------------------------------------- raylet → raylet
class Execute(Message, tag=70):
    """Home → executor, for a task that the GCS granted. Answered by `Finished`, `Crashed` or `Returned`."""

    task: bytes
    attempt: int
    template: bytes
    arguments: bytes
    dependencies: list[Dependency]


class ExecuteCall(Message, tag=71):
    """Caller's raylet → actor's raylet, in order. Answered by `Finished` or `Crashed`."""

    task: bytes
    actor: bytes
    incarnation: int
    method: str
    arguments: bytes
    dependencies: list[Dependency]
    num_returns: int


class Finished(Message, tag=72):
    """Executor → home. Stored results lie in the sender's arena until the home frees them."""

    task: bytes
    attempt: int
    results: list[Result]
    failed: bool
    retry: bool


class Crashed(Message, tag=73):
    """Executor → home: the worker died, or an argument could not be fetched. `error` is the payload of what happened."""

    task: bytes
    attempt: int
    error: bytes


class Returned(Message, tag=99):
    """Executor → home: it had no worker for the task, which was not started. Of several, the last comes first."""

    task: bytes
    attempt: int


class Locate(Message, tag=74):
    """Borrower → home: where is this object? Answered by `Located` once it exists."""

    id: bytes


class Located(Message, tag=75):
    """Home → borrower: the payload itself (small), or its size and the ranks that hold a copy."""

    id: bytes
    data: bytes | None
    size: int
    ranks: list[int]


class Borrow(Message, tag=76):
    """Count one more borrow by `borrower`. Answered by `Borrowed`; until then the sender lets go of nothing."""

    id: bytes
    borrower: int


class Borrowed(Message, tag=77):
    """The home counted a `Borrow` (answers come in the order of the questions)."""


class Unborrow(Message, tag=78):
    """The sender gives back `count` borrows."""

    id: bytes
    count: int


class CopyAdded(Message, tag=79):
    """The sender has a copy of the object, or (`mapped`) a mapping of another rank's → home, whose `Free` it wants."""

    id: bytes
    mapped: bool


class CopyDropped(Message, tag=80):
    """The copy was evicted → home."""

    id: bytes


class Free(Message, tag=81):
    """Home → holders of copies: nothing refers to these objects any more."""

    ids: list[bytes]


class Pull(Message, tag=82):
    """Receiver → holder: send the object's bytes from `start` on under this MPI tag, more urgent pulls first.

    Answered by the bytes, `PullFrom` or `PullFailed`. `via`: the rank whose `PullFrom` named the receiver of this, or -1.
    """

    id: bytes
    tag: int
    urgency: int
    via: int
    start: int


class PullFailed(Message, tag=83):
    """The holder has no such object (any more); `sent` bytes of it are on their way. Tag 0 answers `MapObject`.

    `error`: it does have it, on disk, and no room came for it; the `ObjectStoreFullError` that says so.
    """

    id: bytes
    tag: int
    sent: int
    error: bytes = b""


class PullFrom(Message, tag=97):
    """Holder → receiver, in answer to `Pull`: nothing comes from here, have it from this rank, which is being sent it."""

    id: bytes
    tag: int
    rank: int


class HastenPull(Message, tag=98):
    """Receiver → holder: what was asked for by `Pull`, or by `MapObject` (tag 0), is more urgent now. Ignored if it is over."""

    id: bytes
    tag: int
    urgency: int


class MapObject(Message, tag=84):
    """Same host: pin the object for the sender. Answered by `ObjectMapped`, or `PullFailed` with tag 0."""

    id: bytes
    urgency: int


class ObjectMapped(Message, tag=85):
    """The object lies at this offset of the sender's arena and stays until `UnmapObject`."""

    id: bytes
    offset: int
    size: int


class UnmapObject(Message, tag=86):
    """The sender's mapping of the object is gone."""

    id: bytes


class RecallMapping(Message, tag=95):
    """Owner → mapper, for want of room: unmap the object as soon as no client looks at it. Answered by `UnmapObject`."""

    id: bytes


class CopyLost(Message, tag=96):
    """Holder → home: the primary copy could not be read back from disk; `error` is the payload for those who want it."""

    id: bytes
    error: bytes


class Survey(Message, tag=88):
    """Asker's raylet → every raylet: your part of the answer to this `Query`. Answered by `Surveyed`."""

    client: int
    number: int
    topic: str
    arguments: bytes


class Surveyed(Message, tag=89):
    """The sender's part of the answer."""

    client: int
    number: int
    payload: bytes


class StartActor(Message, tag=87):
    """Home → the raylet that the GCS chose: begin this incarnation. Reported by `ActorStarted` to the GCS."""

    actor: bytes
    incarnation: int
    template: bytes
    arguments: bytes
    dependencies: list[Dependency]


class StartLane(Message, tag=91):
    """Home → the rank of its host where the worker is. Answered by the lane's socket over the doorbell, or `LaneLost`."""

    client: int
    lane: int
    template: bytes
    actor: bytes


class EndLane(Message, tag=92):
    """Home → the worker's rank: the driver has closed the lane."""

    client: int
    lane: int


class LaneLost(Message, tag=93):
    """The worker's rank → home: the lane was refused (error None), or its worker died."""

    client: int
    lane: int
    error: bytes | None


class WantLane(Message, tag=94):
    """The worker's rank → home: others wait for what the lane's worker holds. Answered by `EndLane`."""

    client: int
    lane: int


# ----------------------------------------------------------------------------------------------------------- raylet → GCS
class Demand(Message, tag=100):
    """So many tasks of this template wait at the sender (absolute; answered by `Grant`s as room comes).

    `near`: of these, how many have most of their arguments on which rank.
    """

    template: bytes
    count: int
    near: dict[int, int] = {}


class Load(Message, tag=101):
    """What the sender has free (`units`: of each GPU), and per template: room for more tasks and how many granted tasks
    arrived in all."""

    available: dict[str, int]
    units: dict[str, dict[int, int]]
    room: dict[bytes, int]
    arrived: dict[bytes, int]


class Stuck(Message, tag=115):
    """So many tasks of this template have found no place for long: the GCS tells drivers why. No answer."""

    template: bytes
    count: int


class GrantReturned(Message, tag=102):
    """So many granted places were not needed."""

    template: bytes
    rank: int
    count: int


class RegisterActor(Message, tag=103):
    """The actor's home asks for a place; the answer is `PlaceActor`, or `ActorChanged` with its failure.

    With an `error`, the actor is dead from the start: an argument of its creation failed, or its last handle was gone
    before they existed.
    """

    actor: bytes
    template: bytes
    name: str
    namespace: str
    detached: bool
    error: bytes | None = None


class ActorStarted(Message, tag=104):
    """The hosting raylet: `__init__` returned (error None) or failed with this payload."""

    actor: bytes
    incarnation: int
    error: bytes | None


class ActorEnded(Message, tag=105):
    """The hosting raylet: the actor's worker is gone."""

    actor: bytes
    incarnation: int
    error: bytes


class ActorUnreferenced(Message, tag=106):
    """The actor's home: its last handle is gone."""

    actor: bytes


class KillActor(Message, tag=107):
    """`hpcray.kill` → GCS → hosting raylet."""

    actor: bytes
    no_restart: bool


class WatchActor(Message, tag=108):
    """Tell the sender of this actor's changes, starting with its present state."""

    actor: bytes


class Ask(Message, tag=109):
    """A client's `Query` on its way to the GCS; answered by `Told`."""

    client: int
    number: int
    topic: str
    arguments: bytes


class CreatePlacementGroup(Message, tag=111):
    """Client → its raylet → GCS: reserve all bundles or none. State changes reach those who `WatchPlacementGroup`."""

    group: bytes
    job: bytes
    name: str
    namespace: str
    strategy: str
    bundles: list[dict[str, int]]
    is_detached: bool
    labels: list[list[LabelRule]]
    """Per bundle; empty: none has any."""


class RemovePlacementGroup(Message, tag=112):
    """Client → its raylet → GCS: give the bundles back; what runs in them ends."""

    group: bytes


class WatchPlacementGroup(Message, tag=113):
    """Tell the sender of this group's changes, starting with its present state."""

    group: bytes


class BundlesReserved(Message, tag=114):
    """Answer to `ReserveBundles`: all of them, or none for want of room. Followed by `Load`, in the same frame."""

    group: bytes
    ok: bool


class EndJob(Message, tag=110):
    """Rank 0's raylet: a driver is gone; drop its actors and demands."""

    job: bytes


# ----------------------------------------------------------------------------------------------------------- GCS → raylet
class Grant(Message, tag=130):
    """Send up to `count` waiting tasks of this template to `rank`."""

    template: bytes
    rank: int
    count: int


class PlaceActor(Message, tag=131):
    """To the actor's home: start this incarnation on `rank`."""

    actor: bytes
    incarnation: int
    rank: int


class ActorChanged(Message, tag=132):
    """To watchers: `state` is 'pending', 'alive' (on `rank`) or 'dead' (`error` is the payload that callers get)."""

    actor: bytes
    state: str
    rank: int
    incarnation: int
    error: bytes


class StopActor(Message, tag=133):
    """To the hosting raylet: end the actor's worker, now or (`drain`) after the calls it has. `why`: half a sentence."""

    actor: bytes
    drain: bool
    why: str


class Told(Message, tag=134):
    """The answer to `Ask`."""

    client: int
    number: int
    ok: bool
    payload: bytes


class JobEnded(Message, tag=135):
    """To every raylet: end the workers of this job."""

    job: bytes


class PlacementGroupChanged(Message, tag=137):
    """To watchers: `state` is 'pending', 'created', 'rescheduling' or 'removed' (also: never known)."""

    group: bytes
    state: str


class ReserveBundles(Message, tag=138):
    """To a raylet: set these bundles (by their index) aside, all or none. Answered by `BundlesReserved`."""

    group: bytes
    bundles: dict[int, dict[str, int]]


class ReturnBundles(Message, tag=139):
    """To a raylet: these bundles of the group (empty: all) are bundles no more; what runs in them ends."""

    group: bytes
    bundles: list[int]


class Shutdown(Message, tag=136):
    """To every rank: the job ends with this exit code."""

    code: int


class JobConfig(msgspec.Struct):
    """What a worker must know to import as the driver does; travels as an opaque definition."""

    job: str
    namespace: str
    cwd: str
    sys_path: list[str]
    as_ray: bool
    """Whether `import ray` means hpcray."""


ClientMessage: TypeAlias = (
    RegisterDriver | StopJob | Define | DefineTemplate | Submit | CreateActor | Call | Get | StopGetting | Watch | PutInline
    | Reserve | Seal | Unreserve | AddReferences | Release | Unpin | KeepForever | TaskDone | HandBack | ActorReady
    | Unblocked | Kill | Query | OpenLane | CloseLane | LaneDone | LaneIdle | CreatePlacementGroup | RemovePlacementGroup
    | AwaitPlacementGroup | SetupFailed | RecallDone
)  # fmt: skip
RayletToClient: TypeAlias = (
    Registered | Refused | Define | DefineTemplate | Run | InlineObject | StoredObject | Ready | Reserved | ReserveFailed
    | MapArena | Answer | LogLines | Exit | Exists | LaneOpened | LaneClosed | LaneWanted | ServeLane | LaneReply
    | AssignGpus | BindCpus | Recalled
)  # fmt: skip
PeerMessage: TypeAlias = (
    Define | DefineTemplate | Execute | ExecuteCall | Finished | Crashed | Locate | Located | Borrow | Borrowed | Unborrow
    | CopyAdded | CopyDropped | Free | Pull | PullFailed | PullFrom | HastenPull | MapObject | ObjectMapped | UnmapObject
    | RecallMapping | CopyLost
    | Survey | Surveyed | StartActor | LogLines
    | Demand | Load | Stuck | GrantReturned | RegisterActor | ActorStarted | ActorEnded | ActorUnreferenced | KillActor
    | WatchActor | Ask | EndJob | CreatePlacementGroup | RemovePlacementGroup | WatchPlacementGroup | BundlesReserved
    | PlacementGroupChanged | ReserveBundles | ReturnBundles | Grant | PlaceActor | ActorChanged | StopActor | Told
    | JobEnded | Shutdown | StartLane | EndLane | LaneLost | WantLane | Returned
)  # fmt: skip
