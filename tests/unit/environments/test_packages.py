"""Directories as packages: the same bytes for the same contents, and back."""

import os
import zipfile

import pytest

from hpcray.environments import packages
from hpcray.environments.packages import pack, unpack


def tree(top, *names, **texts):
    for name, text in {**dict.fromkeys(names, ""), **texts}.items():
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return top


def names(data, tmp_path):
    file = tmp_path / "looked_at.zip"
    file.write_bytes(data)
    with zipfile.ZipFile(file) as archive:
        return archive.namelist()


def test_equal_contents_make_equal_packages_whatever_their_times(tmp_path):
    first = tree(tmp_path / "one" / "code", **{"a": "1", "b/c": "2"})
    second = tree(tmp_path / "two" / "code", **{"b/c": "2", "a": "1"})
    os.utime(second / "a", (1, 1))
    assert pack(first) == pack(second)
    (second / "a").write_text("3")
    assert pack(first) != pack(second)


def test_a_package_comes_out_as_it_went_in(tmp_path):
    code = tree(tmp_path / "code", **{"a.py": "1", "sub/b": "2"})
    (code / "run").write_text("#!/bin/sh")
    (code / "run").chmod(0o755)
    (code / "empty").mkdir()
    name, data = pack(code)
    assert name == "code.zip"
    target = tmp_path / "out"
    target.mkdir()
    unpack(data, target)
    assert (target / "a.py").read_text() == "1"
    assert (target / "sub" / "b").read_text() == "2"
    assert (target / "run").stat().st_mode & 0o777 == 0o755
    assert (target / "empty").is_dir()


def test_a_module_keeps_its_name(tmp_path):
    module = tree(tmp_path / "mymodule", "__init__.py")
    assert all(name.startswith("mymodule/") for name in names(pack(module, as_module=True)[1], tmp_path))
    single = tree(tmp_path, "one.py") / "one.py"
    assert pack(single, as_module=True)[0] == "one.zip"
    assert names(pack(single, as_module=True)[1], tmp_path) == ["one.py"]


def test_rubbish_and_what_is_ignored_stay_behind(tmp_path):
    rubbish = (".git/config", "venv/x", "__pycache__/a.pyc", "sub/__pycache__/a.pyc", "b.log", "sub/b.log")
    ignored = ("data/big", "data/small", "sub/only_here")
    code = tree(tmp_path / "code", "a", "data/keep", "only_here", *rubbish, *ignored)
    (code / ".gitignore").write_text("*.log\n")
    (code / "data" / ".rayignore").write_text("big\n")
    (code / "sub" / ".gitignore").write_text("only_here\n")
    found = names(pack(code, ["data/small"])[1], tmp_path)
    assert found == [".gitignore", "a", "data/.rayignore", "data/keep", "only_here", "sub/.gitignore"]


def test_links_are_followed_but_not_in_circles(tmp_path):
    code = tree(tmp_path / "code", "a", "sub/b")
    (code / "sub" / "up").symlink_to(code)
    (code / "link").symlink_to(code / "a")
    (code / "dangling").symlink_to(code / "nothing")
    assert names(pack(code)[1], tmp_path) == ["a", "link", "sub/b"]


def test_archives_travel_as_they_are(tmp_path):
    for name in ("x.zip", "y-1-py3-none-any.whl"):
        (tmp_path / name).write_bytes(b"whatever")
        assert pack(tmp_path / name) == (name, b"whatever")
    with pytest.raises(ValueError, match="not a zip archive"):
        unpack(b"whatever", tmp_path)


def test_too_much_is_refused_with_advice(tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "MAX_PACKAGES", 1000)
    code = tree(tmp_path / "code", a="x" * 2000)
    with pytest.raises(ValueError, match="excludes"):
        pack(code)
    pack(code, ["a"])
    (tmp_path / "x.zip").write_bytes(bytes(2000))
    with pytest.raises(ValueError, match="too large"):
        pack(tmp_path / "x.zip")


def test_nothing_is_written_outside(tmp_path):
    evil = tmp_path / "evil.zip"
    with zipfile.ZipFile(evil, "w") as archive:
        archive.writestr("../../outside", "x")
    target = tmp_path / "in"
    target.mkdir()
    unpack(evil.read_bytes(), target)
    assert not (tmp_path.parent / "outside").exists()
    assert (target / "outside").exists()
