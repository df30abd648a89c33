"""Where environments lie: nobody else's directories, and no use of locks where there are none."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpcray.environments import places
from hpcray.environments.places import clean_up, job_directory, private_directory, root_directory, unpacked


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("HPCRAY_ENV_DIR", str(tmp_path / "root"))
    return tmp_path / "root"


def test_the_root_is_local_unless_the_user_says_otherwise():
    own = f"hpcray-{os.getuid()}"
    assert root_directory({"TMPDIR": "/t"}) == Path("/t") / own
    assert root_directory({"TMPDIR": "/t", "SLURM_TMPDIR": "/s"}) == Path("/s") / own
    assert root_directory({"TMPDIR": "/t", "HPCRAY_ENV_DIR": "/chosen"}) == Path("/chosen")


def test_directories_are_private_and_others_are_not_trusted(tmp_path):
    path = private_directory(tmp_path / "own")
    assert path.stat().st_mode & 0o777 == 0o700
    assert private_directory(path) == path
    path.chmod(0o770)
    with pytest.raises(PermissionError, match="HPCRAY_ENV_DIR"):
        private_directory(path)
    path.chmod(0o700)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(PermissionError):
        private_directory(tmp_path / "link")


def test_what_nobody_uses_is_removed_and_what_somebody_uses_stays(root):
    path, lock = job_directory()
    assert not path.stat().st_mode & 0o077
    host = os.uname().nodename
    left, used, far = (path.parent / name for name in (f"{host}.left", f"{host}.used", "elsewhere.left"))
    for each in (left, used, far):
        each.mkdir()
    in_use = os.open(used, os.O_RDONLY)
    fcntl.flock(in_use, fcntl.LOCK_SH)
    other_job = "from hpcray.environments.places import job_directory; print(job_directory()[0])"
    subprocess.run([sys.executable, "-c", other_job], check=True, capture_output=True)
    assert not left.exists()
    assert used.exists()
    assert far.exists()
    assert path.exists()
    os.close(in_use)
    os.close(lock)
    clean_up()
    assert not path.exists()


def test_a_package_is_unpacked_once(root, tmp_path):
    archive = tmp_path / "a.zip"
    (tmp_path / "a").write_text("1")
    subprocess.run([sys.executable, "-m", "zipfile", "-c", archive, tmp_path / "a"], check=True)
    first = unpacked(tmp_path, b"name", archive.read_bytes())
    (first / "written").touch()
    assert unpacked(tmp_path, b"name", b"not looked at") == first
    assert sorted(path.name for path in first.iterdir()) == ["a", "written"]


def test_a_file_system_without_locks_will_do(root, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(places.fcntl, "flock", refuse)
    path, lock = job_directory()
    assert path.exists()
    os.close(lock)
    clean_up()
