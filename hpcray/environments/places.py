"""Where runtime environments lie on a host, and who removes what.

    <root>/venvs/…                        virtual environments; they outlive jobs (`venvs.py`)
    <root>/jobs/<host>.<token>/<package>  unpacked packages, one copy for all workers of a rank

`<root>` is $HPCRAY_ENV_DIR, or a directory of this user's in $SLURM_TMPDIR, $TMPDIR or /tmp: local to the node, since a virtual
environment is thousands of small files that each worker reads (a parallel file system has one server for the names of all),
since locks on files may mean nothing between hosts there, and since a home directory has a quota.

A job's directory is removed by the rank's fork server, which outlives all workers. Should that be killed too, the next job on
the host finds the directory unlocked: each worker that uses it holds a shared lock, which dies with it. What is of another
host is left alone, since its locks may not be seen here.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from hpcray import config

HOST = os.uname().nodename
_TOKEN = f"{HOST}.{os.urandom(8).hex()}"
"""Made where this module is first imported: in a rank's fork server, whose workers share it, as they are its forks."""


def root_directory(env: Mapping[str, str] = os.environ) -> Path:
    """The directory of this user's environments on this host, which may not exist yet."""
    if chosen := config.load(env).env_dir:
        return Path(chosen).resolve()
    parent = env.get("SLURM_TMPDIR") or env.get("TMPDIR") or tempfile.gettempdir()
    return Path(parent) / f"hpcray-{os.getuid()}"


def private_directory(path: Path) -> Path:
    """Make a directory that only this user can write to, or see that it is one.

    Raises:
        OSError: It cannot be made.
        PermissionError: It belongs to somebody else, or others may write to it.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(
            f"{path} is not a directory that only you can write to: workers would run what others put there. If it is yours, "
            "'chmod go-w' it; else name another by HPCRAY_ENV_DIR"
        )
    return path


def job_directory() -> tuple[Path, int]:
    """This rank's directory for packages, made at need, and a descriptor: while that is open, nobody takes it for left over.

    Raises:
        OSError: It cannot be made.
    """
    jobs = private_directory(private_directory(root_directory()) / "jobs")
    path = jobs / _TOKEN
    if not path.exists():
        _remove_unused(jobs)
    while True:
        path.mkdir(mode=0o700, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            lock_if_possible(lock, fcntl.LOCK_SH)
            # Whoever removes what is left over may have been faster.
            if path.exists() and path.stat().st_ino == os.fstat(lock).st_ino:
                return path, lock
            os.close(lock)


def _remove_unused(jobs: Path) -> None:
    for path in jobs.glob(f"{HOST}.*"):
        with contextlib.suppress(OSError), locked(path):
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Alone with a file or directory.

    Raises:
        OSError: Others use it, or there are no locks.
    """
    lock = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(lock)


def lock_if_possible(descriptor: int, operation: int) -> None:
    """As `fcntl.flock`; but on a file system that has no locks, what they guard goes without (nothing is removed then)."""
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise


def unfinished(cache: Path, key: str = "*") -> list[Path]:
    """Directories of virtual environments that builders of this host have begun, and that no link names (see `venvs.py`)."""
    linked = {path.readlink().name for path in cache.iterdir() if path.is_symlink()}
    return [path for path in cache.glob(f"{key}.{HOST}.*") if path.name not in linked]


def clean_up() -> None:
    """In the fork server, when all workers have ended: remove what they unpacked and did not finish building. Never raises."""
    with contextlib.suppress(OSError, ValueError):
        root = root_directory()
        shutil.rmtree(root / "jobs" / _TOKEN, ignore_errors=True)
        cache = root / "venvs"
        for path in unfinished(cache):
            with contextlib.suppress(OSError), locked(cache / f"{path.name.partition('.')[0]}.lock"), locked(path):
                shutil.rmtree(path, ignore_errors=True)


def unpacked(directory: Path, identifier: bytes, data: bytes) -> Path:
    """The directory that holds a package's files, written by whichever worker needs it first.

    Raises:
        ValueError: Not a zip archive.
        OSError: The files cannot be written.
    """
    from hpcray.environments.packages import unpack  # not in fork servers, which import this module

    target = directory / identifier.hex()
    if not target.exists():
        new = Path(tempfile.mkdtemp(dir=directory))
        try:
            unpack(data, new)
            publish(new, target)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    return target


def publish(new: Path, target: Path) -> None:
    """Give a finished directory its name, unless another worker has given it to an equal one.

    Raises:
        OSError: It cannot be renamed.
    """
    try:
        new.rename(target)
    except OSError:
        if not target.exists():
            raise
