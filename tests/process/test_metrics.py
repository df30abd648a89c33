"""`ray.util.metrics`: what can be recorded, and what is refused."""

import importlib
import pickle

import pytest


@pytest.fixture
def metrics(hpcray):
    return importlib.import_module(f"{hpcray.__name__}.util.metrics")


def test_metrics_describe_themselves(metrics):
    counter = metrics.Counter("a_counter", description="of things", tag_keys=("kind",))
    assert counter.set_default_tags({"kind": "x"}) is counter
    assert counter.info == {
        "name": "a_counter",
        "description": "of things",
        "tag_keys": ("kind",),
        "default_tags": {"kind": "x"},
    }
    histogram = metrics.Histogram("a_histogram", boundaries=[1, 2.5])
    assert histogram.info["boundaries"] == [1, 2.5]


def test_values_are_recorded(metrics):
    metrics.Counter("recorded_counter").inc()
    metrics.Counter("recorded_counter", tag_keys=("kind",)).inc(2, tags={"kind": "x"})
    metrics.Gauge("recorded_gauge").set(-3)
    metrics.Gauge("recorded_gauge").set(None)
    metrics.Histogram("recorded_histogram", boundaries=[1]).observe(0.5)


@pytest.mark.beyond_ray("Ray exports values and does not tell them")
def test_recorded_values_can_be_read_in_the_same_process(metrics):
    counter = metrics.Counter("read_counter", tag_keys=("kind",)).set_default_tags({"kind": "x"})
    counter.inc(2)
    counter.inc(0.5)
    counter.inc(tags={"kind": "y"})
    gauge = metrics.Gauge("read_gauge")
    gauge.set(1)
    gauge.set(-1)
    histogram = metrics.Histogram("read_histogram", boundaries=[1, 10])
    for value in (0.5, 1, 5, 100):
        histogram.observe(value)
    found = metrics.recorded()
    assert found["read_counter"] == {(("kind", "x"),): 2.5, (("kind", "y"),): 1.0}
    assert found["read_gauge"] == {(): -1}
    assert found["read_histogram"] == {(): [2, 1, 1]}


def test_wrong_metrics_are_refused(metrics):
    with pytest.raises(ValueError, match="Empty name"):
        metrics.Counter("")
    with pytest.raises(TypeError, match="tag_keys should be a tuple"):
        metrics.Counter("c", tag_keys="kind")
    with pytest.raises(TypeError, match="Tag keys must be str"):
        metrics.Counter("c", tag_keys=(1,))
    with pytest.raises(ValueError, match="boundaries argument should be provided"):
        metrics.Histogram("h")
    with pytest.raises(ValueError, match="positive values"):
        metrics.Histogram("h", boundaries=[-1, 1])


def test_wrong_values_and_tags_are_refused(metrics):
    counter = metrics.Counter("wrong_counter", tag_keys=("kind",))
    for call, error, told in (
        (lambda: counter.inc(0, {"kind": "x"}), ValueError, "must be >0"),
        (lambda: counter.inc(-1, {"kind": "x"}), ValueError, "must be >0"),
        (lambda: counter.inc("1", {"kind": "x"}), TypeError, "int or float"),
        (lambda: counter.inc(1), ValueError, "Missing value for tag key"),
        (lambda: counter.inc(1, {"kind": 1}), TypeError, "Tag values must be str"),
        (lambda: counter.set_default_tags({"other": "x"}), ValueError, "Unrecognized tag key"),
        (lambda: counter.set_default_tags({"kind": 1}), TypeError, "Tag values must be str"),
        (lambda: metrics.Gauge("wrong_gauge").set("1"), TypeError, "int or float"),
        (lambda: metrics.Histogram("wrong_histogram", boundaries=[1]).observe("1"), TypeError, "int or float"),
    ):
        with pytest.raises(error, match=told):
            call()


def test_a_name_that_is_none_is_discarded_with_a_warning(metrics):
    with pytest.warns(UserWarning, match="Invalid metric name"):
        counter = metrics.Counter("1-bad")
    counter.inc()


def test_metrics_travel_by_their_description(metrics):
    for metric in (metrics.Counter("c", "d", ("k",)), metrics.Gauge("g"), metrics.Histogram("h", boundaries=[1.0])):
        assert pickle.loads(pickle.dumps(metric)).info == metric.info
