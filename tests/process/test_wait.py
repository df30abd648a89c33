"""`wait`: who is ready, in which order, and which calls make no sense."""

import pytest

pytestmark = pytest.mark.usefixtures("ray_start")


@pytest.fixture
def blocked(hpcray, gate):
    """A ref that is not ready until the gate opens."""

    @hpcray.remote
    def slow():
        gate.wait()
        return "slow"

    return slow.remote()


def test_wait_gives_one_ready_ref_and_the_rest(hpcray, blocked):
    quick = hpcray.put("quick")
    assert hpcray.wait([blocked, quick]) == ([quick], [blocked])


def test_wait_gives_no_more_than_num_returns_even_if_more_are_ready(hpcray):
    refs = [hpcray.put(number) for number in range(4)]
    for num_returns in (1, 3):
        ready, pending = hpcray.wait(refs, num_returns=num_returns)
        assert (len(ready), len(pending)) == (num_returns, 4 - num_returns)
        assert sorted(ready + pending, key=refs.index) == refs


def test_both_lists_keep_the_order_of_the_call(hpcray, blocked):
    refs = [hpcray.put(number) for number in range(4)]
    asked = [refs[3], blocked, refs[1], refs[0], refs[2]]
    ready, pending = hpcray.wait(asked, num_returns=3)
    assert ready == sorted(ready, key=asked.index)
    assert pending == sorted(pending, key=asked.index)
    assert hpcray.wait(asked, num_returns=4) == ([refs[3], refs[1], refs[0], refs[2]], [blocked])


def test_timeout_zero_only_looks(hpcray, blocked):
    assert hpcray.wait([blocked], timeout=0) == ([], [blocked])


def test_after_the_timeout_wait_gives_fewer(hpcray, blocked):
    quick = hpcray.put("quick")
    assert hpcray.wait([blocked, quick], num_returns=2, timeout=0.05) == ([quick], [blocked])


def test_wait_wakes_when_the_last_one_is_there(hpcray, gate, blocked):
    gate.open()
    assert hpcray.wait([blocked], timeout=30) == ([blocked], [])


def test_a_task_that_failed_counts_as_ready(hpcray):
    @hpcray.remote
    def fails():
        raise ValueError

    ref = fails.remote()
    assert hpcray.wait([ref], timeout=30) == ([ref], [])


def test_wait_without_fetching_is_content_with_existence(hpcray):
    @hpcray.remote
    def large():
        return b"x" * 1_000_000

    ref = large.remote()
    assert hpcray.wait([ref], timeout=30, fetch_local=False) == ([ref], [])


def test_waiting_in_a_loop_sees_every_ref_once(hpcray):
    @hpcray.remote
    def square(x):
        return x * x

    pending = [square.remote(x) for x in range(20)]
    seen = []
    while pending:
        [ready], pending = hpcray.wait(pending)
        seen.append(hpcray.get(ready))
    assert sorted(seen) == [x * x for x in range(20)]


def test_wait_for_nothing_gives_nothing(hpcray):
    assert hpcray.wait([]) == ([], [])


def test_duplicates_are_refused(hpcray):
    ref = hpcray.put(1)
    with pytest.raises(ValueError, match=r"unique|duplicate|distinct"):
        hpcray.wait([ref, ref])


@pytest.mark.parametrize("num_returns", [0, -1, 3])
def test_num_returns_out_of_range_is_refused(hpcray, num_returns):
    with pytest.raises(ValueError, match=r"num_returns|number of objects"):
        hpcray.wait([hpcray.put(1), hpcray.put(2)], num_returns=num_returns)


def test_a_negative_timeout_is_refused(hpcray):
    with pytest.raises(ValueError, match="timeout"):
        hpcray.wait([hpcray.put(1)], timeout=-1)


def test_anything_but_a_list_of_refs_is_refused(hpcray):
    ref = hpcray.put(1)
    for wrong in (ref, (ref,), {ref}, [5], [ref, None]):
        with pytest.raises(TypeError, match="list"):
            hpcray.wait(wrong)
