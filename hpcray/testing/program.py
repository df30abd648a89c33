"""Random programs for the fake cluster: every action is legal for a user's program, and the outcome can be judged.

Who may wait for whom is restricted so that no program deadlocks by itself: each task has a *path*, its submitter's
extended by a number, and may wait for what it has submitted itself and for what comes before it in that tree. What is
still blocked when nothing is under way and nothing runs is then hpcray's fault.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from hpcray import ids, payload
from hpcray.protocol import messages as m
from hpcray.testing.cluster import Cluster, Link
from hpcray.testing.process import Process

Path = tuple[int, ...]
LARGE = 2000


def may_wait(waiter: Path, other: Path) -> bool:
    """Whether waiting cannot close a circle: descendants, and what lies before in the tree of submissions."""
    if other[: len(waiter)] == waiter:
        return len(other) > len(waiter)
    return waiter[: len(other)] != other and other < waiter


class Program:
    """Drivers and tasks that put, submit, call, get and let go; `finish` brings it to its end and judges it."""

    def __init__(self, cluster: Cluster, random: Random, drivers: int = 1) -> None:
        self.cluster = cluster
        self.random = random
        self.drivers = [cluster.add_driver() for _ in range(drivers)]
        self.has_killed = False
        self.has_failed = False
        self.may_be_full = False
        self.damaged: set[bytes] = set()
        """Objects whose copy on disk was damaged."""
        self._paths: dict[bytes, Path] = {}
        self._children: dict[Path, int] = {}
        self._actors: set[bytes] = set()
        self.groups: dict[bytes, list[int]] = {}
        """Placement groups that nobody has removed, and the CPUs of each bundle."""
        self.removed: list[bytes] = []
        self._inside: dict[bytes, list[bytes]] = {}
        """What each object, task or actor holds: nobody makes objects that hold one another, since counting frees no circle."""

    # ----------------------------------------------------------------------------------------------------------- actors
    def deliver(self, count: int = 1) -> None:
        """Let something arrive."""
        for _ in range(count):
            if links := self.cluster.choices():
                self.cluster.deliver(self.random.choice(links))

    @property
    def actors(self) -> list[Process]:
        """The processes that can do something now: drivers, and workers in a task."""
        ready = [p for p in self.cluster.processes if p.is_driver or p.running is not None]
        return [p for p in ready if not p.is_blocked]

    def somebody(self) -> Process:
        """One of them."""
        return self.random.choice(self.actors)

    def _path(self, process: Process) -> Path:
        assert process.running is not None
        return self._paths[process.running.task]

    def _new_path(self, process: Process) -> Path:
        # Drivers share one numbering: their common path is the root's.
        parent = () if process.is_driver else self._path(process)
        number = self._children[parent] = self._children.get(parent, 0) + 1
        return (*parent, number)

    def _some(self, refs: Sequence[bytes], most: int = 2) -> list[bytes]:
        return self.random.sample(refs, min(len(refs), self.random.randint(0, most)))

    def _refs(self, process: Process, *, with_handles: bool = True) -> list[bytes]:
        return sorted(i for i in process.held if with_handles or i[:-4] not in self._actors)

    def _awaitable(self, process: Process, path: Path) -> list[bytes]:
        refs = self._refs(process, with_handles=False)
        return [i for i in refs if i[:-4] not in self._paths or may_wait(path, self._paths[i[:-4]])]

    def _reaches(self, identifier: bytes, task: bytes) -> bool:
        if identifier[:-4] == task:
            return True
        inside = (*self._inside.get(identifier, ()), *self._inside.get(identifier[:-4], ()))
        return any(self._reaches(inner, task) for inner in inside)

    # ---------------------------------------------------------------------------------------------------------- actions
    def put(self, *, large: bool) -> None:
        """`put` of a value that may hold references."""
        process = self.somebody()
        nested = self._some(self._refs(process))
        self._inside[process.put(nested, LARGE if large else 0, large=large)] = nested

    def submit(self, *, cpus: int = 10_000, spread: bool = False, num_returns: int = 1, retries: int = 0) -> None:
        """`f.remote(ref, [ref])`."""
        process = self.somebody()
        group, bundle, cpus = self._some_bundle(cpus)
        template = self.cluster.template(
            process,
            f"f{cpus}{spread}{num_returns}{retries}{group.hex()}{bundle}",
            resources={"CPU": cpus} if cpus else {},
            spread=spread and not group,
            num_returns=num_returns,
            max_retries=retries,
            group=group,
            bundle=bundle,
        )
        path = self._new_path(process)
        dependencies = self._some(self._awaitable(process, path))
        nested = self._some(self._refs(process))
        refs = process.submit(template, dependencies, nested, num_returns)
        self._paths[refs[0][:-4]] = path

    def create_actor(self, *, restarts: int = 0) -> None:
        """`A.remote(ref, [ref])`."""
        process = self.somebody()
        group, bundle, cpus = self._some_bundle(5_000)
        options = m.ActorOptions(max_restarts=restarts, placement={} if group else {"CPU": 10_000})
        template = self.cluster.template(
            process,
            f"A{restarts}{cpus}{group.hex()}{bundle}",
            resources={"CPU": cpus} if group else {},
            num_returns=0,
            actor=options,
            group=group,
            bundle=bundle,
        )
        path = self._new_path(process)
        dependencies = self._some(self._awaitable(process, path), 1)
        nested = self._some(self._refs(process), 1)
        actor = process.create_actor(template, dependencies, nested)
        self._inside[actor] = [*dependencies, *nested]
        self._paths[actor] = path
        self._actors.add(actor)

    def _some_bundle(self, cpus: int) -> tuple[bytes, int, int]:
        """A group (maybe none, maybe one that is gone), a bundle of it or any, and CPUs that fit."""
        groups = list(self.groups) if self.random.random() < 0.9 else self.removed[-1:]
        if not groups or self.random.random() < 0.5:
            return b"", -1, cpus
        group = self.random.choice(groups)
        bundles = self.groups.get(group, [10_000])
        bundle = self.random.randrange(-1, len(bundles))
        return group, bundle, min(cpus, max(bundles) if bundle < 0 else bundles[bundle])

    def create_group(self, strategy: str) -> None:
        """`placement_group([{"CPU": …}, …])`; anybody may use it at once, as if told by other means."""
        bundles = [self.random.choice([10_000, 5_000]) for _ in range(self.random.randint(1, 3))]
        group = self.somebody().create_group([{"CPU": cpus} for cpus in bundles], strategy)
        self.groups[group] = bundles

    def await_group(self) -> None:
        """`group.ready()`."""
        if groups := [*self.groups, *self.removed[-1:]]:
            self.somebody().await_group(self.random.choice(groups))

    def remove_group(self) -> None:
        """`remove_placement_group(group)`, now and then again."""
        if groups := [*self.groups, *self.removed[-1:]]:
            group = self.random.choice(groups)
            self.somebody().remove_group(group)
            self._was_removed(group)

    def _was_removed(self, group: bytes) -> None:
        if self.groups.pop(group, None) is not None:
            self.removed.append(group)

    def call(self, *, num_returns: int = 1) -> None:
        """`actor.method.remote(ref, [ref])`."""
        process = self.somebody()
        path = self._new_path(process)
        handles = sorted(i for i in process.held if i[:-4] in self._actors)
        handles = [i for i in handles if may_wait(path, self._paths[i[:-4]])]
        if handles:
            dependencies = self._some(self._awaitable(process, path), 1)
            nested = self._some(self._refs(process))
            handle = self.random.choice(handles)
            refs = process.call(handle[:-4], dependencies, nested, num_returns)
            self._paths[refs[0][:-4]] = path

    def get(self) -> None:
        """`get([ref, ref])`; actors do not, as their next call might be what they wait for."""
        process = self.somebody()
        if not process.actor:
            refs = (
                self._awaitable(process, self._path(process))
                if process.running
                else self._refs(process, with_handles=False)
            )
            process.get(self._some(refs, 3))

    def watch(self) -> None:
        """`wait([ref], timeout=0)`."""
        process = self.somebody()
        if refs := self._some(self._refs(process)):
            process.watch(refs)

    def stop_getting(self) -> None:
        """A `get` times out."""
        if blocked := [p for p in self.cluster.processes if p.wanted]:
            self.random.choice(blocked).stop_getting()

    def stop_writing(self) -> None:
        """A `put`, or the writing of a result, is interrupted."""
        if writing := [p for p in self.cluster.processes if p.is_writing]:
            self.random.choice(writing).stop_writing()

    def release(self) -> None:
        """`del ref`, at any process, even one that idles with references in its globals."""
        process = self.random.choice(self.cluster.processes)
        wanted = process.wanted
        process.release(self._some([i for i in self._refs(process) if i not in wanted], 3))

    def finish_task(
        self, *, large: bool = False, seconds: float = 0.01, failed: bool = False, keep: bool = False
    ) -> None:
        """A running task returns, or raises."""
        if running := self.cluster.running:
            worker = self.random.choice(running)
            self.has_failed |= failed
            assert worker.running is not None
            task = worker.running.task
            nested = [i for i in self._some(self._refs(worker)) if not self._reaches(i, task)]
            self._inside.setdefault(task, []).extend(nested)
            size = LARGE if large else 0
            worker.finish(nested, size=size, large=large, seconds=seconds, failed=failed, retry=failed, keep=keep)

    def kill_worker(self) -> None:
        """`kill -9`."""
        if workers := self.cluster.workers:
            self.has_killed = True
            self.cluster.kill(self.random.choice(workers))

    def let_time_pass(self) -> None:
        """Long enough for what waits behind long tasks to be taken back, and for what found no worker to go home."""
        self.cluster.advance(0.06)

    def fill_disk(self) -> None:
        """A disk is full, or is no longer."""
        node = self.random.choice(self.cluster.ranks)
        node.disk_is_full = not node.disk_is_full

    def damage_disk(self) -> None:
        """A disk changes a byte of an object."""
        spilled = [
            (node, entry) for node in self.cluster.ranks for entry in node.core.table.entries.values() if entry.spilled
        ]
        if spilled:
            node, entry = self.random.choice(spilled)
            assert entry.spilled is not None
            node.disk[entry.spilled][self.random.randrange(entry.size)] ^= 1
            self.damaged.add(entry.id)

    # -------------------------------------------------------------------------------------------------------- judgement
    def judge(self) -> None:
        """Raise if an invariant does not hold now."""
        self.cluster.check()
        for process in self.cluster.processes:
            for identifier, error in process.errors.items():
                self._judge_error(identifier, error)

    def _judge_error(self, identifier: bytes, error: bytes) -> None:
        while error[0] in (payload.DEPENDENCY_ERROR, payload.CREATION_ERROR):
            error = payload.describe_dependency_error(error)[1] if error[0] == payload.DEPENDENCY_ERROR else error
            if error[0] == payload.CREATION_ERROR:
                return
        if error[0] == payload.TASK_ERROR:
            assert self.has_failed, f"{identifier.hex()} is the error of a task, but none has raised"
            return
        name, arguments = payload.describe_system_error(error)
        if name in ("TaskPlacementGroupRemoved", "ActorUnschedulableError"):
            assert any(group.hex() in arguments[0] for group in self.removed), arguments
        elif name in ("WorkerCrashedError", "ActorDiedError"):
            assert self.has_killed or self.has_failed or self.removed, (
                f"{identifier.hex()}: {name}, but nothing was killed: {arguments}"
            )
        elif name == "ObjectStoreFullError":
            assert self.may_be_full, f"{identifier.hex()}: {name}{arguments}"
        elif name == "ObjectLostError" and bytes.fromhex(arguments[1]) in self.damaged:
            assert "checksum" in arguments[0], arguments
        else:
            raise AssertionError(f"{identifier.hex()}: {name}{arguments}")

    def _choose(self, links: list[Link]) -> Link:
        return self.random.choice(links)

    def settle(self, *, keep: bool = True) -> None:
        """Let everything arrive and every task finish; with `keep`, some leave references in globals."""
        while True:
            self.cluster.run(self._choose, check=False)
            self.judge()
            self._judge_groups()
            if not (running := self.cluster.running):
                return
            self.random.choice(running).finish(keep=keep and self.random.random() < 0.5)

    def finish(self) -> None:
        """Bring the program to its end: all gets are answered, then all is released, then nothing is left."""
        for node in self.cluster.ranks:
            node.disk_is_full = False
        self.settle()
        for group in list(self.groups):
            # What waits for one that has no place would wait for ever.
            self.drivers[0].remove_group(group)
            self._was_removed(group)
        self.settle()
        if self.may_be_full:
            for process in self.cluster.processes:
                process.release([i for i in process.held if i not in process.wanted])
            self.cluster.advance(1e10)
            self.settle()
        else:
            for driver in self.drivers:
                driver.get(self._refs(driver, with_handles=False))
            self.settle()
            for process in self.cluster.processes:
                missing = [i.hex() for i in process.wanted]
                assert not missing, f"a process of rank {process.rank} waits for ever for {missing}"
                assert not process.is_blocked, f"a worker of rank {process.rank} is blocked for ever"
        self._judge_runs()
        for process in self.cluster.processes:
            process.wanted.clear()
            process.release(list(process.held))
        self.settle(keep=False)
        left = self.cluster.leftovers()
        assert not left, "left over: " + "; ".join(left)

    def _judge_groups(self) -> None:
        """Nothing is under way: of each group all bundles are where they should be, or none is anywhere."""
        gcs = self.cluster.ranks[0].gcs
        assert gcs is not None
        reserved = {
            (group, index): node.rank
            for node in self.cluster.ranks
            for group, bundles in node.core.ledger.groups.items()
            for index in bundles
        }
        created = [group for group in gcs.groups.groups.values() if group.state == "created"]
        assert {group.state for group in gcs.groups.groups.values()} <= {"created", "pending"}
        assert set(gcs.groups.groups) == set(self.groups)
        assert reserved == {(group.id, index): rank for group in created for index, rank in group.placed.items()}
        assert all(len(group.placed) == len(group.spec.bundles) for group in created)
        for group in gcs.groups.groups.values():
            if group.state == "created" and group.spec.strategy.startswith("STRICT"):
                ranks = set(group.placed.values())
                assert len(ranks) == (1 if group.spec.strategy == "STRICT_PACK" else len(group.placed))

    def _judge_runs(self) -> None:
        if self.has_killed or self.has_failed:
            return
        ran = [task for process in self.cluster.processes for task in process.ran]
        assert len(ran) == len(set(ran)), "a task ran twice"
        for process in self.cluster.processes:
            if process.actor:
                for caller in {ids.prefix_of(call) for call in process.called}:
                    own = [call for call in process.called if ids.prefix_of(call) == caller]
                    assert own == sorted(own), "calls of one caller ran out of order"


def random_step(program: Program, random: Random, *, kills: bool, failures: bool) -> None:
    """One action, drawn with weights that let work and messages pile up."""
    if random.random() < 0.1:
        kinds = ["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]
        actions = [lambda: program.create_group(random.choice(kinds)), program.await_group, program.remove_group]
        random.choice(actions)()
        return
    draw = random.random()
    if draw < 0.45:
        program.deliver(random.randint(1, 4))
    elif draw < 0.52:
        program.put(large=random.random() < 0.5)
    elif draw < 0.62:
        program.submit(
            cpus=random.choice([10_000, 10_000, 5_000, 0]),
            spread=random.random() < 0.3,
            num_returns=random.randint(1, 2),
            retries=random.choice([0, 0, 1]),
        )
    elif draw < 0.65:
        program.create_actor(restarts=random.randint(0, 1))
    elif draw < 0.70:
        program.call(num_returns=random.randint(1, 2))
    elif draw < 0.77:
        program.get()
    elif draw < 0.79:
        program.watch()
    elif draw < 0.80:
        program.stop_getting()
    elif draw < 0.84:
        program.release()
    elif draw < 0.86:
        program.let_time_pass()
    elif draw < 0.98 or not kills:
        program.finish_task(
            large=random.random() < 0.4,
            seconds=random.choice([0.0001, 0.01]),
            failed=failures and random.random() < 0.1,
            keep=random.random() < 0.3,
        )
    else:
        program.kill_worker()
