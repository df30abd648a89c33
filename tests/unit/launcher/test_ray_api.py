import json

import pytest

from hpcray.launcher import ray_api, ray_names
from hpcray.ray_alias import RAY_VERSION


def status_of(module, name, description):
    [row] = ray_api.compare({module: {name: description}})
    return row.status, row.detail


def test_a_name_is_supported_different_or_missing():
    assert status_of("ray", "put", {"kind": "function", "parameters": ["value"]}) == ("supported", "")
    assert status_of("ray", "put", {"kind": "function", "parameters": ["value", "colour"]}) == (
        "different",
        "lacks the parameters colour",
    )
    assert status_of("ray", "java_function", {"kind": "function", "parameters": []}) == ("missing", "")
    assert status_of("ray.util.dask", "anything", {"kind": "value"}) == ("missing", "")
    assert status_of("ray", "client", {"kind": "function", "parameters": []}) == ("missing", ""), "a module of ours"
    assert status_of("ray", "tune", {"kind": "library"}) == ("missing", "")


def test_classes_are_compared_by_their_methods_and_exceptions_by_their_bases():
    ref = {"kind": "class", "members": ["binary", "fly", "hex"]}
    assert status_of("ray", "ObjectRef", ref) == ("different", "lacks the members fly")
    timeout = {"kind": "exception", "bases": ["RayError", "TimeoutError", "OSError"]}
    assert status_of("ray.exceptions", "GetTimeoutError", timeout) == ("supported", "")


def test_options_are_compared_by_what_they_are_for():
    assert status_of("options of functions", "max_retries", {"kind": "option"}) == ("supported", "")
    assert status_of("options of actors", "max_retries", {"kind": "option"}) == ("missing", "")


def test_describing_what_is_public_of_a_value():
    class Thing:
        def use(self):
            pass

        def _private(self):
            pass

    assert ray_names.describe(Thing) == {"kind": "class", "members": ["use"]}
    assert ray_names.describe(lambda a, *, b, _c=None, **d: None) == {"kind": "function", "parameters": ["a", "b"]}
    assert ray_names.describe(KeyError)["bases"] == ["LookupError", "Exception", "BaseException"]
    assert ray_names.describe(5) == {"kind": "value"}


def test_the_saved_list_is_of_the_ray_that_hpcray_follows():
    known = json.loads(ray_names.SAVED.read_text())
    assert known["version"] == RAY_VERSION
    assert json.loads(ray_names.as_json(known)) == known
    assert {"ray", "ray.util", "ray.exceptions", "options of actors"} <= set(known["api"])


def test_the_saved_list_is_what_that_ray_says():
    ray = pytest.importorskip("ray")
    if ray.__version__ != RAY_VERSION:
        pytest.skip(f"Ray {ray.__version__} is installed, the list is of {RAY_VERSION}")
    assert ray_names.collect() == json.loads(ray_names.SAVED.read_text())


def test_the_report_lists_every_name_and_counts(monkeypatch, capsys):
    known = json.loads(ray_names.SAVED.read_text())
    monkeypatch.setattr(ray_api, "collect", lambda: known)
    assert ray_api.report() == 0
    printed = capsys.readouterr().out
    rows = ray_api.compare(known["api"])
    assert "supported  ray.get\n" in printed
    assert printed.endswith(f"{len(rows)} names: {sum(r.status == 'supported' for r in rows)} supported, "
                            f"{sum(r.status == 'different' for r in rows)} different, "
                            f"{sum(r.status == 'missing' for r in rows)} missing\n")  # fmt: skip


@pytest.mark.parametrize("name", ["init", "get", "put", "wait", "remote", "kill", "get_actor", "nodes"])
def test_the_core_is_supported(name):
    known = json.loads(ray_names.SAVED.read_text())
    assert status_of("ray", name, known["api"]["ray"][name])[0] == "supported"
