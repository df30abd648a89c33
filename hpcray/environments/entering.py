"""A worker enters a runtime environment: its first act, before anything of the user's is imported.

It unpacks and installs what is needed, then replaces itself by a fresh interpreter (of the virtual environment, if there is
one) with the environment's variables: so all of them take effect, and every package is the one that is wanted. To its raylet
it stays the same worker: same process, same socket; what it had read of that, and the descriptors that came with it, are
handed over.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from hpcray import payload
from hpcray.client import Client
from hpcray.environments import venvs
from hpcray.environments.places import HOST, job_directory, private_directory, publish, root_directory, unpacked
from hpcray.environments.wanted import Environment
from hpcray.exceptions import RuntimeEnvSetupError
from hpcray.protocol import messages as m
from hpcray.runtime_env import SETUP_TIMEOUT, parse_package_uri


class HandOver(msgspec.Struct, array_like=True):
    """What the new interpreter gets from the one that it replaces."""

    sock: int
    locks: list[int]
    """Descriptors to be kept open while the environment is used."""
    descriptors: list[int]
    frames: bytes
    """As if they had just come from the raylet, with the descriptors."""
    environment: bytes
    paths: list[str]
    """To come first in `sys.path`."""
    working_dir: str
    variables: dict[str, str]
    """To be set when the worker's own modules are imported."""


class Setup:
    """What a worker of an environment needs on its host, as far as it is there."""

    def __init__(self, fields: Mapping[str, Any], blobs: Mapping[bytes, bytes]) -> None:
        self._fields = fields
        self._blobs = blobs
        self.python = sys.executable
        self.locks: list[int] = []
        self.working_dir = ""
        self.modules: list[str] = []
        """Directories of modules that travelled with the job."""
        self.site_packages: list[str] = []
        self.env = with_variables(os.environ, fields.get("env_vars", {}))

    def prepare(self) -> None:
        """Unpack and install. Blocks, for minutes where packages are installed.

        Raises:
            Exception: Whatever went wrong.
        """
        fields = self._fields
        if "working_dir" in fields or "py_modules" in fields:
            directory, lock = job_directory()
            self.locks.append(lock)
            # Ray's order: modules, working directory, what PYTHONPATH says.
            self.modules += [self._unpack(directory, uri) for uri in fields.get("py_modules", [])]
            if "working_dir" in fields:
                self.working_dir = self._unpack(directory, fields["working_dir"])
                self.modules.append(self.working_dir)
        for installer in ("pip", "uv"):
            if installer in fields:
                self._install(installer)

    def _unpack(self, directory: Path, uri: str) -> str:
        parsed = parse_package_uri(uri)
        assert parsed is not None
        identifier, name = parsed
        if not name.endswith(".whl"):
            return str(unpacked(directory, identifier, self._blobs[identifier]))
        target = directory / identifier.hex()
        if not target.exists():
            new = Path(tempfile.mkdtemp(dir=directory))
            try:
                wheel = new / name
                wheel.write_bytes(self._blobs[identifier])
                installed = new / "packages"
                installed.mkdir()
                venvs.install_wheel(wheel, installed, self.env)
                publish(installed, target)
            finally:
                shutil.rmtree(new, ignore_errors=True)
        return str(target)

    def _install(self, installer: str) -> None:
        seconds = self._fields.get("config", {}).get("setup_timeout_seconds", SETUP_TIMEOUT)
        cache = private_directory(private_directory(root_directory()) / "venvs")
        request = venvs.Request(
            installer, self._fields[installer], self.env, self.working_dir or None, None if seconds == -1 else seconds
        )
        found = venvs.find_or_build(cache, request)
        self.locks.append(found.lock)
        self.python = found.python
        self.site_packages.append(found.site_packages)
        self.env["VIRTUAL_ENV"] = str(found.path)
        self.env["PATH"] = os.pathsep.join([str(found.path / "bin"), self.env.get("PATH", os.defpath)])

    @property
    def paths(self) -> list[str]:
        """What comes before all that the job itself imports from."""
        variable = self.env["PYTHONPATH"].split(os.pathsep) if "PYTHONPATH" in self._fields.get("env_vars", {}) else []
        return [*self.modules, *filter(None, variable), *self.site_packages]

    @property
    def later_variables(self) -> dict[str, str]:
        """What is set when the worker has started: for Python programs that tasks start."""
        if not self.modules:
            return {}
        return {"PYTHONPATH": os.pathsep.join([*self.modules, *filter(None, [self.env.get("PYTHONPATH")])])}


def with_variables(env: Mapping[str, str], variables: Mapping[str, str]) -> dict[str, str]:
    """The environment with variables set, in the order of their names; `${NAME}` is what is set by then. Pure."""
    result = dict(env)
    for name, value in sorted(variables.items()):

        def expanded(match: re.Match[str]) -> str:
            known = result.get(match[1] or match[2])
            if known is not None:
                return known
            return "" if re.fullmatch(r"\$\{[A-Z0-9_]+\}", match[0]) else match[0]  # Ray's rule

        result[name] = re.sub(r"\$(?:\{([^}]*)\}|(\w+))", expanded, value, flags=re.ASCII)
    return result


def enter(client: Client, template: m.Template) -> None:
    """Become a worker of the template's environment. Returns only if that fails.

    Raises:
        Exception: Whatever went wrong; the process is still the worker that it was.
    """
    blob = client.blobs[template.environment]
    setup = Setup(Environment.from_blob(blob).fields, client.blobs)
    setup.prepare()
    frames, descriptors, sock = client.hand_over(without={template.environment, *template.packages})
    state = HandOver(
        sock, setup.locks, descriptors, frames, blob, setup.paths, setup.working_dir, setup.later_variables
    )
    memory = os.memfd_create("hpcray-worker")
    with open(memory, "wb", closefd=False) as file:
        file.write(msgspec.msgpack.encode(state))
    for descriptor in (memory, sock, *setup.locks, *descriptors):
        os.set_inheritable(descriptor, True)
    start = f"{venvs.BOOT}; from hpcray.environments.entering import resume; resume({memory})"
    os.execve(setup.python, [setup.python, "-c", start], setup.env)


def failure(error: Exception) -> bytes:
    """The payload of what tasks and actors get whose environment could not be entered."""
    text = f"On {HOST}: {type(error).__name__}: {error}"
    if isinstance(error, RuntimeEnvSetupError) and error.error_message:
        text = error.error_message
    return payload.system_error("RuntimeEnvSetupError", text)


def resume(memory: int) -> NoReturn:
    """In the new interpreter: go on as the worker."""
    from hpcray.worker.main import serve
    from hpcray.worker.process import become_worker, exit_after

    with open(memory, "rb") as file:
        file.seek(0)
        state = msgspec.msgpack.decode(file.read(), type=HandOver)
    for descriptor in (state.sock, *state.locks, *state.descriptors):
        os.set_inheritable(descriptor, False)

    def work() -> None:
        become_worker()
        client = Client(socket.socket(fileno=state.sock), is_driver=False)
        client.environments.become(Environment.from_blob(state.environment), state.paths, state.working_dir)
        os.environ.update(state.variables)
        client.resume(state.frames, state.descriptors)
        serve(client)

    exit_after(work)
