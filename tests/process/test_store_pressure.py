"""A small store: what nobody refers to any more makes room for what comes."""

import gc

import numpy as np
import pytest

INIT = {"num_cpus": 2, "object_store_memory": 200 * 1024 * 1024}
MEGABYTE = 1_000_000
pytestmark = pytest.mark.usefixtures("ray_start")


def test_ten_thousand_puts_of_one_megabyte_never_fill_200_megabytes(hpcray):
    array = np.ones(MEGABYTE, dtype=np.uint8)
    for number in range(10_000):
        ref = hpcray.put(array)
        if number % 1000 == 0:
            assert hpcray.get(ref).sum() == MEGABYTE


def test_results_that_were_dropped_make_room_and_those_that_were_kept_stay(hpcray):
    @hpcray.remote
    def produce(number):
        return np.full(MEGABYTE, number % 256, dtype=np.uint8)

    kept = [produce.remote(number) for number in range(50)]
    for start in range(0, 600, 20):
        hpcray.get([produce.remote(start + offset) for offset in range(20)])
    for number, array in enumerate(hpcray.get(kept)):
        assert array.min() == array.max() == number


def test_large_arguments_are_freed_after_their_task(hpcray):
    @hpcray.remote
    def length(array):
        return len(array)

    for _ in range(500):
        assert hpcray.get(length.remote(np.zeros(MEGABYTE, dtype=np.uint8))) == MEGABYTE


def test_objects_referred_to_by_freed_objects_are_freed_too(hpcray):
    for _ in range(300):
        hpcray.put([hpcray.put(np.zeros(MEGABYTE, dtype=np.uint8))])


def test_values_that_are_still_looked_at_keep_their_bytes_while_others_come_and_go(hpcray):
    looked_at = [hpcray.get(hpcray.put(np.full(MEGABYTE, number, dtype=np.uint8))) for number in range(20)]
    gc.collect()
    for _ in range(500):
        hpcray.put(np.full(MEGABYTE, 255, dtype=np.uint8))
    for number, array in enumerate(looked_at):
        assert array.min() == array.max() == number


@pytest.mark.beyond_ray("Ray maps a file on disk for an object larger than its store")
def test_one_object_larger_than_the_store_is_an_error_that_names_the_sizes(hpcray):
    with pytest.raises(hpcray.exceptions.ObjectStoreFullError, match=r"MB|MiB|bytes"):
        hpcray.put(np.zeros(300 * MEGABYTE, dtype=np.uint8))
    assert hpcray.get(hpcray.put(b"x" * MEGABYTE)) == b"x" * MEGABYTE, "the store still works"
