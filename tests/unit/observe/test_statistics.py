"""Amounts and rates."""

from __future__ import annotations

import msgspec
import pytest

from hpcray.observe.statistics import RATE_WINDOW, Amount, Meter, Traffic


def test_amounts_add_up():
    assert Amount(1, 100) + Amount(2, 50) == Amount(3, 150)


def test_a_snapshot_cannot_be_changed():
    with pytest.raises(AttributeError):
        Amount(1, 2).objects = 3  # type: ignore[misc]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(Amount(1, 2)), type=Amount) == Amount(1, 2)


def test_the_rate_of_a_steady_flow_is_its_rate():
    meter = Meter()
    for tick in range(1000):
        meter.add(100, tick * 0.1)
    assert meter.rate(99.9) == pytest.approx(1000, rel=0.02)


def test_a_rate_fades_when_nothing_flows_and_never_grows_by_itself():
    meter = Meter()
    assert meter.rate(50.0) == 0
    meter.add(5000, 100.0)
    rates = [meter.rate(100.0 + seconds) for seconds in (0, 1, RATE_WINDOW, 10 * RATE_WINDOW)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == pytest.approx(5000 / RATE_WINDOW)
    assert rates[-1] < 1
    assert meter.rate(99.0) == rates[0]  # a clock that is read a little early


def test_traffic_counts_for_ever_and_measures_the_present():
    traffic = Traffic()
    traffic.add(10, 0.0)
    traffic.add(20, 1000.0)
    assert traffic.total == Amount(2, 30)
    assert traffic.rate(1000.0) == pytest.approx(20 / RATE_WINDOW)
