"""A command's connection to a job that runs on this host: it looks, and changes nothing."""

from __future__ import annotations

import uuid

from hpcray.client import Client
from hpcray.launcher import attach


def visit(address: str) -> Client:
    """Attach as a driver without a script of its own. Blocks until the job has answered.

    Raises:
        ConnectionError: There is no job, there are several, or it belongs to somebody else.
        ValueError: Not an address of a job.
        RuntimeError: The job runs another version of hpcray or Python.
        RayError: It ends just now.
    """
    client = Client(attach.connect(address), is_driver=True)
    try:
        client.register(str(uuid.uuid4()), [], log_to_driver=False)
    except BaseException:
        client.close()
        raise
    return client
