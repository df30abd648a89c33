"""The allocator's rules, one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hpcray.exceptions import InternalError
from hpcray.store.allocator import LARGE, LINE, PAGE, Allocator

START = PAGE  # as in an arena: after the control page
SIZE = 64 * LARGE


@pytest.fixture
def allocator() -> Allocator:
    return Allocator(START, SIZE)


def take(allocator: Allocator, n: int) -> int:
    offset = allocator.allocate(n)
    assert offset is not None
    allocator.check()
    return offset


def give(allocator: Allocator, *offsets: int) -> None:
    for offset in offsets:
        allocator.free(offset)
        allocator.check()


def test_a_new_allocator_is_one_free_block(allocator: Allocator) -> None:
    allocator.check()
    assert (allocator.size, allocator.used) == (SIZE, 0)
    assert (allocator.available, allocator.largest_free) == (SIZE, SIZE)


def test_the_first_block_is_at_the_start(allocator: Allocator) -> None:
    assert take(allocator, 1000) == START


@pytest.mark.parametrize(("n", "used"), [(1, LINE), (LINE, LINE), (LINE + 1, 2 * LINE), (LARGE - 1, LARGE)])
def test_small_blocks_are_rounded_up_to_cache_lines(allocator: Allocator, n: int, used: int) -> None:
    take(allocator, n)
    assert (allocator.used, allocator.available) == (used, SIZE - used)


@pytest.mark.parametrize(("n", "used"), [(LARGE, LARGE), (LARGE + 1, LARGE + PAGE), (2 * LARGE - 1, 2 * LARGE)])
def test_large_blocks_are_rounded_up_to_pages(allocator: Allocator, n: int, used: int) -> None:
    take(allocator, n)
    assert allocator.used == used


def test_small_blocks_are_aligned_to_cache_lines_and_lie_side_by_side(allocator: Allocator) -> None:
    assert [take(allocator, n) - START for n in (1, 65, 64)] == [0, LINE, 3 * LINE]


def test_large_blocks_are_aligned_to_pages(allocator: Allocator) -> None:
    take(allocator, 1)
    assert take(allocator, LARGE) == START + PAGE


def test_the_gap_before_an_aligned_block_is_used_for_small_ones(allocator: Allocator) -> None:
    take(allocator, 1)
    take(allocator, LARGE)
    assert take(allocator, PAGE - LINE) == START + LINE


def test_the_smallest_sufficient_free_block_is_taken(allocator: Allocator) -> None:
    wide, _, narrow, _ = (take(allocator, n) for n in (4000, 1, 2000, 1))
    give(allocator, wide, narrow)
    assert take(allocator, 1500) == narrow


def test_among_equal_fits_the_lowest_offset_is_taken(allocator: Allocator) -> None:
    blocks = [take(allocator, 1000) for _ in range(6)]
    give(allocator, blocks[4], blocks[0], blocks[2])
    assert [take(allocator, 1000) for _ in range(3)] == [blocks[0], blocks[2], blocks[4]]


def test_a_used_block_comes_before_an_unused_one_of_the_same_size() -> None:
    allocator = Allocator(0, 5 * LINE)
    used, _ = take(allocator, 2 * LINE), take(allocator, LINE)
    give(allocator, used)
    assert take(allocator, 2 * LINE) == used


def test_memory_used_and_freed_next_to_unused_memory_is_taken_first(allocator: Allocator) -> None:
    give(allocator, take(allocator, 5 * LARGE))
    assert take(allocator, 7 * LARGE) == START


def test_a_block_too_short_once_aligned_is_passed_over() -> None:
    allocator = Allocator(LINE, 4 * LARGE)
    unaligned = take(allocator, LARGE - LINE)
    for _ in range(2):
        take(allocator, LINE)
    give(allocator, unaligned, unaligned + LARGE - LINE)  # LARGE bytes, but not at a page
    assert allocator.largest_free > LARGE
    assert take(allocator, LARGE) == LARGE + PAGE


def test_none_says_that_no_block_is_large_enough(allocator: Allocator) -> None:
    assert allocator.allocate(SIZE + 1) is None
    assert take(allocator, SIZE) == START
    assert allocator.allocate(1) is None
    assert (allocator.available, allocator.largest_free) == (0, 0)


def test_scattered_room_is_not_enough(allocator: Allocator) -> None:
    blocks = [take(allocator, LARGE) for _ in range(64)]
    give(allocator, *blocks[::2])
    assert (allocator.available, allocator.largest_free) == (SIZE // 2, LARGE)
    assert allocator.allocate(LARGE + 1) is None


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
def test_freed_neighbours_become_one_block_in_any_order(order: tuple[int, ...]) -> None:
    allocator = Allocator(0, 3 * LINE)
    for _ in order:
        take(allocator, LINE)
    give(allocator, *(index * LINE for index in order))
    assert allocator.largest_free == 3 * LINE


@pytest.mark.parametrize("offset", [START - LINE, START, START + LINE, START + 1, -1, START + SIZE])
def test_freeing_what_is_not_allocated_is_an_error_and_changes_nothing(allocator: Allocator, offset: int) -> None:
    give(allocator, take(allocator, 1000))
    keeps = take(allocator, 10 * LINE) if offset != START else None
    with pytest.raises(ValueError, match=f"at offset {offset}"):
        allocator.free(offset)
    allocator.check()
    assert allocator.used == (0 if keeps is None else 10 * LINE)


@pytest.mark.parametrize("n", [0, -1])
def test_a_block_without_bytes_is_an_error(allocator: Allocator, n: int) -> None:
    with pytest.raises(ValueError, match="at least one byte"):
        allocator.allocate(n)
    allocator.check()


@pytest.mark.parametrize(("start", "size"), [(-LINE, LINE), (0, 0), (0, -LINE), (1, LINE), (0, LINE + 1)])
def test_an_impossible_arena_is_an_error(start: int, size: int) -> None:
    with pytest.raises(ValueError, match="multiples of 64"):
        Allocator(start, size)


def overlap(allocator: Allocator) -> None:
    allocator._live[START] += LINE
    allocator._used += LINE


def leave_a_hole(allocator: Allocator) -> None:
    allocator._used -= allocator._live.pop(START)


def reach_beyond_the_end(allocator: Allocator) -> None:
    allocator._live[START + SIZE] = LINE
    allocator._used += LINE


def split_a_free_block(allocator: Allocator) -> None:
    (start, end), *_ = allocator._by_start.items()
    allocator._remove_free(start, end)
    allocator._add_free(start, start + LINE)
    allocator._add_free(start + LINE, end)


def count_wrongly(allocator: Allocator) -> None:
    allocator._used += LINE


def forget_a_size(allocator: Allocator) -> None:
    allocator._by_size.clear()


def forget_an_end(allocator: Allocator) -> None:
    allocator._by_end.clear()


@pytest.mark.parametrize(
    ("damage", "story"),
    [
        (overlap, "after a block that ends at"),
        (leave_a_hole, "after a block that ends at"),
        (reach_beyond_the_end, "blocks end at"),
        (split_a_free_block, "not coalesced"),
        (count_wrongly, "counted as used"),
        (forget_a_size, "by size and by start"),
        (forget_an_end, "by start and by end"),
    ],
)
def test_check_finds_damage(allocator: Allocator, damage: Callable[[Allocator], None], story: str) -> None:
    take(allocator, 10 * LINE)
    damage(allocator)
    with pytest.raises(InternalError, match=story):
        allocator.check()
