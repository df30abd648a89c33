"""The rank process of a job that `init()` starts on this machine: `python -m hpcray.launcher.local '{"fd": 3, …}'`."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys


def main() -> None:
    """Serve one driver, on the inherited socket, until it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from hpcray.launcher.bootstrap import start_rank
    from hpcray.launcher.options import JobOptions

    arguments = json.loads(sys.argv[1])
    sock = socket.socket(fileno=arguments.pop("fd"))
    os.set_inheritable(sock.fileno(), False)
    rank = start_rank(JobOptions(**arguments), world=None)
    rank.server.add_driver(sock, is_primary=True)
    rank.serve()
    os._exit(0)


if __name__ == "__main__":
    main()
