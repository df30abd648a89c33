"""Whole scripts under plain Python: what `__main__` and the modules beside it define, and how they end."""

import pytest


def test_functions_and_classes_of_main_and_of_a_module_beside_the_script_are_found(run_script):
    finished = run_script(
        """
        import sys
        import helper
        import hpcray

        LIMIT = 5

        class Point:
            def __init__(self, x):
                self.x = x

            def __eq__(self, other):
                return self.x == other.x

        def local_double(x):
            return min(2 * x, LIMIT)

        @hpcray.remote
        def use(x):
            return helper.triple(local_double(x.x)), __name__, Point(1)

        if __name__ == "__main__":
            hpcray.init(num_cpus=1)
            value, name, point = hpcray.get(use.remote(Point(4)))
            assert (value, name) == (15, "__main__")
            assert point == Point(1) and isinstance(point, Point)
            assert hpcray.get(helper.remote_triple.remote(3)) == 9
            assert hpcray.get(helper.Keeper.remote(4).read.remote()) == 4
            assert hpcray.get(hpcray.remote(helper.triple).remote(5)) == 15
            try:
                hpcray.get(helper.remote_fails.remote())
            except helper.OwnError as error:
                assert error.code == 7
            print("arguments", sys.argv[1:])
        """,
        "one",
        "--two",
        helper="""
        import hpcray

        class OwnError(Exception):
            def __init__(self, code):
                super().__init__(code)
                self.code = code

        def triple(x):
            return 3 * x

        @hpcray.remote
        def remote_triple(x):
            return triple(x)

        @hpcray.remote
        def remote_fails():
            raise OwnError(7)

        @hpcray.remote
        class Keeper:
            def __init__(self, value):
                self.value = value

            def read(self):
                return self.value
        """,
    )
    assert finished.returncode == 0, finished.stderr
    assert "arguments ['one', '--two']" in finished.stdout


def test_a_script_that_never_shuts_down_ends_cleanly(run_script):
    finished = run_script(
        """
        import hpcray

        @hpcray.remote
        def one():
            return 1

        print("one is", hpcray.get(one.remote()))
        """
    )
    assert finished.returncode == 0, finished.stderr
    assert "one is 1" in finished.stdout


def test_a_script_may_end_while_its_tasks_and_actors_still_run(run_script):
    finished = run_script(
        """
        import time
        import hpcray

        @hpcray.remote
        def forever():
            time.sleep(3600)

        @hpcray.remote
        class Forever:
            def run(self):
                time.sleep(3600)

        hpcray.init(num_cpus=1)
        actor = Forever.remote()
        refs = [forever.remote() for _ in range(5)] + [actor.run.remote()]
        hpcray.wait(refs, timeout=0.5)
        """
    )
    assert finished.returncode == 0, finished.stderr


def test_an_uncaught_error_of_a_task_ends_the_script_with_one_and_the_remote_traceback(run_script):
    finished = run_script(
        """
        import hpcray

        @hpcray.remote
        def divide(a, b):
            return a / b

        hpcray.init(num_cpus=1)
        hpcray.get(divide.remote(1, 0))
        """
    )
    assert finished.returncode == 1
    assert "return a / b" in finished.stderr
    assert "ZeroDivisionError" in finished.stderr


def test_sys_exit_gives_its_code(run_script):
    finished = run_script(
        """
        import sys
        import hpcray

        hpcray.init(num_cpus=1)
        hpcray.put(1)
        sys.exit(3)
        """
    )
    assert finished.returncode == 3


@pytest.mark.beyond_ray("Ray's connection breaks in ways of its own after a fork")
def test_a_forked_process_that_uses_the_connection_of_its_parent_is_told_so(run_script):
    finished = run_script(
        """
        import os
        import hpcray

        hpcray.init(num_cpus=1)
        ref = hpcray.put(5)
        child = os.fork()
        if child == 0:
            try:
                hpcray.get(ref)
            except RuntimeError as error:
                print("refused:", error, flush=True)
                os._exit(0)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert hpcray.get(ref) == 5
        """
    )
    assert finished.returncode == 0, finished.stderr
    assert "fork" in finished.stdout
