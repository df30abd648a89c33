"""What a raylet remembers of each process connected to it."""

from __future__ import annotations

from hpcray.protocol.messages import Dependency
from hpcray.raylet.ledger import Holding
from hpcray.store.memory import Block


class Client:
    """A driver or worker, as its raylet sees it."""

    __slots__ = (
        "held", "is_driver", "job", "known", "mapped", "namespace", "number", "pid", "pins", "prefix", "reserved",
        "reserving", "wanted", "wants_logs", "watched", "worker",
    )  # fmt: skip

    def __init__(self, number: int, prefix: bytes, *, is_driver: bool) -> None:
        self.number = number
        self.prefix = prefix
        self.is_driver = is_driver
        self.pid = 0
        self.job = b""
        self.namespace = ""
        self.wants_logs = False
        self.held: set[bytes] = set()
        """References that it holds; each is one hold in the object table."""
        self.pins: dict[bytes, list[Block]] = {}
        """Memory that it looks at, a block as often as it was sent."""
        self.reserving: set[bytes] = set()
        """Objects for which it waits for memory."""
        self.reserved: dict[bytes, Block] = {}
        """Memory that it is writing."""
        self.wanted: set[bytes] = set()
        """Objects of its `get` that it has not been sent."""
        self.watched: set[bytes] = set()
        """Objects of its `wait` that do not exist yet."""
        self.known: set[bytes] = set()
        """Definitions that it has."""
        self.mapped: set[int] = set()
        """Ranks whose arenas it maps."""
        self.worker: Worker | None = None


class Worker:
    """A worker process of the pool, as the scheduler of this raylet sees it."""

    __slots__ = (
        "actor", "client", "environment", "holding", "is_blocked", "is_lent", "is_recalling", "job", "lease_since", "seen",
        "tasks", "template",
    )  # fmt: skip

    def __init__(self, client: Client) -> None:
        self.client = client
        self.job = b""
        """The job whose code it has imported; it serves no other."""
        self.environment = b""
        """The runtime environment that it has entered, likewise, or will before its first work."""
        self.template: bytes | None = None
        """The scheduling class that it is leased to."""
        self.holding: Holding | None = None
        """The resources of its lease."""
        self.tasks: dict[bytes, Work] = {}
        """What was sent to it and not answered, in order: the first one runs."""
        self.is_blocked = False
        self.actor: bytes | None = None
        self.lease_since = 0.0
        self.is_lent = False
        """A driver sends it the tasks of its lease itself."""
        self.seen = b""
        """What it ran when it had several tasks and was looked at last."""
        self.is_recalling = False
        """It has not answered `Recalled`: nothing may be sent to it behind another task."""


class Work:
    """A task, actor creation or actor call that is to run on this raylet."""

    __slots__ = (
        "actor", "arguments", "arrival", "attempt", "dependencies", "error", "home", "is_awaited", "method", "num_returns",
        "task", "template",
    )  # fmt: skip

    def __init__(
        self,
        task: bytes,
        home: int,
        attempt: int,
        template: bytes,
        arguments: bytes,
        dependencies: list[Dependency],
        *,
        actor: bytes = b"",
        method: str = "",
        num_returns: int = 0,
    ) -> None:
        self.task = task
        self.home = home
        self.attempt = attempt
        self.template = template
        self.arguments = arguments
        self.dependencies = dependencies
        self.actor = actor
        self.method = method
        self.num_returns = num_returns
        self.arrival = 0
        """Its place among all work that came here with arguments."""
        self.error: bytes | None = None
        """Why one of them could not be brought."""
        self.is_awaited = False
        """A worker waits for it."""
