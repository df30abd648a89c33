"""Directories and files of a runtime environment as packages: zip archives, equal for equal contents.

Of directories the usual rubbish is left out, what .gitignore and .rayignore files name, and what `excludes` does.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from stat import S_IMODE

from hpcray.environments.ignore import Patterns
from hpcray.runtime_env import MAX_PACKAGES

DEFAULT_EXCLUDES = (".git", ".venv", "venv", "__pycache__")
"""Ray's."""
_IGNORE_FILES = (".gitignore", ".rayignore")
_LONG_AGO = (1980, 1, 1, 0, 0, 0)
"""The first time that a zip archive can name: packages must not differ by their files' times."""


def pack(path: Path, excludes: Sequence[str] = (), *, as_module: bool = False) -> tuple[str, bytes]:
    """Name and bytes of the package of a directory or file.

    Args:
        path: A directory; a .py file; or a .zip or .whl, which is a package as it is.
        excludes: Patterns, as in a .gitignore at the top of the directory.
        as_module: The directory is a module: it is packed with its own name.

    Raises:
        ValueError: It is larger than `MAX_PACKAGES`.
        OSError: Something cannot be read.
    """
    if path.suffix in (".zip", ".whl") and not path.is_dir():
        if path.stat().st_size > MAX_PACKAGES:
            raise _too_large(path)
        return path.name, path.read_bytes()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        if path.is_dir():
            prefix = f"{path.resolve().name}/" if as_module else ""
            files = _files(path, Patterns([*DEFAULT_EXCLUDES, *excludes]))
        else:
            prefix, files = "", iter([(path.name, path)])
        for name, file in files:
            info = zipfile.ZipInfo(prefix + name, _LONG_AGO)
            info.external_attr = S_IMODE(file.stat().st_mode) << 16
            if name.endswith("/"):
                archive.writestr(info, b"")
                continue
            if buffer.tell() + file.stat().st_size > MAX_PACKAGES:
                raise _too_large(path)
            archive.writestr(info, file.read_bytes())
    return f"{path.resolve().name.removesuffix('.py') or 'root'}.zip", buffer.getvalue()


def unpack(data: bytes, target: Path) -> None:
    """Write a package's files into an existing directory.

    Raises:
        ValueError: Not a zip archive.
        OSError: Something cannot be written.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for info in archive.infolist():
                path = archive.extract(info, target)
                if mode := (info.external_attr >> 16) & 0o777:
                    Path(path).chmod(mode | 0o700 if info.is_dir() else mode | 0o400)
    except zipfile.BadZipFile as error:
        raise ValueError(f"not a zip archive: {error}") from None


def _files(top: Path, excludes: Patterns) -> Iterator[tuple[str, Path]]:
    """Names below `top` and their files, in order; of directories only the empty ones, with a slash at the end."""

    def walk(directory: Path, known: list[tuple[str, Patterns]], above: frozenset[str]) -> Iterator[tuple[str, Path]]:
        here = "" if directory == top else f"{directory.relative_to(top).as_posix()}/"
        for ignore_file in _IGNORE_FILES:
            if (file := directory / ignore_file).is_file():
                known = [*known, (here, Patterns(file.read_text().splitlines()))]
        entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
        if not entries and here:
            yield here, directory
        for entry in entries:
            name, is_dir = here + entry.name, entry.is_dir()
            if any(patterns.match(name.removeprefix(base), is_dir=is_dir) for base, patterns in known):
                continue
            path = Path(entry.path)
            if is_dir:
                # A link may lead back to where it lies.
                if (real := os.path.realpath(path)) not in above:
                    yield from walk(path, known, above | {real})
            elif entry.is_file():
                yield name, path

    yield from walk(top, [("", excludes)], frozenset({os.path.realpath(top)}))


def _too_large(path: Path) -> ValueError:
    return ValueError(
        f"{path} is too large for a runtime_env: packages travel to all hosts in messages, and may have "
        f"{MAX_PACKAGES >> 20} MiB. Leave large files out by 'excludes' or a .gitignore in it, or have tasks read them "
        "from a file system that all hosts share"
    )
