"""Virtual environments with the packages that `pip` or `uv` install, one per content, host and user.

    <key>                    a link to the directory that is finished; put there by one system call
    <key>.<host>.<random>/   the directory. It is built where it stays: the scripts in it name it. Locked by all who use it
    <key>.lock               locked by whoever builds, or looks whether it is built
    <key>.failed             why the last attempt failed; believed for `FAILURE_SECONDS`

What a kill -9 leaves is a directory without a link and without a lock: the job's fork server removes it, or whoever builds
next. Where locks do not reach other hosts (some shared file systems), two hosts may build at a time: the first link stays,
both directories are whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

import hpcray
from hpcray.environments.places import HOST, lock_if_possible, locked, unfinished
from hpcray.exceptions import RuntimeEnvSetupError
from hpcray.raylet.descendants import die_with

FAILURE_SECONDS = 10.0
"""So long a failed installation is not tried again: a thousand tasks must not wait for a thousand failures. (Ray's.)"""
UNUSED_SECONDS = 30 * 86400.0
"""After so long without a new worker in it, an environment is removed by whoever builds another."""
TOUCH_SECONDS = 86400.0
"""How exactly it is noted when one was used."""
LINES_SHOWN = 30
"""Last lines of an installer that an error shows."""
WORKING_DIR_VARIABLES = ("HPCRAY_RUNTIME_ENV_CREATE_WORKING_DIR", "RAY_RUNTIME_ENV_CREATE_WORKING_DIR")
"""Where installers find the unpacked working_dir: `-r ${…}/requirements.txt` in a list of packages."""
BOOT = f"import sys; sys.path[:1] = []; sys.path.append({str(Path(hpcray.__file__).parent.parent)!r})"
"""How a new interpreter finds hpcray. The current directory must not stand in for its modules, nor what lies beside hpcray
for the environment's packages."""

_PARENT_SITES = "_hpcray_parent.pth"
_encode = msgspec.msgpack.Encoder(order="sorted").encode


@dataclass(frozen=True)
class Request:
    """What is to be installed, and how.

    Args:
        installer: "pip" or "uv".
        spec: That field of the runtime environment.
        env: The environment variables of the installer.
        working_dir: Where the working_dir is unpacked, if there is one.
        timeout: Seconds for all of it; None: no limit.
    """

    installer: str
    spec: Mapping[str, Any]
    env: Mapping[str, str]
    working_dir: str | None
    timeout: float | None

    @property
    def key(self) -> str:
        """The name of the environment: of what is to be in it and of the Python that it extends."""
        refers = any(name in package for package in self.spec["packages"] for name in WORKING_DIR_VARIABLES)
        # The working_dir's own name is that of its contents.
        contents = Path(self.working_dir).name if refers and self.working_dir else ""
        python = [sys.version, sys.prefix, sys.base_prefix, *_parent_sites()]
        return hashlib.blake2b(_encode([self.installer, self.spec, contents, python]), digest_size=16).hexdigest()


class VirtualEnvironment:
    """One that is finished. While `lock` is open, nobody removes it."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self.lock = lock

    @property
    def python(self) -> str:
        """Its interpreter."""
        return str(self.path / "bin" / "python")

    @property
    def site_packages(self) -> str:
        """Where its packages lie."""
        return _site_packages(self.path)


def find_or_build(cache: Path, request: Request) -> VirtualEnvironment:
    """The virtual environment for a request. Blocks while it, or somebody else, builds it.

    Raises:
        RuntimeEnvSetupError: The installation failed, here or in another process a moment ago.
        OSError: The cache cannot be used.
    """
    key = request.key
    lock = os.open(cache / f"{key}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        lock_if_possible(lock, fcntl.LOCK_EX)
        path = _finished(cache, key) or _build_or_fail(cache, key, request)
        in_use = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        lock_if_possible(in_use, fcntl.LOCK_SH)
        return VirtualEnvironment(path, in_use)
    finally:
        os.close(lock)


def _finished(cache: Path, key: str) -> Path | None:
    link = cache / key
    if not (link / "bin" / "python").exists():
        return None
    path = link.resolve()
    if time.time() - path.stat().st_mtime > TOUCH_SECONDS:
        os.utime(path)
    return path


def _build_or_fail(cache: Path, key: str, request: Request) -> Path:
    failure = cache / f"{key}.failed"
    with contextlib.suppress(FileNotFoundError):
        if time.time() - failure.stat().st_mtime < FAILURE_SECONDS:
            raise RuntimeEnvSetupError(failure.read_text())
    _remove_unfinished(cache, key)
    _remove_unused(cache)
    path = Path(tempfile.mkdtemp(prefix=f"{key}.{HOST}.", dir=cache))
    try:
        _build(path, request)
        failure.unlink(missing_ok=True)
        return _publish(cache, key, path)
    except RuntimeEnvSetupError as error:
        failure.write_text(error.error_message or "")
        raise
    finally:
        link = cache / key
        if not link.exists() or link.resolve() != path.resolve():
            shutil.rmtree(path, ignore_errors=True)


def _publish(cache: Path, key: str, path: Path) -> Path:
    link = cache / key
    if link.is_symlink() and not link.exists():
        link.unlink()  # to a directory that somebody has removed by hand
    try:
        link.symlink_to(path.name)
    except FileExistsError:
        pass  # another host's, without a lock in common
    return link.resolve()


def _remove_unfinished(cache: Path, key: str) -> None:
    """With the key's lock held: what was left by builders of this host that were killed."""
    for path in unfinished(cache, key):
        with contextlib.suppress(OSError), locked(path):
            shutil.rmtree(path, ignore_errors=True)


def _remove_unused(cache: Path) -> None:
    for lock in cache.glob("*.lock"):
        link = cache / lock.stem
        with contextlib.suppress(OSError), locked(lock):  # not the one that is being built
            if link.exists() and time.time() - link.stat().st_mtime > UNUSED_SECONDS:
                with locked(link):
                    link.unlink()
            _remove_unfinished(cache, lock.stem)


# ------------------------------------------------------------------------------------------------------------- installing
def _build(path: Path, request: Request) -> None:
    deadline = None if request.timeout is None else time.monotonic() + request.timeout
    env = dict(request.env)
    if request.working_dir:
        env.update(dict.fromkeys(WORKING_DIR_VARIABLES, request.working_dir))

    def run(*command: str) -> None:
        _run(command, path, env, deadline)

    run(sys.executable, "-m", "venv", "--system-site-packages", "--without-pip", str(path))
    if sys.prefix != sys.base_prefix:
        # What a virtual environment inherits is the base installation: the job's own one has to be named.
        lines = [f"import site; site.addsitedir({site!r})" for site in _parent_sites()]
        (Path(_site_packages(path)) / _PARENT_SITES).write_text("\n".join(lines) + "\n")
    requirements = path / "requirements.txt"
    requirements.write_text("\n".join(request.spec["packages"]) + "\n")
    install = _install_by_pip if request.installer == "pip" else _install_by_uv
    install(path, request.spec, str(requirements), run)
    trial = (
        f"sys.exit(hpcray.__version__ != {hpcray.__version__!r} and 'Packages must not bring another hpcray along.')"
    )
    run(str(path / "bin" / "python"), "-c", f"{BOOT}; import hpcray.worker.main; {trial}")


def _install_by_pip(path: Path, spec: Mapping[str, Any], requirements: str, run: Any) -> None:
    python = str(path / "bin" / "python")
    if importlib.util.find_spec("pip") is None:
        run(python, "-m", "ensurepip")
    pip = (python, "-m", "pip")
    if version := spec.get("pip_version"):
        run(*pip, "install", "--disable-pip-version-check", f"pip{version}")
    options = spec.get("pip_install_options", ["--disable-pip-version-check", "--no-cache-dir"])
    run(*pip, "install", "--no-input", "-r", requirements, *options)
    if spec["pip_check"]:
        run(*pip, "check", "--disable-pip-version-check")


def _install_by_uv(path: Path, spec: Mapping[str, Any], requirements: str, run: Any) -> None:
    python = str(path / "bin" / "python")
    if version := spec.get("uv_version"):
        run(python, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", f"uv{version}")
        uv: str | None = str(path / "bin" / "uv")
    else:
        uv = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if uv is None:
        raise RuntimeEnvSetupError(
            f"the program uv was not found on {HOST}: install it on all hosts (pip install uv, in the job's environment), "
            "or use 'pip' instead of 'uv' in the runtime_env"
        )
    options = spec.get("uv_pip_install_options", ["--no-cache"])
    run(uv, "pip", "install", "--python", python, "-r", requirements, *options)
    if spec["uv_check"]:
        run(uv, "pip", "check", "--python", python)


def install_wheel(wheel: Path, target: Path, env: Mapping[str, str]) -> None:
    """Install a wheel of `py_modules`, and what it needs, into a directory.

    Raises:
        RuntimeEnvSetupError: pip failed.
    """
    options = ("--disable-pip-version-check", "--no-cache-dir", "--no-input", "--target", str(target))
    _run((sys.executable, "-m", "pip", "install", *options, str(wheel)), target, env, None)


def _run(command: Sequence[str], cwd: Path, env: Mapping[str, str], deadline: float | None) -> None:
    parent = os.getpid()
    timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
    try:
        finished = subprocess.run(
            command,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
            preexec_fn=lambda: die_with(parent),
        )
    except subprocess.TimeoutExpired as expired:
        output = expired.output.decode(errors="replace") if isinstance(expired.output, bytes) else expired.output or ""
        what = "did not end in time (config: setup_timeout_seconds)"
    else:
        if finished.returncode == 0:
            return
        output, what = finished.stdout, f"failed with exit code {finished.returncode}"
    lines = "\n".join(f"    {line}" for line in output.strip().splitlines()[-LINES_SHOWN:])
    raise RuntimeEnvSetupError(f"On {HOST}, '{' '.join(command)}' {what}. The last lines of its output:\n{lines}")


def _site_packages(path: Path) -> str:
    return str(path / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages")


def _parent_sites() -> list[str]:
    """Where the packages of the job's own Python lie."""
    return [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
