import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcray.raylet.sharing import RankMask, RankMemory, deal, share_cpus, share_gpus, share_memory


def test_a_hosts_memory_is_shared_by_its_ranks_and_a_part_of_it_is_the_store():
    assert share_memory([10 * 2**30], [None], 0.3) == [RankMemory(10 * 2**30, 3 * 2**30)]
    assert (
        share_memory([8 * 2**30, 10 * 2**30, 8 * 2**30, 9 * 2**30], [None] * 4, 0.5) == [RankMemory(2**31, 2**30)] * 4
    )


def test_a_store_that_was_asked_for_is_as_large_as_that_in_whole_pages():
    assert share_memory([2**34, 2**34], [10**9, None], 0.25) == [
        RankMemory(2**33, 10**9 - 10**9 % 4096),
        RankMemory(2**33, 2**31),
    ]
    assert share_memory([1000 * 4096] * 2, [900 * 4096, 100 * 4096], 0.3)[0] == RankMemory(900 * 4096, 900 * 4096)


def test_stores_larger_than_the_memory_are_refused_with_the_sizes():
    with pytest.raises(
        ValueError, match=r"stores of 2,400,000,000 bytes in 2 ranks are more than the 2,000,000,000 bytes"
    ):
        share_memory([2 * 10**9, 3 * 10**9], [12 * 10**8] * 2, 0.3)


@given(st.lists(st.integers(2**24, 2**45), min_size=1, max_size=8), st.floats(0.01, 1.0))
def test_shares_never_exceed_what_there_is(usable, part):
    dealt = share_memory(usable, [None] * len(usable), part)
    assert sum(rank.total for rank in dealt) <= min(usable)
    assert all(0 <= rank.store <= rank.total and rank.store % 4096 == 0 for rank in dealt)


def mask(cpus, shared=64, own=None):
    return RankMask(frozenset(cpus), shared, own)


def counts_of(ranks):
    return [len(cpus) for cpus in share_cpus(ranks)]


@pytest.mark.parametrize(
    ("ranks", "counts"),
    [
        ([], []),
        ([mask(range(8))], [8]),
        ([mask(range(8))] * 3, [3, 3, 2]),
        ([mask(range(2))] * 4, [1, 1, 0, 0]),
        ([mask({0, 1}), mask({2, 3})], [2, 2]),
        ([mask({0, 1}), mask({0})], [1, 1]),
        ([mask({0, 1, 2, 3}), mask({0, 1})], [2, 2]),
        ([mask(range(64), shared=16)] * 4, [4, 4, 4, 4]),
        ([mask(range(64), shared=16, own=4)] * 4, [4, 4, 4, 4]),
        ([mask(range(64), shared=16, own=1)] * 2, [1, 1]),
        ([mask(range(64), shared=3)] * 2, [2, 1]),
    ],
)
def test_cpus_are_shared_by_the_ranks_of_a_host(ranks, counts):
    assert counts_of(ranks) == counts


@given(
    st.lists(st.frozensets(st.integers(0, 12), min_size=1), min_size=1, max_size=6),
    st.integers(1, 16),
)
def test_all_that_there_is_is_shared_and_no_more(masks, shared):
    counts = counts_of([mask(cpus, shared) for cpus in masks])
    there = min(shared, len(frozenset().union(*masks)))
    assert all(count <= len(cpus) for count, cpus in zip(counts, masks, strict=True))
    assert sum(counts) == there


@given(st.integers(1, 40), st.integers(1, 40))
def test_equal_masks_differ_by_one_at_most_and_waste_nothing(cpus, ranks):
    counts = counts_of([mask(range(cpus))] * ranks)
    assert max(counts) - min(counts) <= 1
    assert sum(counts) == cpus


@pytest.mark.parametrize(
    ("ranks", "counts"),
    [
        ([mask({0, 1, 2, 3}), mask({2, 3, 4, 5}), mask({0, 1})], [2, 2, 2]),
        ([mask({0, 1, 2, 3}), mask({2, 3}), mask({3})], [2, 1, 1]),
        ([mask({0}), mask({0}), mask({0, 1, 2, 3})], [1, 0, 3]),
        ([mask(range(8)), mask(range(4), own=1)], [7, 1]),
    ],
)
def test_masks_that_overlap_are_shared_as_evenly_as_can_be(ranks, counts):
    assert counts_of(ranks) == counts


def test_ranks_that_see_the_same_cpus_get_neighbours():
    assert share_cpus([mask(range(8))] * 2) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert share_cpus([mask({0, 1, 2, 3}), mask({2, 3})]) == [[0, 1], [2, 3]]


def test_ranks_that_see_the_same_gpus_get_neighbours():
    assert share_gpus([list("abcdefgh")] * 2, [None] * 2) == [list("abcd"), list("efgh")]
    assert share_gpus([list("abc")] * 2, [None] * 2) == [["a", "b"], ["c"]]
    assert share_gpus([list("ca")] * 2, [None] * 2) == [["c"], ["a"]]


@pytest.mark.parametrize(
    ("hands", "limits", "dealt"),
    [
        ([], [], []),
        (["a", "a", ""], [None] * 3, ["a", "", ""]),
        (["a", "b"], [None] * 2, ["a", "b"]),
        (["abcd", "a"], [None] * 2, ["bcd", "a"]),
        (["abcd", "abcd"], [1, None], ["a", "bcd"]),
        (["abcd", "abcd"], [0, 2], ["", "ab"]),
        (["ab", "bc", "cd", "d"], [None] * 4, ["a", "b", "c", "d"]),
    ],
)
def test_gpus_are_shared_by_the_ranks_of_a_host(hands, limits, dealt):
    assert share_gpus([list(hand) for hand in hands], limits) == [list(hand) for hand in dealt]


HANDS = st.lists(st.lists(st.integers(0, 9), unique=True, max_size=8), min_size=1, max_size=6)


@given(HANDS, st.lists(st.none() | st.integers(0, 4), min_size=6, max_size=6))
def test_shares_never_overlap_and_leave_nothing_that_somebody_may_have(hands, asked):
    hands, limits = [[str(item) for item in hand] for hand in hands], asked[: len(hands)]
    dealt = share_gpus(hands, limits)
    given_out = [item for share in dealt for item in share]
    assert len(given_out) == len(set(given_out))
    for share, hand, limit in zip(dealt, hands, limits, strict=True):
        assert share == [item for item in hand if item in share], "in its own order"
        assert limit is None or len(share) <= limit
        left = set(hand) - set(given_out)
        assert not left or len(share) == limit


def most_even(hands, limits, total):
    """The sorted counts of the best of all ways to deal, by trying them."""
    items = sorted({item for hand in hands for item in hand})
    best = []
    for owners in itertools.product([None, *range(len(hands))], repeat=len(items)):
        if any(p is not None and item not in hands[p] for item, p in zip(items, owners, strict=True)):
            continue
        counts = [owners.count(player) for player in range(len(hands))]
        if sum(counts) <= total and all(count <= limit for count, limit in zip(counts, limits, strict=True)):
            best = max(best, sorted(counts))
    return best


@given(
    st.lists(st.lists(st.integers(0, 4), unique=True), min_size=1, max_size=3),
    st.lists(st.integers(0, 5), min_size=3, max_size=3),
    st.integers(0, 6),
)
def test_no_way_to_deal_is_more_even(hands, limits, total):
    limits = limits[: len(hands)]
    dealt = deal(hands, limits, total)
    assert sorted(map(len, dealt)) == most_even(hands, limits, total)


def test_many_ranks_on_many_cpus_are_dealt_in_no_time():
    began = time.perf_counter()
    assert counts_of([mask(range(256), 256)] * 256) == [1] * 256
    assert counts_of([mask(range(384), 384)] * 8) == [48] * 8
    assert counts_of([mask(range(p, p + 64), 512) for p in range(256)])[0] >= 1
    assert time.perf_counter() - began < 5
