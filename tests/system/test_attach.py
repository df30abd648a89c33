"""A job without a script: it says how to attach, takes drivers of this host, and ends when it is told to."""

import signal

import pytest

from .conftest import wait_until

DRIVER = """
import sys
import hpcray

@hpcray.remote
def double(x):
    print("doubling", x)
    return 2 * x

hpcray.init(address=sys.argv[1] if len(sys.argv) > 1 else "auto")
print("doubled", hpcray.get([double.remote(i) for i in range(10)]), len(hpcray.nodes()), flush=True)
"""
DOUBLED = "doubled [0, 2, 4, 6, 8, 10, 12, 14, 16, 18] 4"
SOON = 10.0


def start_waiting_job(mpi, starter, ranks=4):
    job = starter.start([*mpi.mpirun(ranks), mpi.python, "-m", "hpcray"], python=mpi.python)
    line = job.wait_for("init(address='auto')")
    return job, line.partition("address='hpcray-")[2].partition("'")[0]


def test_drivers_attach_one_after_the_other_and_hpcray_stop_ends_the_job(mpi, starter):
    job, rest = start_waiting_job(mpi, starter)
    script = starter.write(DRIVER)
    # A driver's job is not its own: what it leaves behind is looked for at the end.
    for argv in ([mpi.python, script], [mpi.python, script, f"hpcray-{rest}"]):
        driver = starter.start(argv, python=mpi.python)
        assert driver.process.wait(60) == 0, driver.story()
        assert DOUBLED in driver.out, driver.story()
        assert "doubling" in driver.out
    stop = starter.start(["hpcray", "stop"], python=mpi.python)
    assert stop.process.wait(SOON) == 0, stop.story()
    finished = job.wait(SOON)
    assert finished.code == 0, str(finished)
    assert "Traceback" not in finished.err, str(finished)


def test_a_driver_that_is_killed_takes_its_tasks_with_it_and_no_more(mpi, starter):
    job, _ = start_waiting_job(mpi, starter, ranks=2)
    stuck = starter.write(
        """
        import time
        import hpcray

        @hpcray.remote
        def forever():
            print("stuck", flush=True)
            time.sleep(1000)

        hpcray.init(address="auto")
        hpcray.get([forever.remote() for _ in range(20)])
        """,
        "stuck.py",
    )
    driver = starter.start([mpi.python, stuck], python=mpi.python)
    driver.wait_for("stuck")
    driver.process.kill()
    next_one = starter.start([mpi.python, starter.write(DRIVER)], python=mpi.python)
    wait_until(lambda: next_one.process.poll() is not None, 20.0, lambda: f"{next_one.story()}\n{job.story()}")
    assert next_one.process.returncode == 0, next_one.story()
    assert "doubled [0, 2" in next_one.out
    job.process.send_signal(signal.SIGTERM)
    job.wait(SOON)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_job_that_waits(mpi, starter, number):
    job, _ = start_waiting_job(mpi, starter, ranks=2)
    if number == signal.SIGINT:
        job.interrupt()
    else:
        job.process.send_signal(number)
    finished = job.wait(SOON)
    assert finished.code != 0, str(finished)
    assert "Traceback" not in finished.err, str(finished)


def test_auto_without_a_job_or_with_two_is_a_clear_error(mpi, starter):
    script = starter.write(DRIVER)
    alone = starter.run([mpi.python, script], python=mpi.python)
    assert alone.code == 1
    assert "ConnectionError: no job of yours runs on this host" in alone.err
    stop = starter.run(["hpcray", "stop"], python=mpi.python)
    assert stop.code == 2
    assert stop.err.startswith("hpcray: no job of yours runs on this host"), stop.err
    jobs = [start_waiting_job(mpi, starter, ranks=1)[0] for _ in range(2)]
    driver = starter.start([mpi.python, script], python=mpi.python)
    assert driver.process.wait(60) == 1, driver.story()
    assert "ConnectionError: several jobs of yours run on this host" in driver.err, driver.story()
    for job in jobs:
        job.process.send_signal(signal.SIGTERM)
    wait_until(lambda: all(job.process.poll() is not None for job in jobs), SOON, jobs[0].story)
    for job in jobs:
        job.wait(SOON)
