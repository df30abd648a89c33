"""The reference protocol against a model of reachability: nothing reachable is freed, nothing unreachable stays.

The model, `World`, knows no count, borrow or hold. It hears what user programs say to their raylets (put, submit, finish,
pickle) and sees which references their processes have; what a program could still come to read follows from that alone.
Three raylets run on the fake cluster, and Hypothesis chooses who does what next and which link delivers next.

After every delivery, whatever can certainly be reached must exist at its home. Whenever nothing is under way, the homes
must know exactly what can be reached, and count exactly the ranks that have a way to it. When all processes have let go of
everything, nothing may be left.

The tests at the end break one rule of the protocol at a time, and the machine has to find each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from random import Random
from typing import Any, NamedTuple, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from hpcray import payload
from hpcray.exceptions import InternalError
from hpcray.ids import home_of, object_id, task_of
from hpcray.protocol import messages as m
from hpcray.raylet.calls import Calls
from hpcray.raylet.core import RayletCore
from hpcray.raylet.tasks import Tasks
from hpcray.store.entry import INLINE, Entry
from hpcray.store.references import References
from hpcray.store.table import ObjectTable
from hpcray.testing.cluster import Cluster, Link
from hpcray.testing.process import Process, open_value

T = TypeVar("T")
FOR_EVER = -1
LARGE = 2000


class Arguments(NamedTuple):
    """What a task, call or creation that is not over holds, and with what it fails."""

    references: tuple[bytes, ...]
    dependencies: tuple[bytes, ...]
    num_returns: int
    retries: int
    actor: bytes


class World:
    """What programs can reach, from what their processes say and have. `doubtful`: may have failed with a death or error."""

    def __init__(self) -> None:
        self.inside: dict[bytes, list[bytes]] = {}
        self.pending: dict[bytes, Arguments] = {}
        self.creations: dict[bytes, Arguments] = {}
        self.kept: list[tuple[int, bytes]] = []
        self.errors: set[bytes] = set()
        self.doubtful: set[bytes] = set()
        self.templates: dict[bytes, m.Template] = {}

    def hear(self, rank: int, message: m.ClientMessage) -> None:
        """A process on `rank` says something to its raylet."""
        match message:
            case m.DefineTemplate():
                self.templates[message.id] = message.template
            case m.PutInline() | m.Seal():
                self.inside[message.id] = message.nested
            case m.KeepForever():
                self.kept += [(rank, identifier) for identifier in message.ids]
            case m.Submit():
                template = self.templates[message.template]
                self._begin(message, self.pending, message.task, template.num_returns, template.max_retries)
            case m.Call():
                self._begin(message, self.pending, message.task, message.num_returns, 0, message.actor)
            case m.CreateActor():
                self._begin(message, self.creations, message.actor, 0, 0)
            case m.TaskDone():
                for index, result in enumerate(message.results, 1):
                    self.inside[object_id(message.task, index)] = result.nested
                ended = self.pending.pop(message.task)
                self.doubtful.discard(message.task)
                if message.failed:
                    self._fail(message.task, ended)
            case _:
                pass

    def _begin(self, message: Any, kind: dict[bytes, Arguments], task: bytes, *more: Any) -> None:
        num_returns, retries, actor = (*more, b"")[:3]
        handle = (object_id(actor, 0),) if actor else ()
        references = (*message.dependencies, *message.nested, *handle)
        kind[task] = Arguments(references, tuple(message.dependencies), num_returns, retries, actor)
        if actor in self.doubtful or any(
            identifier in self.errors or task_of(identifier) in self.doubtful for identifier in message.dependencies
        ):
            self.doubt(task)

    def _fail(self, task: bytes, arguments: Arguments) -> None:
        self.errors |= _returns(task, arguments)
        self._doubt_dependents(_returns(task, arguments))

    def _doubt_dependents(self, identifiers: set[bytes]) -> None:
        for task, arguments in [*self.pending.items(), *self.creations.items()]:
            if identifiers.intersection(arguments.dependencies):
                self.doubt(task)

    def doubt(self, task: bytes) -> None:
        """This task, call or actor may have come to a bad end, and so all that depends on it."""
        if task in self.doubtful:
            return
        self.doubtful.add(task)
        if (arguments := self.pending.get(task)) is not None:
            self._doubt_dependents(_returns(task, arguments))
        for call, arguments in list(self.pending.items()):
            if arguments.actor == task:
                self.doubt(call)

    def lose(self, process: Process) -> None:
        """A worker dies, or its raylet is about to notice: what was given to it is lost, if it is not tried again."""
        worker = process.client.worker
        assert worker is not None
        for task in worker.tasks:
            if task in self.creations or (task in self.pending and not self.pending[task].retries):
                self.doubt(task)
        if process.actor or worker.actor:
            self.doubt(process.actor or worker.actor or b"")

    def settle(self, is_pending: Callable[[bytes], bool]) -> None:
        """Nothing is under way: each doubt can be resolved by asking."""
        for task in list(self.doubtful):
            if task in self.pending and not is_pending(task):
                self._fail(task, self.pending.pop(task))
        for task in list(self.creations):
            if not is_pending(task):
                del self.creations[task]

    def reachable(self, processes: Iterable[Process], *, certainly: bool) -> dict[bytes, set[int]]:
        """All objects that can be reached, and the ranks that have a way to each in their own hands."""
        roots = [(p.rank, identifier) for p in processes for identifier in (*p.held, *p._written)]
        roots += self.kept
        for task, arguments in self.pending.items():
            if not certainly or task not in self.doubtful:
                roots += [(home_of(task), identifier) for identifier in arguments.references]
        if not certainly:
            for actor, arguments in self.creations.items():
                roots += [(home_of(actor), identifier) for identifier in arguments.references]
        return self._closure(roots)

    def _closure(self, roots: Iterable[tuple[int, bytes]]) -> dict[bytes, set[int]]:
        found: dict[bytes, set[int]] = {}
        stack = list(roots)
        while stack:
            rank, identifier = stack.pop()
            if identifier not in found:
                stack += [(home_of(identifier), inner) for inner in self._held_by(identifier)]
            found.setdefault(identifier, set()).add(rank)
        return found

    def _held_by(self, identifier: bytes) -> Sequence[bytes]:
        actor = task_of(identifier)
        if actor in self.creations and actor not in self.doubtful:
            return self.creations[actor].references
        return self.inside.get(identifier, ())

    def is_argument(self, identifier: bytes) -> bool:
        """Whether something that is not over waits for, or has, this object itself."""
        pending = (*self.pending.values(), *self.creations.values())
        return any(identifier in arguments.dependencies for arguments in pending)

    def reaches(self, identifier: bytes, task: bytes) -> bool:
        """Whether a return of `task` that held `identifier` would hold itself: counting frees no circle."""
        return any(task_of(found) == task for found in self._closure([(0, identifier)]))


def _returns(task: bytes, arguments: Arguments) -> set[bytes]:
    return {object_id(task, index) for index in range(1, arguments.num_returns + 1)}


class Watched(Cluster):
    """A fake cluster that tells a World what happens and asks it after each delivery."""

    def __init__(self, machines: Sequence[str]) -> None:
        super().__init__([1, 1, 1], machines=machines, arena_size=1 << 18)
        self.world = World()
        self.seen: set[bytes] = set()
        for node in self.ranks:
            node.send_up = partial(self._hear, node.send_up, node)  # type: ignore[method-assign]

    def _hear(self, send_up: Callable[[int, Any], None], node: Any, number: int, message: m.ClientMessage) -> None:
        process = node.processes.get(number)
        if process is not None and not process.is_gone:
            self.world.hear(node.rank, message)
        send_up(number, message)

    def entry(self, identifier: bytes) -> Entry | None:
        """What the home knows."""
        return self.ranks[home_of(identifier)].core.table.entries.get(identifier)

    def deliver(self, link: Link) -> None:
        kind, rank, number = link
        if (
            kind == "up"
            and self.links[link][0] is None
            and not (process := self.ranks[rank].processes[number]).is_driver
        ):
            self.world.lose(process)
        super().deliver(link)
        self.judge()

    def judge(self) -> None:
        """Whatever can certainly be reached must exist, once it has come into being."""
        for node in self.ranks:
            self.seen.update(i for i in node.core.table.entries if home_of(i) == node.rank)
        for identifier in self.world.reachable(self.processes, certainly=True):
            entry = self.entry(identifier)
            assert entry is not None or identifier not in self.seen, f"{identifier.hex()} was freed, and can be reached"
            assert entry is None or not _is_lost(entry), f"{identifier.hex()} was lost, and can be reached"

    def drain(self, choose: Callable[[list[Link]], Link] = lambda links: links[0]) -> None:
        """Nothing is under way: the homes must know exactly what can be reached, and from which ranks."""
        self.run(choose)
        self.world.settle(self._is_pending)
        expected = self.world.reachable(self.processes, certainly=False)
        for node in self.ranks:
            for identifier, entry in node.core.table.entries.items():
                if home_of(identifier) == node.rank:
                    assert identifier in expected, f"{identifier.hex()} stays, and cannot be reached"
                    assert all(count > 0 for count in (entry.borrowers or {}).values())
                else:
                    assert not entry.holds or node.rank in expected.get(identifier, ()), (
                        f"{identifier.hex()} is held at rank {node.rank}, where nothing reaches it"
                    )
        for identifier, ranks in expected.items():
            known = self.entry(identifier)
            assert known is not None, f"{identifier.hex()} does not exist, and can be reached"
            borrowers, others = set(known.borrowers or ()), ranks - {home_of(identifier)}
            # A borrow may be given back as late as when the last task there that has the object as an argument ends.
            assert borrowers == others or (borrowers > others and self.world.is_argument(identifier)), (
                f"{identifier.hex()} is borrowed by {known.borrowers}, and reached from {others}"
            )

    def _is_pending(self, task: bytes) -> bool:
        core = self.ranks[home_of(task)].core
        queued = (call.message.task for view in core.calls.views.values() for q in view.queues.values() for call in q)
        return task in core.tasks.tasks or task in core.calls.sent or task in core.calls.created or task in queued


def _is_lost(entry: Entry) -> bool:
    if entry.state != INLINE or not payload.is_error(entry.data) or entry.data[0] != payload.SYSTEM_ERROR:
        return False
    return payload.describe_system_error(entry.data)[0] == "ObjectLostError"


def one_of(pick: int, items: Sequence[T]) -> T:
    return items[pick % len(items)]


picks = st.integers(0, 1 << 10)
some = st.lists(picks, max_size=2)
LAYOUTS = [("a", "b", "c"), ("a", "a", "b")]
ENDINGS = [
    "keeps it",
    "keeps it",
    "returns a new one",
    "returns a new one",
    "runs on",
    "returns it",
    "returns it in another",
]
SELDOM = ["create", "call", "pickle", "unpickle", "kill"]
LINKS: list[Link] = [("rank", source, target) for source in range(3) for target in range(3) if source != target]


slow_links = st.lists(st.sampled_from(LINKS), max_size=2)


def action(**strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Any]:
    """A rule after which (and, where it says so, in which) all arrives that is not on a slow link, or nothing."""

    def decorate(act: Callable[..., None]) -> Any:
        def acted(self: ReferencesMachine, first: int | None, slow: list[Link], **arguments: Any) -> None:
            self.first, self.slow = first, slow
            act(self, **arguments)
            self.let_arrive()

        acted.__name__ = act.__name__
        return rule(first=st.sampled_from([0, 0, -1, None]), slow=slow_links, **strategies)(acted)

    return decorate


class ReferencesMachine(RuleBasedStateMachine):
    """Each rule is one action of a program or of fate; which, of those that there are, is what is picked."""

    @initialize(machines=st.sampled_from(LAYOUTS), drivers=st.integers(1, 2))
    def boot(self, machines: tuple[str, ...], drivers: int) -> None:
        self.cluster = Watched(machines)
        self.world = self.cluster.world
        self.drivers = [self.cluster.add_driver() for _ in range(drivers)]
        self.actors: list[bytes] = []
        self.pickled: list[tuple[Process, int, list[bytes]]] = []
        self.slow: list[Link] = []
        self.first: int | None = 0
        # Each driver has an object of every rank, and on every rank a task has begun.
        for driver in self.drivers:
            for rank in range(3):
                template = self.cluster.template(driver, f"lend{rank}", node=rank, resources={})
                (outer,) = driver.submit(template)
                self.cluster.run()
                worker = self.cluster.worker_on(rank)
                worker.finish([worker.put()])
                self.cluster.run()
                driver.release([outer])
        for rank in range(3):
            driver.submit(self.cluster.template(driver, f"lend{rank}", node=rank, resources={}))
        self.cluster.drain()

    # ------------------------------------------------------------------------------------------------------------ picking
    def acting(self, pick: int) -> Process:
        """A driver, or a worker in a task."""
        acting = [p for p in self.cluster.processes if (p.is_driver or p.running) and not p.is_blocked]
        return one_of(pick, [p for p in acting if p.held or p.is_driver])

    def refs(self, process: Process, choice: Iterable[int], *, handles: bool = True) -> list[bytes]:
        held = sorted(i for i in process.held if handles or task_of(i) not in self.actors)
        return sorted({one_of(pick, held) for pick in choice}) if held else []

    # --------------------------------------------------------------------------------------------------------- the network
    def let_arrive(self) -> None:
        if self.first is not None:
            self.cluster.run(lambda links: links[self.first or 0], hold=self.slow, check=False)

    @rule(order=st.lists(picks, min_size=1, max_size=6))
    def deliver(self, order: list[int]) -> None:
        if len(order) == 6:
            turn = iter(order * 1000)
            self.cluster.drain(lambda links: one_of(next(turn), links))
            return
        for pick in order:
            if links := self.cluster.choices():
                self.cluster.deliver(one_of(pick, links))

    # -------------------------------------------------------------------------------------------------------- the programs
    @action(who=picks, nested=some, large=st.booleans())
    def put(self, who: int, nested: list[int], large: bool) -> None:
        process = self.acting(who)
        process.put(self.refs(process, nested), LARGE if large else 0, large=large)

    @action(
        who=picks,
        dependencies=some,
        nested=some,
        where=st.sampled_from([None, 0, 1, 2]),
        needs_cpu=st.booleans(),
        num_returns=st.integers(1, 2),
        retries=st.sampled_from([0, FOR_EVER]),
    )
    def submit(
        self,
        who: int,
        dependencies: list[int],
        nested: list[int],
        where: int | None,
        needs_cpu: bool,
        num_returns: int,
        retries: int,
    ) -> None:
        process = self.acting(who)
        template = self.cluster.template(
            process,
            f"f{where}{needs_cpu}{num_returns}{retries}",
            node=where,
            resources={"CPU": 10_000} if needs_cpu else {},
            num_returns=num_returns,
            max_retries=retries,
        )
        waited_for = self.refs(process, dependencies, handles=False)
        process.submit(template, waited_for, self.refs(process, nested), num_returns)

    @action(
        who=picks,
        which=st.lists(picks, min_size=1, max_size=2),
        where=st.sampled_from([0, 1, 2]),
        forgets=st.sampled_from([True, True, False]),
        then=st.sampled_from(ENDINGS),
        borrows_slowly=st.booleans(),
    )
    def lend(self, who: int, which: list[int], where: int, forgets: bool, then: str, borrows_slowly: bool) -> None:
        # f.remote([x]); del x        or        x = get(f.remote([x]))[0]
        process = self.acting(who)
        lent = self.refs_from_afar(process, which, where)
        if borrows_slowly:
            self.slow = [*self.slow, *(("rank", where, home_of(i)) for i in lent[:1])]
        (result,) = process.submit(self.cluster.template(process, f"lend{where}", node=where, resources={}), [], lent)
        if forgets:
            outer = [i for i in process.held if set(self.world.inside.get(i, ())) & set(lent)]
            process.release(sorted(i for i in (*lent, *outer) if i not in process.wanted))
        self.let_arrive()
        for worker in self.cluster.running:
            if worker.running is not None and worker.running.task == task_of(result):
                if then == "keeps it":
                    worker.finish(keep=True)
                elif then == "returns it":
                    worker.finish(lent)
                elif then == "returns it in another":
                    worker.finish([worker.put(lent)])
                elif then == "returns a new one":
                    worker.finish([worker.put()])
        self.let_arrive()
        if forgets and result in process.values:
            process.release([result])

    def refs_from_afar(self, process: Process, choice: list[int], where: int) -> list[bytes]:
        refs = self.refs(process, range(1 << 5))
        afar = [i for i in refs if home_of(i) not in (process.rank, where)]
        first, *more = choice
        return (
            list(dict.fromkeys([one_of(first, afar or refs), *(one_of(pick, refs) for pick in more)])) if refs else []
        )

    @action(who=picks, which=picks, borrows_slowly=st.booleans())
    def unwrap(self, who: int, which: int, borrows_slowly: bool) -> None:
        # x = get(outer)[0]; del outer
        process = self.acting(who)
        unread = [i for i in self.refs(process, range(1 << 5)) if self.world.inside.get(i) and i not in process.values]
        if unread:
            outer = one_of(which, [i for i in unread if home_of(i) != process.rank] or unread)
            if borrows_slowly:
                self.slow = [*self.slow, *(("rank", process.rank, home_of(i)) for i in self.world.inside[outer])]
            process.get([outer])
            self.let_arrive()
            if outer not in process.wanted:
                process.release([outer])

    @action(who=picks, which=st.lists(picks, min_size=1, max_size=2))
    def get(self, who: int, which: list[int]) -> None:
        # Workers get only what exists: so nobody waits for one who waits for him.
        process = self.acting(who)
        wanted = self.refs(process, which, handles=False)
        process.get([i for i in wanted if process.is_driver or i in self.world.inside])

    @action(who=picks, which=st.lists(picks, min_size=1, max_size=3))
    def release(self, who: int, which: list[int]) -> None:
        process = one_of(who, self.cluster.processes)
        process.release([i for i in self.refs(process, which) if i not in process.wanted])

    @action(
        who=picks,
        puts=st.booleans(),
        nested=some,
        large=st.booleans(),
        keep=st.booleans(),
        failed=st.sampled_from([False] * 5 + [True]),
    )
    def finish(self, who: int, puts: bool, nested: list[int], large: bool, keep: bool, failed: bool) -> None:
        if running := self.cluster.running:
            worker = one_of(who, running)
            work = worker.running
            assert work is not None
            new = [worker.put()] if puts else []
            refs = [i for i in self.refs(worker, nested) if not self.world.reaches(i, work.task)]
            is_creation = bool(work.actor and not work.method)
            worker.finish(
                sorted({*new, *refs}),
                size=LARGE if large else 0,
                large=large,
                keep=keep,
                failed=failed and not is_creation,
            )

    @action(
        what=st.sampled_from(SELDOM),
        who=picks,
        which=picks,
        dependencies=some,
        nested=some,
        where=st.sampled_from([0, 1, 2]),
    )
    def do_something_seldom(
        self, what: str, who: int, which: int, dependencies: list[int], nested: list[int], where: int
    ) -> None:
        process = self.acting(who)
        waited_for = self.refs(process, dependencies, handles=False)
        if what == "create":
            template = self.cluster.template(
                process, f"A{where}", node=where, resources={}, num_returns=0, actor=m.ActorOptions()
            )
            self.actors.append(process.create_actor(template, waited_for, self.refs(process, nested)))
        elif what == "call":
            if handles := sorted(i for i in process.held if task_of(i) in self.actors):
                process.call(task_of(one_of(which, handles)), waited_for, self.refs(process, nested))
        elif what == "pickle":
            refs = [process.put()]
            self.pickled.append((process, process.pickle(refs), refs))
            self.unpickle(which, -1)
        elif what == "unpickle":
            self.unpickle(who, which)
        elif workers := self.cluster.workers:
            worker = one_of(which, workers)
            self.world.lose(worker)
            self.cluster.kill(worker)

    def unpickle(self, who: int, which: int) -> None:
        if pickles := [refs for pickler, number, refs in self.pickled if number in pickler.answers]:
            self.acting(who).adopt(one_of(which, pickles))

    # --------------------------------------------------------------------------------------------------------- the end
    def teardown(self) -> None:
        if hasattr(self, "cluster"):
            self.finish_all()
            for driver in self.drivers:
                self.read_all(driver)
            for process in self.cluster.processes:
                process.release(list(process.held))
            self.finish_all()
            self.cluster.drain()
            if not self.world.kept:
                assert self.cluster.leftovers() == []

    def finish_all(self) -> None:
        self.cluster.drain()
        while running := self.cluster.running:
            running[0].finish()
            self.cluster.drain()

    def read_all(self, driver: Process) -> None:
        """All that can be reached from a driver can be read, and is what was stored."""
        while missing := [i for i in driver.held if task_of(i) not in self.actors and i not in driver.values]:
            driver.get(missing)
            self.cluster.run()
            assert not driver.wanted
        for identifier, value in driver.values.items():
            if identifier not in self.world.errors:
                assert open_value(value)[1] == self.world.inside[identifier]


LIMITS = settings(
    max_examples=60,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestReferences = ReferencesMachine.TestCase
TestReferences.settings = LIMITS


# -------------------------------------------------------------------------------------- what the machine must find
Patch = Callable[[Any, str, Any], None]
BREAKAGES: dict[str, Callable[[Patch], None]] = {}


def breakage(function: Callable[[Patch], None]) -> Callable[[Patch], None]:
    BREAKAGES[function.__name__] = function
    return function


def at_once(references: References, action: Callable[[], None]) -> None:
    action()


def before(patch: Patch, owner: type, name: str, first: Callable[..., None]) -> None:
    """Have something done before each call of a method."""
    original = getattr(owner, name)

    def changed(self: Any, *arguments: Any) -> Any:
        first(self, *arguments)
        return original(self, *arguments)

    patch(owner, name, changed)


@breakage
def nothing_waits_for_borrows(patch: Patch) -> None:
    patch(References, "after_borrows", at_once)


@breakage
def unborrow_does_not_wait_for_borrows(patch: Patch) -> None:
    def changed(self: References, entry: Entry) -> None:
        if entry.borrows and not entry.holds and not entry.guests:
            self._out.send(home_of(entry.id), m.Unborrow(entry.id, entry.borrows))
            entry.borrows = 0
        settle(self, entry)

    settle = References.settle
    patch(References, "settle", changed)


@breakage
def replies_do_not_wait_for_borrows(patch: Patch) -> None:
    finish = RayletCore._finish_away

    def changed(self: RayletCore, *arguments: Any) -> None:
        self.references.after_borrows = partial(at_once, self.references)  # type: ignore[method-assign]
        finish(self, *arguments)
        del self.references.after_borrows

    patch(RayletCore, "_finish_away", changed)


@breakage
def the_first_counted_borrow_ends_all_waiting(patch: Patch) -> None:
    def changed(self: References, home: int) -> None:
        del self._uncounted[self._uncounted_by_home[home].popleft()]
        while self._after:
            self._after.popleft()[1]()

    patch(References, "on_borrowed", changed)


@breakage
def objects_are_freed_with_borrowers_left(patch: Patch) -> None:
    def changed(self: References, entry: Entry) -> None:
        if not entry.holds and not entry.guests and home_of(entry.id) == self._rank:
            self._keeper.on_unreachable(entry)
        else:
            settle(self, entry)

    settle = References.settle
    patch(References, "settle", changed)


@breakage
def results_are_not_counted_for_their_receiver(patch: Patch) -> None:
    patch(References, "count_for", lambda self, identifier, borrower: None)


@breakage
def the_receiver_of_a_result_borrows_a_second_time(patch: Patch) -> None:
    patch(References, "hold_counted", References.hold)


@breakage
def references_in_results_are_not_held(patch: Patch) -> None:
    before(patch, ObjectTable, "set_inline", lambda self, identifier, data, nested: _drop_all(self, nested))


def _drop_all(table: ObjectTable, nested: list[bytes]) -> None:
    while nested:
        table.references.drop(nested.pop())


@breakage
def references_in_stored_objects_are_not_held(patch: Patch) -> None:
    before(patch, RayletCore, "_on_put_inline", lambda self, client, message: message.nested.clear())


@breakage
def references_in_freed_objects_are_not_dropped(patch: Patch) -> None:
    before(patch, ObjectTable, "on_unreachable", lambda self, entry: setattr(entry, "nested", None))


@breakage
def arguments_are_not_held(patch: Patch) -> None:
    before(patch, Tasks, "on_submit", lambda self, message: message.nested.clear())


@breakage
def arguments_of_calls_are_not_held(patch: Patch) -> None:
    before(patch, Calls, "on_call", lambda self, message: message.nested.clear())


@breakage
def calls_do_not_hold_the_handle(patch: Patch) -> None:
    call = Calls.on_call

    def changed(self: Calls, message: m.Call) -> None:
        call(self, message)
        if message.task in self.sent:
            self._references.drop(object_id(message.actor, 0))

    patch(Calls, "on_call", changed)
    before(patch, Calls, "_release", lambda self, message: self._references.hold(object_id(message.actor, 0)))


@breakage
def borrows_are_never_given_back(patch: Patch) -> None:
    before(patch, References, "settle", _forget_borrows)


def _forget_borrows(references: References, entry: Entry) -> None:
    if not entry.holds and not entry.guests:
        entry.borrows = 0


@breakage
def one_borrow_is_given_back_of_several(patch: Patch) -> None:
    before(patch, References, "settle", lambda self, entry: setattr(entry, "borrows", min(entry.borrows, 1)))


@breakage
def every_hold_borrows(patch: Patch) -> None:
    def changed(self: References, identifier: bytes) -> Entry:
        entry = hold(self, identifier)
        if entry.holds > 1 and home_of(identifier) != self._rank:
            self._borrow(identifier, self._rank)
        return entry

    hold = References.hold
    patch(References, "hold", changed)


@breakage
def the_dead_go_on_holding(patch: Patch) -> None:
    before(patch, RayletCore, "on_client_gone", lambda self, client, why: client.held.clear())


@breakage
def pickled_references_are_not_kept(patch: Patch) -> None:
    before(patch, RayletCore, "_on_keep_forever", lambda self, client, message: message.ids.clear())


@breakage
def pickling_does_not_wait_for_the_raylet(patch: Patch) -> None:
    def changed(self: Process, identifiers: list[bytes]) -> int:
        self.send(m.KeepForever(identifiers))
        self.answers[0] = m.Answer(0, ok=True, payload=b"")
        return 0

    patch(Process, "pickle", changed)


def random_program(seed: int, steps: int = 40) -> None:
    """The machine driven by chance alone, which reaches what is deep sooner than examples that are to be shrunk."""
    random = Random(seed)
    machine = ReferencesMachine()
    machine.boot(machines=random.choice(LAYOUTS), drivers=random.randint(1, 2))

    def some_picks(most: int, least: int = 0) -> list[int]:
        return [random.randrange(1 << 10) for _ in range(random.randint(least, most))]

    for _ in range(steps):
        who, which = some_picks(2, 2)
        where = random.randrange(3)
        usual: dict[str, Any] = {
            "first": random.choice([0, 0, -1, None]),
            "slow": random.sample(LINKS, random.randint(0, 2)),
            "who": who,
        }
        match random.choices(RULES, WEIGHTS)[0]:
            case "deliver":
                machine.deliver(order=some_picks(6, 1))
            case "put":
                machine.put(**usual, nested=some_picks(2), large=random.random() < 0.3)
            case "submit":
                machine.submit(
                    **usual,
                    dependencies=some_picks(1),
                    nested=some_picks(2),
                    where=random.choice([None, 0, 1, 2]),
                    needs_cpu=random.random() < 0.5,
                    num_returns=random.randint(1, 2),
                    retries=random.choice([0, FOR_EVER]),
                )
            case "lend":
                machine.lend(
                    **usual,
                    which=some_picks(2, 1),
                    where=where,
                    forgets=random.random() < 0.7,
                    then=random.choice(ENDINGS),
                    borrows_slowly=random.random() < 0.5,
                )
            case "unwrap":
                machine.unwrap(**usual, which=which, borrows_slowly=random.random() < 0.5)
            case "get":
                machine.get(**usual, which=some_picks(2, 1))
            case "release":
                machine.release(**usual, which=some_picks(3, 1))
            case "finish":
                machine.finish(
                    **usual,
                    puts=random.random() < 0.3,
                    nested=some_picks(2),
                    large=random.random() < 0.2,
                    keep=random.random() < 0.5,
                    failed=random.random() < 0.1,
                )
            case what:
                machine.do_something_seldom(
                    **usual, what=what, which=which, dependencies=some_picks(1), nested=some_picks(2), where=where
                )
    machine.teardown()


def run_random_programs(seeds: Iterable[int]) -> None:
    for seed in seeds:
        random_program(seed)


RULES = ["deliver", "put", "submit", "lend", "unwrap", "get", "release", "finish", *SELDOM]
WEIGHTS = [3, 2, 2, 8, 4, 2, 3, 4, 1, 2, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("seed", range(0, 100, 10))
def test_random_programs_free_what_nothing_reaches_and_only_that(seed: int) -> None:
    run_random_programs(range(seed, seed + 10))


@pytest.mark.parametrize("name", BREAKAGES)
def test_the_machine_finds_that(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    BREAKAGES[name](monkeypatch.setattr)
    with pytest.raises((AssertionError, InternalError)):
        run_random_programs(range(60, 560))  # there, all are found within seconds
