"""Amounts in units of 1/10,000."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcray.resources import UNIT, as_floats, choose_units, shape_of, slots, to_fixed, to_float


def test_ten_tenths_are_one():
    assert 10 * to_fixed(0.1) == to_fixed(1)


@given(st.integers(0, 10**12))
def test_an_amount_survives_its_way_to_the_user_and_back(amount):
    assert to_fixed(to_float(amount)) == amount


def test_zeros_are_left_out():
    assert shape_of({"CPU": 0, "GPU": 0.5}) == {"GPU": UNIT // 2}


@pytest.mark.parametrize("amount", [-1, math.nan, math.inf, -math.inf])
def test_impossible_amounts_are_refused(amount):
    with pytest.raises(ValueError, match="'CPU'"):
        shape_of({"CPU": amount})


def test_what_is_finer_than_the_unit_is_refused_rather_than_forgotten():
    with pytest.raises(ValueError, match="below 1/10000"):
        shape_of({"CPU": 0.00001})


def test_users_see_floats():
    assert as_floats({"CPU": 15_000}) == {"CPU": 1.5}


@pytest.mark.parametrize(
    ("available", "shape", "expected"),
    [
        ({"CPU": 3}, {"CPU": 1}, 3),
        ({"CPU": 3}, {"CPU": 2}, 1),
        ({"CPU": 4, "GPU": 1}, {"CPU": 1, "GPU": 1}, 1),
        ({"CPU": 4}, {"GPU": 1}, 0),
        ({"CPU": -4}, {"CPU": 1}, 0),
    ],
)
def test_slots_are_counted_by_the_scarcest(available, shape, expected):
    assert slots(available, shape) == expected


def test_what_needs_nothing_fits_without_limit():
    assert slots({}, {}) > 1_000_000


@pytest.mark.parametrize(
    ("free", "amount", "fitting", "chosen"),
    [
        ([UNIT, 3000, 5000], 3000, 5, {1: 3000}),
        ([UNIT, UNIT, 5000], UNIT, 2, {0: UNIT}),
        ([UNIT, UNIT, UNIT], 2 * UNIT, 1, {0: UNIT, 1: UNIT}),
        ([UNIT, UNIT, UNIT], 15_000, 1, {0: UNIT, 1: UNIT}),
    ],
)
def test_of_units_the_fullest_is_shared_and_more_than_one_is_whole_ones(free, amount, fitting, chosen):
    units = dict(enumerate(free))
    assert slots({}, {"GPU": amount}, {"GPU": units}) == fitting
    assert choose_units(units, amount) == chosen
