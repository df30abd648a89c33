"""Ctrl-C, SIGTERM, and kill -9 of every kind of process: the job ends, or goes on, and nothing is left."""

import signal

import psutil
import pytest

from .conftest import DISTINCT_WAYS, wait_until

SOON = 10.0  # seconds for what is promised within five: the machine may be busy

BUSY = """
import os
import time
import hpcray

@hpcray.remote
def spin(i):
    print("spinning", i, flush=True)
    time.sleep(100)

hpcray.init()
refs = [spin.remote(i) for i in range(6)]
time.sleep(0.3)
print("driver", os.getpid(), flush=True)
hpcray.get(refs)
"""


def busy_job(way, starter, ranks=4):
    """A job whose driver waits for tasks that never end, and the driver's process."""
    job = starter.start(way.argv(ranks, starter.write(way.preamble + BUSY)), python=way.python)
    line = job.wait_for("driver ")
    job.wait_for("spinning")
    return job, psutil.Process(int(line.split()[1]))


def rank_processes(job):
    """The processes that serve a rank, rank 0 first; a driver that one of them forked is younger."""
    ranks = {}
    for process in job.processes():
        environment = process.environ()
        number = environment.get("OMPI_COMM_WORLD_RANK", environment.get("PMI_RANK"))
        if number is not None:
            ranks.setdefault(int(number), process)
    return [ranks[number] for number in sorted(ranks)]


def workers_of(job):
    return [process for process in job.processes("forkserver") if process.name() == "hpcray:worker"]


def fork_servers_of(job):
    return [process for process in job.processes("forkserver") if process.name() == "hpcray:forks"]


# ------------------------------------------------------------------------------------------------- Ctrl-C and SIGTERM
@pytest.mark.parametrize("way", DISTINCT_WAYS, indirect=True)
def test_ctrl_c_ends_everything(way, starter):
    job, _driver = busy_job(way, starter)
    job.interrupt()
    finished = job.wait(SOON)
    assert finished.code != 0, str(finished)
    if way.name.startswith("run"):  # hpcray's own launcher: its manners are ours
        assert finished.code == 130, str(finished)
        assert "Traceback" not in finished.err, str(finished)
        assert finished.err.lower().count("interrupt") == 1, str(finished)
    elif way.name != "python" and "late" not in way.name:
        assert "Traceback" not in finished.err, str(finished)


@pytest.mark.parametrize("way", ["run", "run-n:openmpi", "run-n:mpich"], indirect=True)
def test_sigterm_of_the_launcher_ends_everything(way, starter):
    job, _driver = busy_job(way, starter)
    job.process.send_signal(signal.SIGTERM)
    finished = job.wait(SOON)
    assert finished.code == 143, str(finished)
    assert "Traceback" not in finished.err


@pytest.mark.parametrize("way", ["run", "run-n:openmpi", "run-n:mpich"], indirect=True)
def test_a_script_may_clean_up_after_ctrl_c(way, starter):
    script = starter.write(
        """
        import time
        import hpcray

        hpcray.init()
        try:
            print("driver", flush=True)
            time.sleep(100)
        except KeyboardInterrupt:
            time.sleep(0.5)
            print("cleaned up", flush=True)
            raise
        """
    )
    job = starter.start(way.argv(2, script), python=way.python)
    job.wait_for("driver")
    job.interrupt()
    finished = job.wait(SOON)
    assert finished.code == 130, str(finished)
    assert "cleaned up" in finished.out, str(finished)
    assert "Traceback" not in finished.err, str(finished)


@pytest.mark.parametrize("way", ["run", "run-n:openmpi", "run-n:mpich"], indirect=True)
def test_a_script_that_ignores_ctrl_c_ends_all_the_same(way, starter):
    script = starter.write(
        """
        import signal
        import time
        import hpcray

        hpcray.init()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("driver", flush=True)
        time.sleep(100)
        """
    )
    job = starter.start(way.argv(2, script), python=way.python)
    job.wait_for("driver")
    job.interrupt()
    finished = job.wait(SOON)
    assert finished.code == 130, str(finished)


# ------------------------------------------------------------------------------------------------------------ kill -9
@pytest.mark.parametrize("way", DISTINCT_WAYS, indirect=True)
def test_kill_9_of_the_driver_ends_the_job(way, starter):
    job, driver = busy_job(way, starter)
    driver.kill()
    finished = job.wait(SOON)
    # A late init makes the script a rank: what its death looks like is up to mpirun.
    expected = {137} if "late" not in way.name else {137, 9}
    assert finished.code in expected, str(finished)


@pytest.mark.parametrize("way", ["run", "python", "run-n:openmpi", "run-n:mpich"], indirect=True)
def test_kill_9_of_a_worker_is_a_retry(way, starter):
    script = starter.write(
        """
        import os
        import pathlib
        import time
        import hpcray

        @hpcray.remote(max_retries=3)
        def once(marker):
            if not marker.exists():
                marker.touch()
                print("first", flush=True)
                time.sleep(100)
            return "again"

        hpcray.init()
        print(hpcray.get(once.remote(pathlib.Path("marker").absolute())), flush=True)
        """
    )
    job = starter.start(way.argv(3, script), python=way.python)
    job.wait_for("first")
    for worker in workers_of(job):
        worker.kill()
    finished = job.wait()
    assert finished.code == 0, str(finished)
    assert "again" in finished.out


@pytest.mark.parametrize(
    "way", ["run", "run-n:openmpi", "run-n:mpich", "mpirun-init:openmpi", "mpirun-init:mpich"], indirect=True
)
def test_kill_9_of_a_fork_server_ends_the_job(way, starter):
    job, _driver = busy_job(way, starter)
    fork_servers_of(job)[-1].kill()
    finished = job.wait(SOON)
    assert finished.code != 0, str(finished)
    assert "fork server" in finished.err, str(finished)


MPI_WAYS = [f"{way}:{library}" for way in ("run-n", "mpirun-module", "mpirun-init") for library in ("openmpi", "mpich")]


@pytest.mark.parametrize("way", MPI_WAYS, indirect=True)
@pytest.mark.parametrize("rank", [0, -1])
def test_kill_9_of_a_rank_ends_the_job(way, rank, starter):
    job, _driver = busy_job(way, starter, ranks=3)
    ranks = wait_until(lambda: rank_processes(job), SOON, job.story)
    ranks[rank].kill()
    finished = job.wait(SOON)
    assert finished.code != 0, str(finished)


@pytest.mark.parametrize("way", MPI_WAYS, indirect=True)
def test_kill_9_of_mpirun_ends_the_job(way, starter):
    job, _driver = busy_job(way, starter, ranks=3)
    launcher = next(p for p in job.processes("-n 3") if p.cmdline()[0].endswith(("mpirun", "mpiexec", "prterun")))
    launcher.kill()
    finished = job.wait(SOON)
    assert finished.code != 0, str(finished)


@pytest.mark.parametrize("way", ["run-n:openmpi", "run-n:mpich"], indirect=True)
def test_kill_9_of_hpcray_run_ends_the_job(way, starter):
    job, _driver = busy_job(way, starter, ranks=3)
    job.process.kill()
    job.wait(SOON)
