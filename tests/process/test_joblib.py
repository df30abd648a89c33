"""joblib's backend "ray"."""

import importlib
import os

import numpy as np
import pytest

joblib = pytest.importorskip("joblib")
pytestmark = pytest.mark.usefixtures("ray_start")


@pytest.fixture
def backend(hpcray):
    importlib.import_module(f"{hpcray.__name__}.util.joblib").register_ray()
    with joblib.parallel_config("ray", n_jobs=2):
        yield


def square(x):
    if x == "bad":
        raise KeyError("as told")
    return x * x


def parallel(calls, **options):
    return joblib.Parallel(**options)(calls)


@pytest.mark.usefixtures("backend")
def test_results_come_in_order():
    assert parallel(joblib.delayed(square)(x) for x in range(100)) == [x * x for x in range(100)]
    assert parallel((joblib.delayed(square)(x) for x in range(10)), batch_size=3) == [x * x for x in range(10)]


@pytest.mark.usefixtures("backend")
def test_calls_run_in_the_job():
    assert os.getpid() not in parallel(joblib.delayed(os.getpid)() for _ in range(4))


@pytest.mark.usefixtures("backend")
def test_an_error_ends_the_call_and_the_next_one_works():
    with pytest.raises(KeyError, match="as told"):
        parallel(joblib.delayed(square)(x) for x in [1, "bad", 3])
    assert parallel(joblib.delayed(square)(x) for x in [4]) == [16]


@pytest.mark.usefixtures("backend")
def test_large_arrays_arrive():
    array = np.arange(200_000)
    sums = parallel(joblib.delayed(np.sum)(array, axis=None) for _ in range(6))
    assert sums == [array.sum()] * 6


@pytest.mark.usefixtures("backend")
def test_calls_may_be_nested():
    def outer(x):
        return sum(parallel((joblib.delayed(square)(y) for y in range(x)), n_jobs=2))

    assert parallel(joblib.delayed(outer)(x) for x in range(4)) == [0, 0, 1, 5]


def test_minus_one_means_all_cpus_of_the_job(hpcray):
    importlib.import_module(f"{hpcray.__name__}.util.joblib").register_ray()
    with joblib.parallel_config("ray", n_jobs=-1):
        assert joblib.effective_n_jobs(-1) == 2
        assert parallel(joblib.delayed(square)(x) for x in range(3)) == [0, 1, 4]


def test_options_of_the_tasks_may_be_given(hpcray):
    importlib.import_module(f"{hpcray.__name__}.util.joblib").register_ray()
    name = hpcray.__name__

    def cpus():
        return importlib.import_module(name).get_runtime_context().get_assigned_resources()["CPU"]

    with joblib.parallel_config("ray", n_jobs=2, ray_remote_args={"num_cpus": 0.5}):
        assert parallel(joblib.delayed(cpus)() for _ in range(2)) == [0.5, 0.5]


@pytest.mark.beyond_ray("a detail of hpcray's")
@pytest.mark.usefixtures("backend")
def test_a_large_array_is_stored_once(hpcray, monkeypatch):
    stored = []
    put = hpcray.put
    monkeypatch.setattr(hpcray, "put", lambda value: stored.append(id(value)) or put(value))
    array = np.arange(200_000)
    parallel(joblib.delayed(np.sum)(array) for _ in range(20))
    assert stored == [id(array)]


@pytest.mark.beyond_ray("Ray has no such generator")
@pytest.mark.usefixtures("backend")
def test_results_may_come_as_a_generator():
    results = parallel((joblib.delayed(square)(x) for x in range(20)), return_as="generator")
    assert list(results) == [x * x for x in range(20)]
