"""How the ranks of an MPI job run pytest together: rank 0 tests, the others serve.

Rules:
  1. Rank 0 says what happens, in order: a job starts, a test is through, the session is over. The others do that and nothing
     else, so a test that is skipped or fails on rank 0, wherever, leaves nobody waiting.
  2. An order names its test. A rank that is ahead or behind, because it skipped a test that rank 0 ran, catches up.
  3. A bug in serving ends all ranks: a test whose job has lost a rank would wait for ever.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from hashlib import blake2b
from time import sleep
from typing import TYPE_CHECKING, Literal, NamedTuple

import pytest

from hpcray.launcher import bootstrap, connect
from hpcray.launcher.roles import LaunchError

if TYPE_CHECKING:
    from hpcray.launcher.options import JobOptions
    from hpcray.launcher.roles import Launch

COLLECTION_TIMEOUT = 120.0
"""Seconds that rank 0 waits for the others to have collected their tests: imports from a busy file system take their time."""
_TAG = 1
_PAUSE = 0.002
"""Seconds between two looks for a message; MPI's own waiting would keep a core busy."""


class Order(NamedTuple):
    """What rank 0 tells the others."""

    what: Literal["serve", "through", "over"]
    test: str = ""
    options: JobOptions | None = None
    """Of the job to serve."""


def take_part(launch: Launch, config: pytest.Config, items: Sequence[pytest.Item]) -> None:
    """Make this session one of several that run the same tests. Collective.

    Args:
        launch: What this process was launched as.
        items: The tests that use a job.

    Raises:
        pytest.UsageError: MPI cannot be used, or the ranks have different tests.
    """
    try:
        with _uncaptured(config):
            world = bootstrap.enter_world_of_program(launch, COLLECTION_TIMEOUT)
    except LaunchError as error:
        raise pytest.UsageError(f"hpcray: {error}") from None
    if world.size == 1:
        return
    _compare_tests(world, items)
    part = Tester(world, items, config) if world.rank == 0 else Follower(world, items, config)
    config.pluginmanager.register(part, "hpcray-ranks")


def _compare_tests(world: bootstrap.World, items: Sequence[pytest.Item]) -> None:
    mine = blake2b("\n".join(item.nodeid for item in items).encode()).digest()
    first, *others = world.gather_all(mine)
    different = [rank for rank, theirs in enumerate(others, 1) if theirs != first]
    if different:
        raise pytest.UsageError(
            f"hpcray: ranks {different} have collected other tests than rank 0: start all with the same arguments, and let "
            "no test's existence depend on the rank"
        )


class Tester:
    """Rank 0's part: run the tests, and tell the others."""

    def __init__(self, world: bootstrap.World, items: Sequence[pytest.Item], config: pytest.Config) -> None:
        self._world = world
        self._items = set(items)
        self._test = ""
        with _uncaptured(config):
            self._console = os.fdopen(os.dup(2), "w")

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        if item not in self._items:
            return (yield)
        self._test = item.nodeid
        connect.start_on_ranks = self._start_job
        try:
            return (yield)
        finally:
            connect.start_on_ranks = None
            self._tell(Order("through", item.nodeid))

    def _start_job(self, options: JobOptions) -> connect.Connection:
        self._tell(Order("serve", self._test, options))
        return bootstrap.serve_in_thread(options, goes_on=True, console=self._console)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        self._tell(Order("over"))
        self._console.close()

    def _tell(self, order: Order) -> None:
        for rank in range(1, self._world.size):
            self._world.comm.send(order, rank, _TAG)


class Follower:
    """The others' part: in place of each test, do what rank 0 says."""

    def __init__(self, world: bootstrap.World, items: Sequence[pytest.Item], config: pytest.Config) -> None:
        self._world = world
        self._config = config
        self._is_over = False
        for item in items:
            item.setup = _nothing  # type: ignore[method-assign]
            item.runtest = self._in_place_of(item)  # type: ignore[method-assign]

    def _in_place_of(self, item: pytest.Item) -> Callable[[], None]:
        def follow() -> None:
            self._follow(item.nodeid)
            if self._is_over:
                item.session.shouldstop = "rank 0 has ended the session"
                pytest.skip("not run on rank 0")
            if item.get_closest_marker("xfail"):
                pytest.xfail("whether it fails is rank 0's affair")

        return follow

    def _follow(self, until: str | None) -> None:
        failure: Exception | None = None
        while not self._is_over:
            order = self._next_order()
            if order.what == "over":
                self._is_over = True
            elif order.what == "serve":
                assert order.options is not None
                try:
                    with _uncaptured(self._config):  # or the story of an abort would be lost
                        bootstrap.serve_world(order.options, goes_on=True)
                except LaunchError as error:
                    failure = error  # rank 0 has it, too, and tells when it is through with the test
            elif order.test == until:
                break
        if failure is not None:
            raise failure

    def _next_order(self) -> Order:
        while not self._world.comm.Iprobe(0, _TAG):
            sleep(_PAUSE)
        order: Order = self._world.comm.recv(source=0, tag=_TAG)
        return order

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        self._follow(None)


def _nothing() -> None:
    pass


@contextlib.contextmanager
def _uncaptured(config: pytest.Config) -> Iterator[None]:
    manager = config.pluginmanager.getplugin("capturemanager")
    with manager.global_and_fixture_disabled() if manager else contextlib.nullcontext():
        yield
