"""Identifiers: what can be read from them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcray import ids

ranks = st.integers(0, (1 << 16) - 1)
nonces = st.binary(min_size=ids.NONCE_SIZE, max_size=ids.NONCE_SIZE)


@given(rank=ranks, nonce=nonces, client=st.integers(0, (1 << 32) - 1), counter=st.integers(0, (1 << 80) - 1))
def test_all_parts_of_an_id_can_be_read_from_it(rank, nonce, client, counter):
    prefix = ids.client_prefix(rank, nonce, client)
    task = ids.task_id(prefix, counter)
    ref = ids.object_id(task, 3)
    assert (len(prefix), len(task), len(ref)) == (ids.PREFIX_SIZE, ids.TASK_ID_SIZE, ids.OBJECT_ID_SIZE)
    for identifier in (task, ref):
        assert ids.home_of(identifier) == rank
        assert ids.prefix_of(identifier) == prefix
        assert ids.nonce_of(identifier) == nonce
        assert ids.task_of(identifier) == task


def test_ids_of_one_client_sort_in_the_order_in_which_they_were_made():
    prefix = ids.client_prefix(1, b"12345678", 1)
    made = [ids.task_id(prefix, counter) for counter in range(1000)]
    assert made == sorted(made)


def test_returns_of_one_task_differ_from_each_other_and_from_its_handle():
    task = ids.task_id(ids.client_prefix(1, b"12345678", 1), 1)
    assert len({ids.object_id(task, index) for index in range(10)}) == 10


@given(rank=ranks, nonce=nonces)
def test_a_node_id_names_its_rank(rank, nonce):
    node = ids.node_id(nonce, rank)
    assert len(bytes.fromhex(node)) == ids.OBJECT_ID_SIZE
    assert ids.rank_of_node(node) == rank


@pytest.mark.parametrize("text", ["", "ab", "x" * 2 * ids.OBJECT_ID_SIZE])
def test_what_is_no_node_id_is_refused(text):
    with pytest.raises(ValueError):
        ids.rank_of_node(text)


def test_nonces_differ():
    assert ids.new_nonce() != ids.new_nonce()
