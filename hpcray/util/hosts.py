"""Small questions about this host and the job."""

from __future__ import annotations

import socket
from typing import Any

from hpcray.client import require_client


def get_node_ip_address(address: str = "8.8.8.8:53") -> str:
    """The address under which others see this host: that of the interface by which `address` would be reached.

    Nothing is sent. Where there is no way, what the host's name stands for; at last, 127.0.0.1.
    """
    host, _, port = address.rpartition(":")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, int(port)))
            found: str = probe.getsockname()[0]
            return found
    except OSError:
        pass
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"


def list_named_actors(all_namespaces: bool = False) -> list[Any]:
    """The names of living actors in this driver's namespace.

    Args:
        all_namespaces: Those of all namespaces, each as `{"name": …, "namespace": …}`.
    """
    client = require_client()
    names: list[tuple[str, str]] = client.query("named_actors", None)
    if all_namespaces:
        return [{"name": name, "namespace": namespace} for namespace, name in names]
    return [name for namespace, name in names if namespace == client.namespace]
