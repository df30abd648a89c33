"""What makes a process a worker, and how it ends: for those that the fork server forks, and those that replace them."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from hpcray.raylet.descendants import set_process_name


def become_worker() -> None:
    """Take a worker's name, and its deafness to Ctrl-C."""
    # A handler, not SIG_IGN: what a task starts by exec gets the default back.
    signal.signal(signal.SIGINT, lambda *_: None)
    set_process_name("hpcray:worker")


def exit_after(work: Callable[[], None]) -> NoReturn:
    """Do a worker's work and end the process, with what the work says by SystemExit or an exception."""
    code = 1
    try:
        work()
        code = 0
    except SystemExit as ended:  # of a task's; quiet, as the interpreter takes it
        if ended.code is None or isinstance(ended.code, int):
            code = ended.code or 0
        else:
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
