"""Objects: what may be put, that arrays come back as read-only views without a copy, and their sizes."""

import gc

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("ray_start")


@pytest.mark.parametrize(
    "value",
    [None, 0, 3.5, "text", b"bytes", [1, "a", None], {"k": (1, 2)}, {1, 2}, b"x" * 3_000_000],
    ids=lambda value: type(value).__name__,
)
def test_put_and_get_give_an_equal_value(hpcray, value):
    assert hpcray.get(hpcray.put(value)) == value


def test_put_of_a_ref_is_refused_but_a_list_of_refs_is_a_value(hpcray):
    ref = hpcray.put(1)
    with pytest.raises(TypeError, match="put"):
        hpcray.put(ref)
    assert hpcray.get(hpcray.put([ref])) == [ref]


def test_each_put_gives_a_new_ref(hpcray):
    assert hpcray.put(1) != hpcray.put(1)


def test_a_large_array_is_a_read_only_view_of_shared_memory(hpcray):
    ref = hpcray.put(np.arange(1_000_000))
    first, second = hpcray.get(ref), hpcray.get(ref)
    assert not first.flags.owndata
    assert not first.flags.writeable
    assert first.ctypes.data == second.ctypes.data, "two views of one memory"
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 1
    assert np.array_equal(second, np.arange(1_000_000))


def test_a_small_array_is_read_only_as_well(hpcray):
    array = hpcray.get(hpcray.put(np.arange(3)))
    assert not array.flags.writeable
    assert array.tolist() == [0, 1, 2]


def test_an_array_that_a_task_received_is_read_only_and_one_that_it_copied_is_not(hpcray):
    @hpcray.remote
    def double(array):
        assert not array.flags.writeable
        mine = array.copy()
        mine *= 2
        return mine

    assert hpcray.get(double.remote(np.ones(200_000))).sum() == 400_000


def test_arrays_inside_containers_are_views_too(hpcray):
    value = {"a": np.zeros(200_000), "b": [np.ones((500, 500)), "text"], "c": (np.arange(3),)}
    result = hpcray.get(hpcray.put(value))
    for array in (result["a"], result["b"][0]):
        assert not array.flags.owndata
        assert not array.flags.writeable
    assert result["b"][0].sum() == 250_000
    assert result["b"][1] == "text"
    assert result["c"][0].tolist() == [0, 1, 2]


def test_an_array_stays_intact_as_long_as_anyone_looks_at_it(hpcray):
    array = hpcray.get(hpcray.put(np.full(500_000, 7)))
    part = array[100:200]
    del array
    gc.collect()
    for number in range(20):
        hpcray.put(np.full(500_000, number))
    assert part.tolist() == [7] * 100


@pytest.mark.parametrize(
    "array",
    [
        np.empty(0),
        np.array(5.0),
        np.asfortranarray(np.arange(120_000).reshape(300, 400)),
        np.arange(400_000)[::2],
        np.arange(240_000, dtype=">i4").reshape(2, 3, -1),
        np.zeros(50_000, dtype=[("x", "f8"), ("y", "i4")]),
        np.array(["2024-01-01", "NaT"], dtype="M8[D]"),
        np.array(["abc", "späť"]),
        np.array([1, "a", None], dtype=object),
        np.ma.masked_array([1, 2, 3], mask=[0, 1, 0]),
        np.ones(300_000, dtype=bool),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_arrays_of_every_kind_keep_type_shape_and_order(hpcray, array):
    result = hpcray.get(hpcray.put(array))
    assert type(result) is type(array)
    assert (result.dtype, result.shape) == (array.dtype, array.shape)
    assert array.flags.f_contiguous <= result.flags.f_contiguous
    assert result.tolist() == array.tolist()


def test_an_array_of_200_mb_goes_to_a_task_and_back(hpcray):
    @hpcray.remote
    def negate(array):
        return -array

    array = np.arange(25_000_000, dtype=np.int64)
    result = hpcray.get(negate.remote(hpcray.put(array)))
    assert result.nbytes == 200_000_000
    assert (result[0], result[-1]) == (0, -24_999_999)
    assert np.array_equal(result, -array)


def test_ten_megabytes_of_bytes_arrive_unchanged(hpcray):
    data = np.random.default_rng(1).bytes(10_000_000)
    assert hpcray.get(hpcray.put(data)) == data


def test_a_pandas_frame_survives_a_task(hpcray):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"number": range(100_000), "text": ["a", "b"] * 50_000})

    @hpcray.remote
    def totals(frame):
        return frame.groupby("text")["number"].sum()

    expected = frame.groupby("text")["number"].sum()
    pandas.testing.assert_series_equal(hpcray.get(totals.remote(frame)), expected)
    pandas.testing.assert_frame_equal(hpcray.get(hpcray.put(frame)), frame)


def test_one_object_can_be_read_by_many_tasks(hpcray):
    ref = hpcray.put(np.ones(500_000))

    @hpcray.remote
    def total(array, factor):
        return float(array.sum()) * factor

    assert hpcray.get([total.remote(ref, x) for x in range(10)]) == [500_000.0 * x for x in range(10)]


def test_a_value_with_its_own_pickling_is_pickled_by_it(hpcray):
    class Restored:
        def __init__(self, text):
            self.text = text

        def __reduce__(self):
            return type(self), (self.text + " restored",)

    assert hpcray.get(hpcray.put(Restored("once"))).text == "once restored"
