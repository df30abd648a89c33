"""A worker process: runs what its raylet sends, until it is told to exit or the raylet is gone."""

from __future__ import annotations

import contextlib
import gc
import os
import socket

from hpcray.client import Client, EnvironmentAsked, set_client
from hpcray.exceptions import RaySystemError
from hpcray.protocol import messages as m
from hpcray.runtime_context import assign_gpus
from hpcray.worker import output
from hpcray.worker.executor import Executor
from hpcray.worker.threads import bind_threads


def main(sock: socket.socket) -> None:
    """Serve on a connected socket. Blocks for the life of the worker."""
    serve(Client(sock, is_driver=False))


def serve(client: Client) -> None:
    """Be a worker on this connection, as `main`."""
    output.install()
    set_client(client)
    inbox = client.inbox

    def hand_back() -> None:
        # What was not started must not wait for what is about to block; it may be just what that waits for.
        kept: list[m.Run] = []
        tasks: list[bytes] = []
        with contextlib.suppress(IndexError):
            while True:
                work = inbox.popleft()
                if work.actor or client.served.asked_for(work):
                    kept.append(work)
                elif client.may_start(work):
                    tasks.append(work.task)
        inbox.extendleft(reversed(kept))
        if tasks:
            client.send(m.HandBack(tasks))

    executor = Executor(client)
    client.before_blocking = hand_back
    client.on_gpus = assign_gpus
    client.on_cpus = lambda message: bind_threads(message.cpus)
    try:
        while True:
            if not inbox:
                client.flush()
                client.served.wait_for_work()
            client.served.look()
            if inbox:
                work = inbox.popleft()
                if client.may_start(work):
                    executor.run(work)
            elif client.exit_asked:
                break
    except EnvironmentAsked as asked:
        from hpcray.environments.entering import enter, failure  # most workers do without

        try:
            enter(client, asked.template)
        except Exception as error:
            client.send(m.SetupFailed(failure(error)))
    except RaySystemError:
        # The raylet is gone, and with it everybody who could be told.
        os._exit(1)
    gc.collect()
