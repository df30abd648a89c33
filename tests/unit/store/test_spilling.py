"""What goes to disk when, and what becomes of it: a table with a disk that does what the test says."""

from __future__ import annotations

import pytest

from hpcray import payload
from hpcray.protocol import messages as m
from hpcray.store.allocator import Allocator
from hpcray.store.entry import ARGUMENT, AWAY, GET, HERE, INLINE, PREFETCH, SPILLED, Extent
from hpcray.store.memory import Block
from hpcray.store.pulls import Done, Transfer
from hpcray.store.spilling import LEAST_BATCH, RETRY_PAUSE
from hpcray.store.table import ObjectTable
from hpcray.testing.cluster import Cluster
from hpcray.testing.process import Process
from tests.unit.store.lone_table import (
    FAR,
    FARTHER,
    ME,
    NEIGHBOUR,
    PATIENCE,
    SIZE,
    Out,
    ask,
    fetch,
    name,
    need,
    write,
)

MEGABYTE = 1 << 20


def put(table: ObjectTable, number: int, size: int = 1024) -> bytes:
    identifier = name(ME, number)
    block = write(table, identifier, size)
    table.references.create(identifier)
    table.set_here(identifier, block, [])
    return identifier


def fill(table: ObjectTable) -> list[bytes]:
    return [put(table, number) for number in range(SIZE // 1024)]


def finish_write(out: Out, error: str | None = None, count: int | None = None) -> list[Extent]:
    """The oldest write ends, after so many blocks if it failed."""
    blocks, done = out.writing.pop(0)
    extents = [Extent(1, 4096 * index, block.size, 7) for index, block in enumerate(blocks[:count])]
    done(extents, error)
    return extents


def state(table: ObjectTable, identifier: bytes) -> int:
    return table.entries[identifier].state


def test_nothing_is_spilled_before_somebody_waits(table, out):
    fill(table)
    table.end_turn(0.0)
    assert not out.writing


def test_the_least_recently_looked_at_goes_first_and_who_is_looked_at_stays(table, out):
    ids = fill(table)
    first, second = (table.entries[i].block for i in ids[:2])
    table.memory.pin(first)
    table.memory.pin(second)
    table.memory.unpin(second)  # the most recent now
    told = ask(table, 1024)
    table.end_turn(0.0)
    ((blocks, _),) = out.writing
    assert [block.id for block in blocks] == [ids[2], ids[3], ids[1]]
    assert all(block.pins == 1 for block in blocks), "nobody takes it while it is written"
    finish_write(out)
    assert len(told) == 1
    assert state(table, ids[2]) == SPILLED, "it made room"
    assert [state(table, i) for i in (ids[0], ids[1], ids[3])] == [HERE] * 3
    told = ask(table, 1024)
    assert len(told) == 1, "what is on disk too goes without another write"
    assert not out.writing


def test_what_is_looked_at_while_it_is_written_stays_and_keeps_its_copy_on_disk(table, out):
    ids = fill(table)
    told = ask(table, SIZE)
    table.end_turn(0.0)
    block = table.entries[ids[0]].block
    table.memory.pin(block)
    finish_write(out)
    assert not told
    assert state(table, ids[0]) == HERE
    assert [state(table, i) for i in ids[1:]] == [SPILLED] * 3
    table.memory.unpin(block)
    assert len(told) == 1
    assert state(table, ids[0]) == SPILLED


def test_what_is_freed_while_it_is_written_leaves_nothing_on_disk(table, out):
    ids = fill(table)
    told = ask(table, 1024)
    table.end_turn(0.0)
    table.references.drop(ids[0])
    assert not told, "it is still being read by the writer"
    extents = finish_write(out)
    assert len(told) == 1
    assert out.forgotten == extents[:1]


def test_a_spilled_object_is_read_back_when_it_is_wanted_and_forgotten_when_it_is_freed(table, out):
    ids = fill(table)
    (_,) = spill_all(table, out)
    told: list[bytes | None] = []
    assert not table.when_local(ids[1], told.append)
    assert not table.when_local(ids[1], told.append)
    ((extent, block, done),) = out.reading
    assert extent == table.entries[ids[1]].spilled
    assert not told
    done(None)
    assert told == [None, None]
    assert state(table, ids[1]) == HERE
    assert table.entries[ids[1]].block is block
    assert table.entries[ids[1]].spilled == extent, "evicting it again costs nothing"
    table.references.drop(ids[1])
    assert out.forgotten == [extent]


def spill_all(table: ObjectTable, out: Out) -> list[Block]:
    """Have everything go to disk, and the arena empty."""
    told = ask(table, SIZE)
    table.end_turn(0.0)
    while out.writing:
        finish_write(out)
    (block,) = told
    assert block is not None
    table.memory.abandon(block)
    return [block]


def test_an_object_that_is_freed_while_it_is_read_back_gives_its_memory_back(table, out):
    ids = fill(table)
    spill_all(table, out)
    told: list[bytes | None] = []
    table.when_local(ids[0], told.append)
    ((extent, _, done),) = out.reading
    table.references.drop(ids[0])
    assert out.forgotten == [extent]
    (error,) = told
    assert payload.describe_system_error(error)[0] == "ObjectLostError"
    assert table.memory.in_use == 1024
    done(None)
    assert table.memory.in_use == 0


def test_nobody_waits_behind_an_object_that_was_freed_before_there_was_room_to_read_it_back(table, out):
    (spilled, *_) = fill(table)
    spill_all(table, out)
    for number in range(10, 13):
        table.memory.pin(table.entries[put(table, number)].block)
    told = ask(table, 512)
    assert len(told) == 1
    table.when_local(spilled, lambda _: None)
    told = ask(table, 512)
    table.end_turn(0.0)
    assert told == []
    table.references.drop(spilled)
    table.end_turn(0.1)
    assert len(told) == 1
    assert told[0] is not None
    assert not out.reading


def test_what_another_rank_wants_from_disk_is_read_back_and_sent_as_urgently_as_it_says_at_last():
    cluster = Cluster([1, 1], arena_size=1 << 14)
    driver = cluster.add_driver()
    refs = []
    for _ in range(3):
        refs.append(driver.put(size=7000, large=True))
        cluster.run()
    home = cluster.ranks[0]
    entry = home.core.table.entries[refs[0]]
    assert entry.state == SPILLED
    served: list[int] = []
    serve = home.serve

    def note(transfer: Transfer, done: Done) -> None:
        served.append(transfer.urgency)
        serve(transfer, done)

    home.serve = note
    table = cluster.ranks[1].core.table
    table.references.add_guest(refs[0])
    table.learn_copies(refs[0], entry.size, [0])
    for urgency in (PREFETCH, GET):
        table.when_local(refs[0], lambda _: None, urgency)
        cluster.ranks[1].end_turn()
        cluster.deliver(("rank", 1, 0))
        assert entry.urgency == min(urgency, ARGUMENT)
        assert not served
    cluster.run()
    assert served == [GET]


def test_an_object_that_cannot_be_read_becomes_an_error_that_says_why(table, out):
    ids = fill(table)
    spill_all(table, out)
    told: list[bytes | None] = []
    table.when_local(ids[0], told.append)
    out.reading[0][2]("12 bytes at offset 0 of spill file 1: Input/output error")
    assert told == [None]
    assert state(table, ids[0]) == INLINE
    text, identifier = payload.describe_system_error(table.entries[ids[0]].data)[1]
    assert "offset 0 of spill file 1: Input/output error" in text
    assert identifier == ids[0].hex()
    assert table.memory.in_use == 0
    assert [state(table, i) for i in ids[1:]] == [SPILLED] * 3


def test_another_ranks_copy_takes_the_place_of_one_that_cannot_be_read(table, out):
    ids = fill(table)
    table.transfers.on_copy_added(m.CopyAdded(ids[0], mapped=False), FAR)
    spill_all(table, out)
    told: list[bytes | None] = []
    table.when_local(ids[0], told.append)
    out.reading[0][2]("the checksum does not match")
    assert not told
    assert [type(message) for _, message in out.take()] == [m.Pull]
    out.arrive()
    assert told == [None]
    entry = table.entries[ids[0]]
    assert (entry.state, entry.is_primary) == (HERE, True)


def test_a_primary_copy_of_an_object_homed_elsewhere_that_is_lost_is_reported_to_its_home(table, out):
    x = name(FAR, 1)
    table.keep_primary(x, write(table, x))
    spill_all(table, out)
    table.transfers.on_map(x, NEIGHBOUR, GET)
    assert not out.take()
    out.reading[0][2]("the checksum does not match")
    (to_home, lost), (_, locate) = out.take()
    assert to_home == FAR
    assert isinstance(lost, m.CopyLost)
    assert locate == m.Locate(x)
    table.on_located(m.Located(x, lost.error, len(lost.error), []))
    assert out.take() == [(NEIGHBOUR, m.PullFailed(x, 0, 0))]
    assert not table.entries


def test_the_home_keeps_the_last_copy_if_the_primary_one_is_lost(table, out):
    x = name(ME, 1)
    table.references.create(x)
    table.set_away(x, FAR, 1024, [])
    table.when_local(x, lambda _: None)
    out.arrive()
    table.pressure.on_copy_lost(m.CopyLost(x, b"an error"), FAR)
    assert table.entries[x].is_primary
    assert table.memory.primaries


def test_the_home_gives_the_error_of_the_disk_to_all_who_ask(table, out):
    x = name(ME, 1)
    table.references.create(x)
    table.set_away(x, FAR, 1024, [])
    error = payload.system_error("ObjectLostError", "the disk", x.hex())
    table.pressure.on_copy_lost(m.CopyLost(x, error), FAR)
    table.on_locate(x, NEIGHBOUR)
    assert out.take() == [(NEIGHBOUR, m.Located(x, error, len(error), []))]


def test_what_could_not_be_written_stays_and_is_tried_again_after_a_pause(table, out):
    ids = fill(table)
    told = ask(table, SIZE)
    table.end_turn(0.0)
    finish_write(out, "No space left on device", count=1)  # it took a second and a half, in which nothing else happened
    table.end_turn(1.5)
    assert [table.entries[i].spilled is not None for i in ids] == [True, False, False, False]
    table.end_turn(1.5 + RETRY_PAUSE / 2)
    assert not out.writing
    assert table.pressure.next_expiry == 1.5 + RETRY_PAUSE
    table.end_turn(1.5 + RETRY_PAUSE)
    assert len(out.writing[0][0]) == 3
    finish_write(out)
    assert len(told) == 1
    assert not table.pressure.spiller.error


def test_of_two_writes_the_one_that_succeeds_does_not_make_up_for_the_one_that_failed():
    out = Out()
    table = ObjectTable(ME, Allocator(0, 64 * MEGABYTE), out, patience=PATIENCE)
    for number in range(64):
        put(table, number, MEGABYTE)
    ask(table, 8 * MEGABYTE)
    table.end_turn(0.0)
    assert len(out.writing) > 1
    finish_write(out, "No space left on device", count=0)
    while out.writing:
        finish_write(out)
    ask(table, 32 * MEGABYTE)
    table.end_turn(0.5)
    assert not out.writing
    assert table.pressure.spiller.error == "No space left on device"
    table.end_turn(0.5 + RETRY_PAUSE)
    finish_write(out)
    assert not table.pressure.spiller.error


def test_where_nothing_is_left_to_write_no_retry_is_waited_for(table, out):
    ids = fill(table)
    told = ask(table, SIZE)
    table.end_turn(0.0)
    finish_write(out, "No space left on device", count=0)
    table.end_turn(0.0)
    for i in ids:
        table.memory.pin(table.entries[i].block)
    table.end_turn(RETRY_PAUSE)
    assert not out.writing
    assert not told
    assert table.pressure.next_expiry == PATIENCE, "a time that has passed would keep the event loop turning"


def test_who_waits_in_vain_is_told_what_the_disk_said_and_the_objects_are_there(table, out):
    ids = fill(table)
    told = ask(table, 1024)
    now = 0.0
    table.end_turn(now)
    while not told:
        if out.writing:
            finish_write(out, "No space left on device, in /scratch", count=0)
            table.end_turn(now)
            continue
        due = table.pressure.next_expiry
        assert due is not None
        now = max(now, due)
        table.end_turn(now)
    assert told == [None]
    assert now == PATIENCE
    assert "4,096 bytes could not be spilled (No space left on device, in /scratch)" in table.pressure.why_full(1024)
    assert [state(table, i) for i in ids] == [HERE] * 4


def test_a_write_under_way_is_waited_for_and_a_disk_that_hangs_is_not(table, out):
    fill(table)
    told = ask(table, 1024)
    table.end_turn(0.0)
    table.end_turn(PATIENCE - 0.1)
    assert not told
    table.end_turn(PATIENCE)
    assert told == [None]


def test_a_restore_for_which_no_room_comes_fails_those_who_wait_and_not_the_object(table, out):
    (spilled, *_) = fill(table)
    spill_all(table, out)
    ids = [put(table, number) for number in range(10, 14)]
    for i in ids:
        table.memory.pin(table.entries[i].block)
    told: list[bytes | None] = []
    table.when_local(spilled, told.append)
    table.end_turn(0.0)
    table.end_turn(PATIENCE)
    (error,) = told
    kind, (text,) = payload.describe_system_error(error)
    assert kind == "ObjectStoreFullError"
    assert "somebody looks at some bytes" in text
    assert state(table, spilled) == SPILLED
    table.memory.unpin(table.entries[ids[0]].block)
    table.references.drop(ids[0])
    assert not table.when_local(spilled, told.append)
    out.reading[0][2](None)
    assert told[1:] == [None]


def test_what_comes_free_restarts_the_time_of_those_who_wait(table):
    ids = fill(table)
    for i in ids:
        table.memory.pin(table.entries[i].block)
    told = ask(table, 2048)
    table.end_turn(0.0)
    table.memory.unpin(table.entries[ids[0]].block)
    table.references.drop(ids[0])
    table.end_turn(PATIENCE - 1)
    table.end_turn(PATIENCE)
    assert not told
    table.end_turn(2 * PATIENCE - 1)
    assert told == [None]


def test_a_prefetch_takes_free_memory_only(table, out):
    (spilled, *_) = fill(table)
    spill_all(table, out)
    for number in range(10, 14):
        put(table, number)
    told: list[bytes | None] = []
    assert not table.when_local(spilled, told.append, PREFETCH)
    table.end_turn(0.0)
    assert len(told) == 1
    assert told[0] is not None
    assert not out.writing


@pytest.mark.parametrize("kind", ["restore", "fetch"])
def test_a_prefetch_that_only_page_alignment_keeps_out_evicts_nothing(kind):
    out = Out()
    table = ObjectTable(ME, Allocator(0, 2 * MEGABYTE), out, patience=PATIENCE)
    x, size = name(FAR, 1), MEGABYTE + 4096 - 64
    if kind == "restore":
        x = put(table, 1, size)
        told = ask(table, 2 * MEGABYTE)
        table.end_turn(0.0)
        finish_write(out)
        table.memory.abandon(told[0])
    put(table, 2, 64)
    fetch(table, out, name(FAR, 3), MEGABYTE - 4096)
    assert size == table.memory.largest_free
    if kind == "fetch":
        need(table, x, [FAR], size)
    assert not table.when_local(x, lambda _: None, PREFETCH)
    table.end_turn(0.1)
    assert name(FAR, 3) in table.entries
    assert not table.memory.is_waited_for
    assert not out.receiving
    table.check()


def test_however_many_are_told_that_there_is_no_room_the_store_is_described_once(table, out, monkeypatch):
    described = []
    monkeypatch.setattr(out, "holders", lambda: described.append(1) or [])
    spilled = fill(table)
    spill_all(table, out)
    for number in range(10, 14):
        table.memory.pin(table.entries[put(table, number)].block)
    told: list[bytes | None] = []
    for urgency, times in ((PREFETCH, 0), (GET, 1)):
        for identifier in spilled:
            assert not table.when_local(identifier, told.append, urgency)
        table.end_turn(0.0)
        table.end_turn(PATIENCE)
        assert len(told) == len(spilled)
        assert len(described) == times, "nobody reads what prefetches are told"
        told.clear()


def test_what_neighbours_only_map_is_called_back_when_there_is_nothing_to_spill(table, out):
    ids = fill(table)
    for i in ids:
        table.transfers.on_map(i, NEIGHBOUR, GET)
    out.take()
    told = ask(table, 1024)
    table.end_turn(0.0)
    assert out.take() == [(NEIGHBOUR, m.RecallMapping(i)) for i in ids]
    table.end_turn(0.1)
    assert not out.take(), "once is enough"
    table.transfers.on_unmap(ids[0], NEIGHBOUR)
    table.end_turn(0.2)
    finish_write(out)
    assert len(told) == 1


def test_a_mapping_that_is_called_back_ends_with_the_last_look(table, out):
    x = name(NEIGHBOUR, 1)
    need(table, x, [NEIGHBOUR])
    table.when_local(x, lambda _: None)
    table.transfers.pulls.on_mapped(m.ObjectMapped(x, 512, 1024), NEIGHBOUR)
    block = table.entries[x].block
    assert block is not None
    table.memory.pin(block)
    out.take()
    table.pressure.on_recall(x, NEIGHBOUR)
    assert not out.take()
    table.memory.unpin(block)
    assert out.take() == [(NEIGHBOUR, m.UnmapObject(x))]
    assert state(table, x) == AWAY
    assert not table.when_local(x, lambda _: None)
    assert out.take() == [(NEIGHBOUR, m.MapObject(x, GET))]


def test_small_objects_share_a_file_and_large_demands_several_writers():
    out = Out()
    size = 64 * MEGABYTE
    table = ObjectTable(ME, Allocator(0, size), out, patience=PATIENCE)
    for number in range(64):
        put(table, number, MEGABYTE)
    ask(table, MEGABYTE)
    table.end_turn(0.0)
    assert [len(blocks) for blocks, _ in out.writing] == [LEAST_BATCH // MEGABYTE] * 2, "a tenth of the store"
    ask(table, 40 * MEGABYTE)
    table.end_turn(0.0)
    assert len(out.writing) == 4
    assert table.pressure.spiller.under_way >= size // 4
    table.check()


# ------------------------------------------------------------------------- no room where the only copy would be read back
def no_room_at_rank_1(cluster: Cluster) -> tuple[Process, Process, bytes, list[bytes]]:
    """An object of the driver's is on the disk of rank 1, where a worker looks at all that is in the arena."""
    driver = cluster.add_driver()
    template = cluster.template(driver, "f", node=1)
    objects = []
    for _ in range(5):
        objects += driver.submit(template)
        cluster.run()
        cluster.worker_on(1).finish(large=True, size=2000)
        cluster.run()
    entries = cluster.ranks[1].core.table.entries
    here = [i for i in objects if entries[i].state == HERE]
    (spilled, *_) = (i for i in objects if entries[i].state == SPILLED)
    driver.submit(template)
    cluster.run()
    worker = cluster.worker_on(1)
    worker.adopt(here)
    worker.get(here)
    cluster.run()
    return driver, worker, spilled, here


def let_time_pass(cluster: Cluster) -> None:
    for _ in range(4):
        cluster.advance(2.0)
        cluster.run()


@pytest.mark.parametrize("machines", [["a", "a"], ["a", "b"]])
def test_an_object_for_which_its_holder_has_no_room_is_not_lost(machines):
    cluster = Cluster([0, 1], arena_size=1 << 13, store_timeout=5.0, machines=machines)
    driver, worker, x, here = no_room_at_rank_1(cluster)
    driver.get([x])
    let_time_pass(cluster)
    kind, (text, *_) = payload.describe_system_error(driver.errors[x])
    assert kind == "ObjectStoreFullError"
    assert "the object store of rank 1" in text
    driver.values.pop(x)
    driver.errors.clear()
    worker.release(here)
    driver.get([x])
    cluster.run()
    assert x in driver.values
    assert not driver.errors


def test_who_is_neither_home_nor_holder_hears_of_no_room_too_and_does_not_ask_for_ever():
    cluster = Cluster([0, 1, 1], arena_size=1 << 13, store_timeout=5.0)
    driver, _, x, _ = no_room_at_rank_1(cluster)
    driver.submit(cluster.template(driver, "g", node=2), nested=[x])
    cluster.run()
    other = cluster.worker_on(2)
    other.get([x])
    let_time_pass(cluster)
    assert payload.describe_system_error(other.errors[x])[0] == "ObjectStoreFullError"


def test_another_copy_is_tried_before_the_lack_of_room_at_one_is_told(table, out):
    x = name(FARTHER, 1)
    need(table, x, [FAR, FARTHER])
    told: list[bytes | None] = []
    table.when_local(x, told.append)
    ((first, pull),) = out.take()
    error = payload.system_error("ObjectStoreFullError", "no room")
    table.transfers.pulls.on_pull_failed(m.PullFailed(x, pull.tag, 0, error), first)
    ((second, pull),) = out.take()
    assert {first, second} == {FAR, FARTHER}
    table.transfers.pulls.on_pull_failed(m.PullFailed(x, pull.tag, 0), second)
    assert told == [error]
    assert not out.take(), "the home would only say the same"
    assert state(table, x) == AWAY
