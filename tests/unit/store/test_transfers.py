"""Objects on their way between ranks: what is fetched when and from where, who serves whom, and what survives a failure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest

from hpcray import ids
from hpcray.protocol import messages as m
from hpcray.store.allocator import Allocator
from hpcray.store.entry import ARGUMENT, GET, HERE, MAPPED, PREFETCH
from hpcray.store.memory import Block
from hpcray.store.pulls import MOST, Done, Transfer
from hpcray.store.table import ObjectTable
from hpcray.store.transfers import FANOUT
from hpcray.testing.bulk import CHUNK
from hpcray.testing.cluster import Cluster
from hpcray.transport.tags import MOST_TAGS

ME, NEIGHBOUR, FAR, FARTHER, FARTHEST = range(5)
SIZE = 1024
ARENA = 10 * SIZE  # of which four objects may be on their way


def name(home: int, number: int) -> bytes:
    return ids.object_id(ids.task_id(ids.client_prefix(home, b"12345678", 1), number), 0)


class Out:
    """What a table says, and the ends of transfers."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, Any]] = []
        self.receiving: dict[tuple[int, int], tuple[Transfer, Done]] = {}
        self.serving: dict[tuple[int, int], tuple[Transfer, Done]] = {}
        self.hastened: list[tuple[int, int, int]] = []
        self._tags = 0

    def send(self, rank: int, message: Any) -> None:
        self.sent.append((rank, message))

    def share_host(self, rank: int, other: int) -> bool:
        return rank == other or {rank, other} in ({ME, NEIGHBOUR}, {FARTHER, FARTHEST})

    def new_tag(self, rank: int) -> int:
        self._tags += 1
        return self._tags

    def receive(self, transfer: Transfer, done: Done) -> None:
        self.receiving[transfer.rank, transfer.tag] = transfer, done

    def end_receive(self, rank: int, tag: int, size: int, why: str) -> None:
        if (rank, tag) in self.receiving:
            self.receiving.pop((rank, tag))[1](why)

    def serve(self, transfer: Transfer, done: Done) -> None:
        self.serving[transfer.rank, transfer.tag] = transfer, done

    def hasten(self, rank: int, tag: int, urgency: int) -> None:
        self.hastened.append((rank, tag, urgency))

    def end_serve(self, rank: int, tag: int, why: str) -> int:
        """Half of it had left."""
        self.serving.pop((rank, tag))[1](why)
        return SIZE // 2

    def holders(self) -> list[str]:
        return []

    def spill(self, *_: object) -> None:
        """Disks are slow: nothing comes of it within a test."""

    restore = forget = spill

    def take(self) -> list[tuple[int, Any]]:
        sent, self.sent = self.sent, []
        return sent

    def arrive(self, identifier: bytes, error: str | None = None) -> None:
        """The transfer of an object to here ends."""
        ((key, (transfer, done)),) = [(k, v) for k, v in self.receiving.items() if v[0].block.id == identifier]
        del self.receiving[key]
        if error is None and transfer.filling is not None:
            transfer.filling.size = transfer.block.size
        done(error)

    def left(self, rank: int, tag: int) -> None:
        """The last chunk of a transfer from here has left."""
        self.serving.pop((rank, tag))[1](None)


@pytest.fixture
def out() -> Out:
    return Out()


@pytest.fixture
def table(out: Out) -> Iterator[ObjectTable]:
    table = ObjectTable(ME, Allocator(0, ARENA), out, patience=10.0)
    yield table
    table.check()


def need(table: ObjectTable, identifier: bytes, ranks: list[int], urgency: int, size: int = SIZE) -> list[bytes | None]:
    """Want an object; what is told when it is here."""
    told: list[bytes | None] = []
    table.references.add_guest(identifier)
    table.learn_copies(identifier, size, ranks)
    assert not table.when_local(identifier, told.append, urgency)
    table.check()
    return told


def put(table: ObjectTable, identifier: bytes) -> Block:
    table.references.create(identifier)
    blocks: list[Block | None] = []
    table.memory.reserve(identifier, SIZE, blocks.append)
    assert blocks[0] is not None
    table.set_here(identifier, blocks[0], [])
    return blocks[0]


def pulled(out: Out) -> list[bytes]:
    return [message.id for _, message in out.take() if isinstance(message, m.Pull)]


def ask(table: ObjectTable, identifier: bytes, rank: int, tag: int = 7, via: int = -1) -> None:
    table.transfers.on_pull(m.Pull(identifier, tag, GET, via, 0), rank)
    table.check()


# ------------------------------------------------------------------------------------------------------------ what and when
def test_the_most_urgent_pulls_start_first(table, out):
    first = [name(FAR, n) for n in range(4)]
    for x in first:
        need(table, x, [FAR], GET)
    assert pulled(out) == first
    prefetched, argument, wanted = name(FAR, 10), name(FAR, 11), name(FAR, 12)
    need(table, prefetched, [FAR], PREFETCH)
    need(table, argument, [FAR], ARGUMENT)
    need(table, wanted, [FAR], GET)
    assert not pulled(out)
    order = []
    for x in (*first[:3], wanted):
        out.arrive(x)
        order += pulled(out)
    assert order == [wanted, argument, prefetched]


def test_what_a_get_waits_for_does_not_wait_for_prefetches(table, out):
    for n in range(6):
        need(table, name(FAR, n), [FAR], PREFETCH)
    assert len(pulled(out)) == 4
    need(table, name(FAR, 10), [FAR], GET)
    assert pulled(out) == [name(FAR, 10)]


def test_an_object_larger_than_the_budget_is_fetched_alone(table, out):
    large, small = name(FAR, 1), name(FAR, 2)
    told = need(table, large, [FAR], GET, 8 * SIZE)
    need(table, small, [FAR], GET)
    assert pulled(out) == [large]
    out.arrive(large)
    assert told == [None]
    assert pulled(out) == [small]


@pytest.mark.parametrize("source", [NEIGHBOUR, FAR])
def test_what_the_end_of_a_fetch_starts_may_free_the_object_that_was_fetched(table, out, source):
    # The next in the queue turns out to be lost, and the task that wanted both fails.
    x, lost, filler = name(ME, 1), name(ME, 2), name(ME, 3)
    for identifier, rank in ((x, source), (lost, FARTHER)):
        table.references.create(identifier)
        table.set_away(identifier, rank, SIZE, [])
    assert not table.when_local(x, lambda _: None)
    blocks: list[Block | None] = []
    table.memory.reserve(filler, table.memory.largest_free, blocks.append)
    assert not table.when_local(lost, lambda _: table.references.drop(x), PREFETCH)
    table.transfers.on_copy_dropped(lost, FARTHER)
    assert blocks[0] is not None
    table.memory.abandon(blocks[0])
    out.take()
    if source == NEIGHBOUR:
        table.transfers.pulls.on_mapped(m.ObjectMapped(x, 512, SIZE), NEIGHBOUR)
        assert out.take() == [(NEIGHBOUR, m.UnmapObject(x)), (NEIGHBOUR, m.Free([x]))]
    else:
        out.arrive(x)
        assert out.take() == [(FAR, m.Free([x]))]
    assert table.entries.keys() == {lost}
    assert table.memory.in_use == 0


def test_an_object_is_fetched_once_however_many_want_it(table, out):
    x = name(FAR, 1)
    told = [need(table, x, [FAR], urgency) for urgency in (PREFETCH, ARGUMENT, GET)]
    assert pulled(out) == [x]
    out.arrive(x)
    assert told == [[None]] * 3


def test_a_pull_under_way_is_hastened_where_it_is_served(table, out):
    x = name(FAR, 1)
    need(table, x, [FAR], PREFETCH)
    ((_, pull),) = out.take()
    need(table, x, [FAR], GET)
    assert out.take() == [(FAR, m.HastenPull(x, pull.tag, GET))]
    table.transfers.on_hasten(m.HastenPull(x, 5, GET), FARTHER)
    assert out.hastened == [(FARTHER, 5, GET)]


def test_a_pull_that_waits_moves_up_when_somebody_more_impatient_comes(table, out):
    first = [name(FAR, n) for n in range(4)]
    for x in first:
        need(table, x, [FAR], GET)
    early, late = name(FAR, 10), name(FAR, 11)
    need(table, early, [FAR], ARGUMENT)
    need(table, late, [FAR], ARGUMENT)
    need(table, late, [FAR], GET)
    out.take()
    out.arrive(first[0])
    assert pulled(out) == [late]


def test_a_prefetch_has_nothing_evicted_and_a_get_does(table, out):
    for n in range(10):
        need(table, name(FAR, n), [FAR], GET)
        out.arrive(name(FAR, n))  # copies that others have too: all of them may go
    out.take()
    need(table, name(FAR, 20), [FAR], PREFETCH)
    assert not pulled(out)
    need(table, name(FAR, 21), [FAR], GET)
    assert pulled(out) == [name(FAR, 21)]


def test_many_small_objects_are_not_all_on_their_way_at_once(out):
    # or a `get` of some thousand objects would need more tags than there are
    table = ObjectTable(ME, Allocator(0, 1 << 24), out, patience=10.0)
    urgencies = (PREFETCH, ARGUMENT, GET)
    for number, urgency in enumerate(urgencies):
        for n in range(MOST + 10):
            x = name(FAR, 1000 * number + n)
            table.references.add_guest(x)
            table.learn_copies(x, 64, [FAR])
            table.when_local(x, lambda _: None, urgency)
        assert len(out.receiving) == MOST * (number + 1)
    assert len(out.receiving) < MOST_TAGS
    table.check()
    arrived = 0
    while out.receiving:
        out.arrive(next(transfer.block.id for transfer, _ in out.receiving.values()))
        arrived += 1
    assert arrived == (MOST + 10) * len(urgencies)
    table.check()


# ---------------------------------------------------------------------------------------------------------- where it is from
def test_receivers_are_spread_over_the_copies(table, out):
    x = name(FARTHER, 1)
    other = ObjectTable(5, Allocator(0, ARENA), other_out := Out(), patience=10.0)
    need(table, x, [FARTHER, FARTHEST], GET)
    need(other, x, [FARTHER, FARTHEST], GET)
    sources = [rank for rank, message in (*out.sent, *other_out.sent) if isinstance(message, m.Pull)]
    assert sorted(sources) == [FARTHER, FARTHEST]


def test_a_transfer_that_fails_goes_on_from_another_copy_where_it_stopped(table, out):
    x = name(FARTHER, 1)
    told = need(table, x, [FAR, FARTHER], GET)
    ((source, pull),) = out.take()
    ((transfer, _),) = out.receiving.values()
    transfer.filling.size = 256
    out.arrive(x, "it died")
    ((other, again),) = out.take()
    assert {source, other} == {FAR, FARTHER}
    assert (pull.start, again.start) == (0, 256)
    out.arrive(x)
    assert told == [None]
    assert table.memory.in_use == SIZE


def test_without_any_copy_left_the_home_is_asked_before_the_object_counts_as_lost(table, out):
    x = name(FARTHER, 1)
    told = need(table, x, [FAR], GET)
    out.take()
    out.arrive(x, "evicted")
    assert out.take() == [(FARTHER, m.Locate(x))]
    assert table.memory.in_use == 0
    table.on_located(m.Located(x, None, SIZE, [FARTHER]))
    assert pulled(out) == [x]
    out.arrive(x, "evicted, too")
    assert out.take() == [(FARTHER, m.Locate(x))]
    table.on_located(m.Located(x, None, SIZE, []))
    assert told == [None]
    assert not table.transfers.pulls.is_waiting


def test_an_object_that_was_located_again_is_as_urgent_as_before(table, out):
    x = name(FARTHER, 1)
    need(table, x, [FAR], GET)
    out.arrive(x, "evicted")
    table.on_located(m.Located(x, None, SIZE, [FARTHER]))
    assert [p.urgency for _, p in out.take() if isinstance(p, m.Pull)] == [GET, GET]


# ------------------------------------------------------------------------------------------------------------------ serving
def test_a_rank_serves_few_receivers_of_an_object_and_sends_the_others_on_to_these(table, out):
    x = name(ME, 1)
    put(table, x)
    ranks = [10, 11, 12, 13, 14]
    for rank in ranks:
        ask(table, x, rank)
    assert [rank for rank, _ in out.serving] == ranks[:FANOUT]
    sent_on = [(rank, message.rank) for rank, message in out.take()]
    assert [rank for rank, _ in sent_on] == ranks[FANOUT:]
    assert {other for _, other in sent_on} == set(ranks[:FANOUT])
    out.left(10, 7)
    ask(table, x, 20)
    assert (20, 7) in out.serving


def test_a_rank_whose_neighbour_is_being_served_maps_the_neighbours_copy(table, out):
    x = name(ME, 1)
    put(table, x)
    ask(table, x, FARTHER)
    ask(table, x, FARTHEST)
    assert out.take() == [(FARTHEST, m.PullFrom(x, 7, FARTHER))]
    assert len(out.serving) == 1


def test_what_is_told_to_map_a_neighbours_copy_waits_for_it_there(table, out):
    x = name(FAR, 1)
    told = need(table, x, [FAR], GET)
    ((_, pull),) = out.take()
    table.transfers.pulls.on_redirected(m.PullFrom(x, pull.tag, NEIGHBOUR), FAR)
    assert out.take() == [(NEIGHBOUR, m.MapObject(x, GET))]
    assert table.memory.in_use == 0
    table.transfers.pulls.on_mapped(m.ObjectMapped(x, 64, SIZE), NEIGHBOUR)
    assert told == [None]
    assert table.entries[x].state == MAPPED


def test_a_neighbour_maps_what_is_still_arriving_once_it_is_here(table, out):
    x = name(FAR, 1)
    need(table, x, [FAR], GET)
    out.take()
    table.transfers.on_map(x, NEIGHBOUR, GET)
    assert not out.take()
    out.arrive(x)
    answers = [message for rank, message in out.take() if rank == NEIGHBOUR]
    assert answers == [m.ObjectMapped(x, table.entries[x].block.offset, SIZE)]
    table.transfers.on_unmap(x, NEIGHBOUR)


def test_a_neighbour_is_refused_when_what_it_waits_for_fails(table, out):
    x = name(FARTHER, 1)
    need(table, x, [FAR], GET)
    table.transfers.on_map(x, NEIGHBOUR, GET)
    out.take()
    out.arrive(x, "gone")
    assert out.take() == [(NEIGHBOUR, m.PullFailed(x, 0, 0)), (FARTHER, m.Locate(x))]


def test_who_is_named_by_the_source_serves_behind_its_own_reception(table, out):
    x = name(FAR, 1)
    need(table, x, [FAR], GET)
    ask(table, x, FARTHER, via=FAR)
    ((transfer, _),) = out.serving.values()
    ((reception, _),) = out.receiving.values()
    assert transfer.block is reception.block
    assert transfer.filling is reception.filling
    out.arrive(x)
    out.left(FARTHER, 7)
    assert table.entries[x].block.pins == 0


def test_what_somebody_waits_for_behind_our_own_reception_is_received_as_urgently(table, out):
    x = name(FAR, 1)
    need(table, x, [FAR], PREFETCH)
    ((_, pull),) = out.take()
    table.transfers.on_pull(m.Pull(x, 7, ARGUMENT, FAR, 0), FARTHER)
    assert out.take() == [(FAR, m.HastenPull(x, pull.tag, ARGUMENT))]
    table.transfers.on_hasten(m.HastenPull(x, 7, GET), FARTHER)
    assert out.take() == [(FAR, m.HastenPull(x, pull.tag, GET))]
    assert out.hastened == [(FARTHER, 7, GET)]
    out.arrive(x)
    out.left(FARTHER, 7)


def test_what_a_neighbour_waits_to_map_is_received_as_urgently(table, out):
    x = name(FAR, 1)
    need(table, x, [FAR], PREFETCH)
    ((_, pull),) = out.take()
    table.transfers.on_map(x, NEIGHBOUR, ARGUMENT)
    table.transfers.on_hasten(m.HastenPull(x, 0, GET), NEIGHBOUR)
    assert [message.urgency for _, message in out.take()] == [ARGUMENT, GET]
    assert pull.urgency == PREFETCH
    assert not out.hastened
    out.arrive(x)
    table.transfers.on_unmap(x, NEIGHBOUR)


def test_a_mapping_that_is_waited_for_is_hastened_where_it_is_made(table, out):
    x = name(FAR, 1)
    need(table, x, [NEIGHBOUR], PREFETCH)
    need(table, x, [NEIGHBOUR], GET)
    assert out.take() == [(NEIGHBOUR, m.MapObject(x, PREFETCH)), (NEIGHBOUR, m.HastenPull(x, 0, GET))]


def test_nobody_else_is_served_before_the_object_is_here(table, out):
    # Two ranks that each believe the other to have the object would wait for each other.
    x = name(FAR, 1)
    need(table, x, [FAR], GET)
    out.take()
    ask(table, x, FARTHER)
    ask(table, x, FARTHEST, via=FARTHER)
    assert out.take() == [(FARTHER, m.PullFailed(x, 7, 0)), (FARTHEST, m.PullFailed(x, 7, 0))]


def test_who_was_fed_by_a_reception_that_failed_is_told_how_much_has_left(table, out):
    x = name(FARTHER, 1)
    need(table, x, [FAR], GET)
    ask(table, x, FARTHEST, via=FAR)
    out.take()
    out.arrive(x, "it died")
    assert out.take() == [(FARTHEST, m.PullFailed(x, 7, SIZE // 2)), (FARTHER, m.Locate(x))]
    assert table.memory.in_use == 0


def test_who_was_fed_by_a_reception_is_fed_on_when_it_goes_on_from_another_copy(table, out):
    x = name(FARTHER, 1)
    need(table, x, [FAR, FARTHER], GET)
    source = out.take()[0][0]
    ask(table, x, 9, via=source)
    ((serving, _),) = out.serving.values()
    out.arrive(x, "it died")
    ((reception, _),) = out.receiving.values()
    assert reception.filling is serving.filling
    assert [type(message) for _, message in out.take()] == [m.Pull]


def test_a_named_rank_that_refuses_sends_the_receiver_back(table, out):
    x = name(FAR, 1)
    told = need(table, x, [FAR], GET)
    ((_, pull),) = out.take()
    table.transfers.pulls.on_redirected(m.PullFrom(x, pull.tag, FARTHER), FAR)
    ((rank, named),) = out.take()
    assert (rank, named.via) == (FARTHER, FAR)
    table.transfers.pulls.on_pull_failed(m.PullFailed(x, named.tag, 0), FARTHER)
    ((rank, again),) = out.take()
    assert (rank, again.via) == (FAR, -1)
    out.arrive(x)
    assert told == [None]


def test_under_pressure_all_that_neighbours_map_is_asked_back(table, out):
    # Some of it may be looked at for just what waits for room here: that does not come before the rest has.
    for n in range(3):
        put(table, name(ME, n))
        table.transfers.on_map(name(ME, n), NEIGHBOUR, GET)
    out.take()
    table.transfers.recall()
    table.transfers.recall()
    assert out.take() == [(NEIGHBOUR, m.RecallMapping(name(ME, n))) for n in range(3)]


# -------------------------------------------------------------------------------------------------------------------- deaths
def test_what_a_dead_rank_was_sending_comes_from_elsewhere(table, out):
    x = name(FARTHER, 1)
    told = need(table, x, [FAR, FARTHER], GET)
    source = out.take()[0][0]
    table.transfers.on_rank_lost(source)
    ((other, _),) = out.take()
    assert other != source
    out.arrive(x)
    assert told == [None]


def test_what_a_dead_neighbour_was_to_show_comes_from_elsewhere(table, out):
    x = name(FAR, 1)
    told = need(table, x, [FAR, NEIGHBOUR], GET)
    table.transfers.on_rank_lost(NEIGHBOUR)
    assert pulled(out) == [x]
    out.arrive(x)
    assert told == [None]


def test_a_dead_rank_keeps_nothing_pinned(table, out):
    x = name(ME, 1)
    block = put(table, x)
    ask(table, x, FAR)
    table.transfers.on_map(x, NEIGHBOUR, GET)
    assert block.pins == 2
    table.transfers.on_rank_lost(FAR)
    table.transfers.on_rank_lost(NEIGHBOUR)
    assert block.pins == 0
    table.references.drop(x)
    assert table.memory.in_use == 0


def test_an_object_that_is_freed_while_it_is_sent_and_received_leaves_no_pin(table, out):
    sent, received = name(ME, 1), name(ME, 2)
    put(table, sent)
    ask(table, sent, FAR)
    table.references.create(received)
    table.set_away(received, FAR, SIZE, [])
    assert not table.when_local(received, lambda _: None)
    table.references.drop(sent)
    table.references.drop(received)
    assert table.memory.in_use == 2 * SIZE
    out.left(FAR, 7)
    out.arrive(received)
    assert table.memory.in_use == 0
    assert not table.entries


# ------------------------------------------------------------------------------------------------------------- on a cluster
def broadcast(cluster: Cluster, order: Callable[[list[Any]], Any], size: int) -> tuple[bytes, int]:
    """Have a task on each rank get one object; the most receivers that one rank served at a time."""
    driver = cluster.add_driver()
    x = driver.put(size=size, large=True)
    cluster.run(order)
    for rank in range(1, len(cluster.ranks)):
        driver.submit(cluster.template(driver, f"on{rank}", node=rank), nested=[x])
    cluster.run(order)
    for worker in cluster.running:
        worker.get([x])
    most = 0
    while links := cluster.choices():
        cluster.deliver(order(links))
        cluster.check()
        for node in cluster.ranks:
            most = max(most, len(node.core.transfers._servings.get(x, ())))
    return x, most


@pytest.mark.parametrize("seed", range(10))
def test_a_broadcast_is_a_tree_in_which_receivers_serve(seed: int) -> None:
    cluster = Cluster([1] * 9)
    x, most = broadcast(cluster, Random(seed).choice, 3 * CHUNK)
    assert 1 <= most <= FANOUT
    assert all(x in worker.values for worker in cluster.running)
    sent = [node.core.transfers.sent_bytes for node in cluster.ranks]
    assert sum(sent) == 8 * cluster.ranks[0].core.table.entries[x].size
    for worker in list(cluster.running):
        worker.finish()
    cluster.run()
    for process in cluster.processes:
        process.release(list(process.held))
    cluster.run()
    assert cluster.leftovers() == []


@pytest.mark.parametrize("seed", range(10))
def test_of_the_ranks_of_a_host_most_map_what_one_of_them_pulls(seed: int) -> None:
    cluster = Cluster([1] * 7, machines=["a", "b", "b", "b", "c", "c", "c"])
    x, _ = broadcast(cluster, Random(seed).choice, 3 * CHUNK)
    assert all(x in worker.values for worker in cluster.running)
    states = [node.core.table.entries[x].state for node in cluster.ranks[1:]]
    assert set(states) == {HERE, MAPPED}
