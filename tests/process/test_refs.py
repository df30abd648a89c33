"""ObjectRefs as values: identity, hashing, awaiting, and how long they keep an object alive."""

import asyncio
import gc

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("ray_start")


def test_hex_and_binary_are_two_spellings_of_one_id(hpcray):
    ref = hpcray.put(1)
    assert isinstance(ref.binary(), bytes)
    assert ref.hex() == ref.binary().hex()
    assert repr(ref) == f"ObjectRef({ref.hex()})"


def test_refs_are_equal_if_they_name_one_object(hpcray):
    @hpcray.remote
    def back(refs):
        return refs[0]

    ref, other = hpcray.put(1), hpcray.put(1)
    same = hpcray.get(back.remote([ref]))
    assert same == ref
    assert hash(same) == hash(ref)
    assert same is not ref
    assert other != ref
    assert ref != ref.binary()


def test_refs_are_keys_of_dicts_and_members_of_sets(hpcray):
    refs = [hpcray.put(number) for number in range(3)]
    number_of = {ref: number for number, ref in enumerate(refs)}
    assert [number_of[ref] for ref in reversed(refs)] == [2, 1, 0]
    assert len({*refs, *refs}) == 3


def test_a_ref_is_true_and_cannot_be_iterated(hpcray):
    ref = hpcray.put([])
    assert ref
    with pytest.raises(TypeError, match="iter"):
        list(ref)


def test_a_ref_can_be_awaited(hpcray):
    @hpcray.remote
    def double(x):
        return 2 * x

    async def main():
        one = await double.remote(1)
        more = await asyncio.gather(*[double.remote(x) for x in range(5)], hpcray.put("put"))
        return one, more

    assert asyncio.run(main()) == (2, [0, 2, 4, 6, 8, "put"])


def test_awaiting_a_failed_task_raises_its_error(hpcray):
    @hpcray.remote
    def fails():
        raise KeyError("awaited")

    async def main():
        await fails.remote()

    with pytest.raises(KeyError, match="awaited"):
        asyncio.run(main())


def test_the_event_loop_goes_on_while_a_ref_is_awaited(hpcray, gate):
    @hpcray.remote
    def slow():
        gate.wait()
        return "done"

    async def open_gate():
        await asyncio.sleep(0)
        gate.open()

    async def main():
        return await asyncio.wait_for(asyncio.gather(slow.remote(), open_gate()), timeout=60)

    assert asyncio.run(main()) == ["done", None]


def test_future_gives_a_future_of_the_standard_library(hpcray):
    @hpcray.remote
    def compute(fail):
        if fail:
            raise ValueError("no")
        return 5

    assert compute.remote(False).future().result(timeout=60) == 5
    with pytest.raises(ValueError, match="no"):
        compute.remote(True).future().result(timeout=60)


def test_a_future_calls_back_when_the_object_is_there(hpcray, gate, wait_until):
    @hpcray.remote
    def slow():
        gate.wait()
        return 5

    results = []
    slow.remote().future().add_done_callback(lambda future: results.append(future.result()))
    assert results == []
    gate.open()
    wait_until(lambda: results == [5])


def test_a_ref_inside_an_object_keeps_its_object_alive(hpcray):
    outer = hpcray.put({"inner": hpcray.put(np.full(300_000, 3))})
    gc.collect()
    assert hpcray.get(hpcray.get(outer)["inner"]).sum() == 900_000


def test_a_ref_of_a_ref_of_a_ref_leads_to_the_value(hpcray):
    ref = hpcray.put([hpcray.put([hpcray.put("value")])])
    gc.collect()
    assert hpcray.get(hpcray.get(hpcray.get(ref)[0])[0]) == "value"


def test_an_argument_lives_until_its_task_has_run_even_if_the_driver_forgets_it(hpcray, gate):
    @hpcray.remote
    def total(refs):
        gate.wait()
        return int(hpcray.get(refs[0]).sum())

    result = total.remote([hpcray.put(np.ones(300_000))])
    gc.collect()
    gate.open()
    assert hpcray.get(result) == 300_000


def test_an_actor_that_keeps_a_ref_keeps_the_object(hpcray):
    @hpcray.remote
    class Keeper:
        def keep(self, refs):
            self.refs = refs

        def total(self):
            return int(hpcray.get(self.refs[0]).sum())

    keeper = Keeper.remote()
    ref = hpcray.put(np.ones(300_000))
    hpcray.get(keeper.keep.remote([ref]))
    del ref
    gc.collect()
    hpcray.get([hpcray.put(np.zeros(300_000)) for _ in range(10)])
    assert hpcray.get(keeper.total.remote()) == 300_000


def test_a_borrowed_ref_can_be_lent_on_and_outlives_those_between(hpcray):
    @hpcray.remote
    def lend_on(refs, depth):
        return refs if depth == 0 else hpcray.get(lend_on.remote(refs, depth - 1))

    ref = hpcray.put(np.ones(300_000))
    result = lend_on.remote([ref], 3)
    del ref
    gc.collect()
    assert hpcray.get(hpcray.get(result)[0]).sum() == 300_000


def test_ten_thousand_refs_can_be_held_and_read(hpcray):
    refs = [hpcray.put(number) for number in range(10_000)]
    assert hpcray.get(refs) == list(range(10_000))
