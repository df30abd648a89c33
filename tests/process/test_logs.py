"""What workers print appears at the driver: prefixed, line by line, both streams, in order, folded."""

import re

import pytest

COLOUR = r"(?:\x1b\[\d+m)?"
PREFIX = re.compile(rf"^{COLOUR}\((?P<name>\S+) pid=(?P<pid>\d+)(?:, host=\S+)?\){COLOUR} (?P<text>.*)$")


def lines_of(stream, name):
    """The lines that workers called `name` printed, as (pid, text)."""
    found = [PREFIX.match(line) for line in stream.splitlines()]
    return [(int(match["pid"]), match["text"]) for match in found if match and match["name"] == name]


def texts_of(stream, name):
    return [text for _, text in lines_of(stream, name)]


def test_lines_have_the_name_and_the_pid_and_stay_on_their_stream(run_script):
    finished = run_script(
        """
        import os, sys
        import hpcray

        @hpcray.remote
        def speak():
            print("to stdout")
            print("to stderr", file=sys.stderr)
            print("two\\nlines")
            print("späť ☃")
            os.write(1, b"from the file descriptor\\n")
            return os.getpid()

        @hpcray.remote
        class Speaker:
            def speak(self):
                print("from an actor")

        with hpcray.init(num_cpus=1):
            print("pid", hpcray.get(speak.remote()))
            hpcray.get(speak.options(name="renamed").remote())
            hpcray.get(Speaker.remote().speak.remote())
        """
    )
    assert finished.returncode == 0, finished.stderr
    pid = int(re.search(r"^pid (\d+)$", finished.stdout, re.MULTILINE)[1])
    assert set(lines_of(finished.stdout, "speak")) == {
        (pid, text) for text in ("to stdout", "two", "lines", "späť ☃", "from the file descriptor")
    }
    assert texts_of(finished.stderr, "speak") == ["to stderr"]
    assert "to stderr" not in finished.stdout
    assert "two" in texts_of(finished.stdout, "renamed")
    assert texts_of(finished.stdout, "Speaker") == ["from an actor"]


@pytest.mark.beyond_ray("Ray drops what it has not shown yet when the driver ends")
def test_the_lines_of_one_worker_keep_their_order_and_none_is_lost(run_script):
    finished = run_script(
        """
        import hpcray

        @hpcray.remote
        def count():
            for number in range(20_000):
                print(f"{number} {'x' * 50}{number}")

        with hpcray.init(num_cpus=1):
            hpcray.get(count.remote())
            hpcray.get(count.remote())
        """
    )
    assert finished.returncode == 0, finished.stderr
    numbers = [int(text.split()[0]) for text in texts_of(finished.stdout, "count")]
    assert numbers == 2 * list(range(20_000))


@pytest.mark.beyond_ray("Ray drops what it has not shown yet when the driver ends")
def test_what_a_worker_says_right_before_it_dies_is_shown(run_script):
    finished = run_script(
        """
        import os
        import hpcray

        @hpcray.remote(max_retries=0)
        def die():
            print("last words", flush=True)
            os._exit(1)

        with hpcray.init(num_cpus=1):
            try:
                hpcray.get(die.remote())
            except hpcray.exceptions.WorkerCrashedError:
                print("crashed")
        """
    )
    assert finished.returncode == 0, finished.stderr
    assert "crashed" in finished.stdout.splitlines()
    assert texts_of(finished.stdout, "die") == ["last words"]


@pytest.mark.beyond_ray("Ray's worker prints a traceback")
def test_a_task_that_calls_sys_exit_prints_what_python_would_and_no_traceback(run_script):
    finished = run_script(
        """
        import sys
        import hpcray

        @hpcray.remote(max_retries=0)
        def leave():
            sys.exit("goodbye")

        with hpcray.init(num_cpus=1):
            try:
                hpcray.get(leave.remote())
            except hpcray.exceptions.WorkerCrashedError as error:
                print("exited with code 1" in str(error))
        """
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines() == ["True"]
    assert texts_of(finished.stderr, "leave") == ["goodbye"]


def test_log_to_driver_false_is_silent(run_script):
    finished = run_script(
        """
        import sys
        import hpcray

        @hpcray.remote
        def speak():
            print("unheard")
            print("unheard", file=sys.stderr)

        with hpcray.init(num_cpus=1, log_to_driver=False):
            hpcray.get(speak.remote())
        """
    )
    assert finished.returncode == 0, finished.stderr
    assert "unheard" not in finished.stdout + finished.stderr


def test_the_same_line_of_two_workers_is_folded_with_a_count(run_script):
    finished = run_script(
        """
        import hpcray

        @hpcray.remote
        class Speaker:
            def speak(self, times):
                for _ in range(times):
                    print("the same words")

        with hpcray.init(num_cpus=2):
            speakers = [Speaker.remote() for _ in range(2)]
            hpcray.get([speaker.speak.remote(1) for speaker in speakers])
            hpcray.get([speaker.speak.remote(100) for speaker in speakers])
        """
    )
    assert finished.returncode == 0, finished.stderr
    texts = texts_of(finished.stdout, "Speaker")
    assert texts.count("the same words") < 202
    counts = [int(count) for count in re.findall(r"\[repeated (\d+)x across cluster\]", finished.stdout)]
    assert texts.count("the same words") + sum(counts) == 202


@pytest.mark.beyond_ray("Ray folds the lines of different processes only")
def test_a_hundred_thousand_identical_lines_of_one_worker_are_folded(run_script):
    finished = run_script(
        """
        import hpcray

        @hpcray.remote
        def repeat():
            for _ in range(100_000):
                print("again and again")

        with hpcray.init(num_cpus=1):
            hpcray.get(repeat.remote())
        """
    )
    assert finished.returncode == 0, finished.stderr
    texts = [text for text in texts_of(finished.stdout, "repeat") if text.startswith("again and again")]
    assert len(texts) < 100
    counts = [int(count) for count in re.findall(r"\[repeated (\d+)x", finished.stdout)]
    assert texts.count("again and again") + sum(counts) == 100_000
