"""`hpcray run -n` around an mpirun that these tests play: what it relays, forwards, and ends with."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from hpcray.launcher import stdio

BANNER = """\
--------------------------------------------------------------------------
prterun detected that one or more processes exited with non-zero status,
thus causing the job to be terminated. The first process to do so was:

   Process name: [prterun-vm-5788@1,1]
   Exit code:    3
--------------------------------------------------------------------------
"""


@pytest.fixture
def start(tmp_path):
    """Starts `hpcray run -n 2` with an mpirun that does what the given code says; gives the process."""
    started = []

    def start_it(code, **streams):
        mpirun = tmp_path / "mpirun"
        mpirun.write_text(
            f"#!{sys.executable}\nimport os, signal, sys, time\n"
            "if '--version' in sys.argv:\n    print('mpirun (Open MPI) 5.0.11')\n    sys.exit()\n"
            + textwrap.dedent(code)
        )
        mpirun.chmod(0o755)
        (tmp_path / "script.py").touch()
        process = subprocess.Popen(
            [sys.executable, "-m", "hpcray", "run", "--mpirun", mpirun, "-n", "2", tmp_path / "script.py"],
            **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams},
        )
        started.append(process)
        return process

    yield start_it
    for process in started:
        process.kill()
        process.communicate()


def wait_until_gone(pid, timeout=10.0):
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            with Path(f"/proc/{pid}/stat").open() as stat:
                if stat.read().rpartition(")")[2].split()[0] == "Z":
                    return
        except FileNotFoundError:
            return
        time.sleep(0.01)
    pytest.fail(f"process {pid} is still there after {timeout} s")


def test_the_exit_code_comes_through_and_the_banner_does_not(start):
    out, err = (process := start(f"sys.stderr.write('last words\\n' + {BANNER!r}); sys.exit(3)")).communicate()
    assert (process.returncode, out, err) == (3, b"", b"last words\n")


def test_mpirun_has_a_session_of_its_own_and_no_stdin(start):
    code = "print(os.getsid(0) == os.getpid(), sys.stdin.read() == '')"
    process = start(code, stdin=subprocess.PIPE)
    assert process.stdout.read() == b"True True\n"
    assert process.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_asks_the_job_to_stop(start, number):
    process = start(
        """
        signal.signal(signal.SIGUSR1, lambda *_: (sys.stderr.write('ended well\\n'), sys.exit(0)))
        print('ready', flush=True)
        time.sleep(60)
        """
    )
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=10)
    assert err.startswith(b"hpcray: ")
    assert err.endswith(b"stopping the job\nended well\n")
    assert err.count(b"\n") == 2
    assert process.returncode == 128 + number


def test_the_second_signal_is_less_polite_and_the_third_is_none(start):
    process = start(
        """
        signal.signal(signal.SIGUSR1, lambda *_: print('asked', flush=True))
        signal.signal(signal.SIGTERM, lambda *_: print('told', flush=True))
        print('ready', flush=True)
        while True: time.sleep(60)
        """
    )
    for line in (b"ready\n", b"asked\n", b"told\n"):
        assert process.stdout.readline() == line
        process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert err == b"hpcray: interrupted; stopping the job\n"
    assert process.returncode == 130


def test_who_does_not_stop_is_killed_within_5_s(start):
    process = start(
        """
        for number in (signal.SIGUSR1, signal.SIGTERM): signal.signal(number, signal.SIG_IGN)
        print('ready', flush=True)
        while True: time.sleep(60)
        """
    )
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=5)
    assert process.returncode == 130


def test_mpirun_does_not_outlive_hpcray_run(start):
    process = start("print(os.getpid(), flush=True); time.sleep(60)")
    pid = int(process.stdout.readline())
    process.kill()
    wait_until_gone(pid)


def test_a_killed_mpirun_is_told_in_a_line(start):
    process = start("os.kill(os.getpid(), 9)")
    _, err = process.communicate()
    assert process.returncode == 128 + 9
    assert err.endswith(b"mpirun was killed by SIGKILL; the job is lost\n")


def test_a_process_that_keeps_stderr_open_is_not_waited_for(start):
    process = start(
        """
        if os.fork() == 0:
            os.close(1)
            time.sleep(3)
        else:
            sys.stderr.write('x\\n')
        """
    )
    began = time.monotonic()
    process.wait()
    assert time.monotonic() - began < 3


def test_rank_0_borrows_the_users_own_streams(start, tmp_path):
    (tmp_path / "in.txt").write_text("from the user\n")
    with (tmp_path / "in.txt").open() as stdin:
        process = start(
            """
            from hpcray.launcher import stdio
            fds = stdio.borrow()
            os.write(fds[1], os.read(fds[0], 100))
            os.write(fds[2], b'to stderr')
            """,
            stdin=stdin,
        )
        out, err = process.communicate()
    assert (process.returncode, out, err) == (0, b"from the user\n", b"to stderr")


def test_nothing_is_borrowed_where_nobody_lends():
    assert stdio.borrow({}) is None
    assert stdio.borrow({stdio.VARIABLE: "hpcray-nobody"}) is None


def test_a_lender_that_nobody_asks_does_not_block():
    lender = stdio.Lender()
    lender.lend_nowait()
    lender.close()
    assert os.fstat(0)
