"""The plugin that ships with hpcray, in a user's sessions: whatever becomes of a test on rank 0, nobody waits."""

from __future__ import annotations

import re

import pytest

TESTS = """
    import os
    import pytest
    import hpcray

    RANK = int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", 0)))

    @pytest.fixture
    def broken(hpcray_job):
        raise ValueError("on rank 0 only")

    @pytest.fixture
    def broken_before():
        raise ValueError("on rank 0 only, before there is a job")

    def double(x):
        return 2 * x

    @pytest.mark.hpcray(num_cpus=2, resources={"disk": 1})
    def test_good(hpcray_job):
        assert RANK == 0
        assert hpcray.cluster_resources()["disk"] == len(hpcray.nodes())
        assert hpcray.get(hpcray.remote(double).remote(21)) == 42

    @pytest.mark.skip
    def test_skipped_by_mark(hpcray_job): pass

    @pytest.mark.skipif(RANK > 0, reason="on the other ranks")
    def test_skipped_there(hpcray_job):
        assert hpcray.get(hpcray.remote(double).remote(1)) == 2

    @pytest.mark.skipif(RANK == 0, reason="on rank 0")
    def test_skipped_here(hpcray_job): pass

    def test_skips_itself(hpcray_job): pytest.skip("on second thoughts")

    @pytest.mark.xfail(raises=ZeroDivisionError, strict=True)
    def test_expected_to_fail(hpcray_job): 1 / 0

    def test_bad_setup(broken): pass

    def test_bad_setup_before(broken_before, hpcray_job): pass

    def test_two_jobs(hpcray_job):
        hpcray.shutdown()
        hpcray.init(num_cpus=1)
        assert hpcray.get(hpcray.remote(double).remote(1)) == 2

    @pytest.mark.parametrize("x", [1, 2])
    def test_bad(hpcray_job, x):
        assert hpcray.get(hpcray.remote(double).remote(x)) == 3

    def test_without_a_job(): assert RANK >= 0

    def test_good_in_the_end(hpcray_job):
        assert hpcray.get(hpcray.remote(double).remote(1)) == 2
"""
PLUGIN = """
    from importlib.metadata import entry_points

    # An interpreter that only has hpcray on its path does not load its plugin by itself.
    pytest_plugins = [] if entry_points(group="pytest11", name="hpcray") else ["hpcray.testing.plugin"]
"""
DIFFERENT_ON_EACH_RANK = """
    def pytest_collection_modifyitems(items):
        import os
        rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", 0)))
        del items[rank + 1 :]
"""
PYTEST = ("-m", "pytest", "--with-mpi", "-q", "-p", "no:cacheprovider", "--color=no")


@pytest.fixture
def session(starter, mpi):
    """``session(ranks, *arguments)``: run the tests above under this MPI."""

    def run(ranks, *arguments):
        write_tests(starter)
        return starter.run([*mpi.mpirun(ranks), mpi.python, *PYTEST, *arguments], python=mpi.python)

    return run


def write_tests(starter):
    starter.write("[pytest]\n", "pytest.ini")
    starter.write(PLUGIN, "conftest.py")
    starter.write(TESTS, "test_users.py")


def summaries(finished):
    """The last lines of all ranks, without the time, in alphabetical order. They may begin within another rank's line."""
    return sorted(re.findall(r"(\d+ (?:passed|failed).*?) in [0-9.]+s", finished.out))


def test_failures_and_skips_on_rank_0_leave_nobody_waiting(session):
    finished = session(2)
    assert finished.code == 1, finished
    here = "2 failed, 5 passed, 3 skipped, 1 xfailed, 2 errors"
    there = "10 passed, 2 skipped, 1 xfailed"
    assert summaries(finished) == sorted([here, there]), finished


def test_a_session_that_stops_at_the_first_failure_stops_on_all_ranks(session):
    finished = session(3, "-x")
    assert finished.code, finished
    assert "1 error" in finished.out
    assert len(summaries(finished)) == 3, finished


def test_selected_tests_pass_on_all_ranks(session):
    finished = session(2, "-k", "good")
    assert finished.code == 0, finished
    assert summaries(finished) == ["2 passed, 11 deselected"] * 2, finished


def test_ranks_with_other_tests_are_refused(session, starter):
    starter.write(DIFFERENT_ON_EACH_RANK, "tests/conftest.py")
    starter.write(TESTS, "tests/test_theirs.py")
    finished = session(3, "tests")
    assert finished.code, finished
    assert "ranks [1, 2] have collected other tests than rank 0" in finished.err, finished


def test_without_mpirun_the_same_tests_run_on_a_job_of_one_rank(starter, python):
    write_tests(starter)
    finished = starter.run([python, *(word for word in PYTEST if word != "--with-mpi")], python=python)
    assert finished.code == 1, finished
    assert summaries(finished) == ["2 failed, 5 passed, 3 skipped, 1 xfailed, 2 errors"], finished
