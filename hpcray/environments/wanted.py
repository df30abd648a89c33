"""What a process's tasks and actors run in: the environment of the process, with what they ask for laid over it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from hpcray.runtime_env import MAX_PACKAGES, merge, package_uri, packages_of, parse_package_uri
from hpcray.worker.functions import content_id

if TYPE_CHECKING:
    from hpcray.client import Client

_encode = msgspec.msgpack.Encoder(order="sorted").encode


@dataclass(frozen=True)
class Environment:
    """A runtime environment whose directories are packages of the job."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    id: bytes = b""
    """Of the definition that holds the fields; empty if there are none."""
    packages: tuple[bytes, ...] = ()
    """Ids of the definitions that hold the packages."""

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> tuple[Environment, bytes]:
        """The environment of these fields, and the blob of its definition. Pure."""
        if not fields:
            return cls(), b""
        blob = _encode(fields)
        packages = [parsed[0] for uri in packages_of(fields) if (parsed := parse_package_uri(uri))]
        return cls(fields, content_id(blob), tuple(dict.fromkeys(packages))), blob

    @classmethod
    def from_blob(cls, blob: bytes) -> Environment:
        """Inverse of `of`."""
        return cls.of(msgspec.msgpack.decode(blob))[0]


class Environments:
    """The environments that one process has asked for. `present` is the one that it runs in itself."""

    def __init__(self) -> None:
        self.present = Environment()
        self.paths: list[str] = []
        """In workers: what comes first in `sys.path`."""
        self.working_dir = ""
        """In workers: the current directory, where it is not the driver's."""
        self._packed: dict[tuple[str, tuple[str, ...], bool], tuple[str, int]] = {}
        """URIs and sizes of what was packed: a directory is looked at once per connection."""

    def enter(self, client: Client, wanted: Mapping[str, Any]) -> None:
        """Make this the environment of the process: in drivers, the job's; raises as `choose`."""
        self.present = self.choose(client, wanted)

    def become(self, environment: Environment, paths: list[str], working_dir: str) -> None:
        """In workers: this one has been set up."""
        self.present, self.paths, self.working_dir = environment, paths, working_dir

    def choose(self, client: Client, wanted: Mapping[str, Any] | None) -> Environment:
        """The environment of tasks that ask for this, made known to the raylet.

        Args:
            client: The connection of this process.
            wanted: As `runtime_env.parse` returns it.

        Raises:
            ValueError: Its packages are too large, or not known to this process.
            OSError: A file or directory cannot be read.
        """
        if not wanted:
            return self.present
        wanted = dict(wanted)
        excludes = tuple(wanted.pop("excludes", ()))
        if "working_dir" in wanted:
            wanted["working_dir"] = self._export(client, wanted["working_dir"], excludes, as_module=False)
        if "py_modules" in wanted:
            wanted["py_modules"] = [
                self._export(client, path, excludes, as_module=True) for path in wanted["py_modules"]
            ]
        environment, blob = Environment.of(merge(self.present.fields, wanted))
        sizes = {parsed[0]: size for uri, size in self._packed.values() if (parsed := parse_package_uri(uri))}
        if (total := sum(sizes.get(package, 0) for package in environment.packages)) > MAX_PACKAGES:
            raise ValueError(
                f"the working_dir and py_modules of this runtime_env have {total >> 20} MiB in all; {MAX_PACKAGES >> 20} is "
                "the limit: leave files out by 'excludes', or have tasks read them from a file system that all hosts share"
            )
        if environment.id:
            client.define(environment.id, blob)
        return environment

    def _export(self, client: Client, path: str, excludes: tuple[str, ...], *, as_module: bool) -> str:
        if (parsed := parse_package_uri(path)) is not None:
            if parsed[0] not in self.present.packages and path not in (uri for uri, _ in self._packed.values()):
                raise ValueError(
                    f"{path} is no package of this process: name the directory or file that it was made of"
                )
            return path
        key = (path, excludes, as_module)
        if key not in self._packed:
            from hpcray.environments.packages import pack  # most programs do without

            name, data = pack(Path(path), excludes, as_module=as_module)
            identifier = content_id(data)
            client.define(identifier, data)
            self._packed[key] = (package_uri(identifier, name), len(data))
        return self._packed[key][0]
