"""What a runtime environment may say, and how one is laid over another."""

import pickle
import types

import pytest

import hpcray
from hpcray.runtime_env import RuntimeEnv, merge, package_uri, parse, parse_package_uri

A_PACKAGE = package_uri(bytes(16), "code.zip")


@pytest.mark.parametrize("field", ["env_vars", "working_dir", "py_modules", "pip", "uv", "excludes", "config"])
def test_every_field_refuses_a_value_of_a_wrong_type(field):
    with pytest.raises(TypeError):
        RuntimeEnv(**{field: 3})


@pytest.mark.parametrize(
    "env",
    [
        {"env_vars": {"A": 1}}, {"env_vars": {1: "A"}}, {"py_modules": [3]}, {"pip": [3]}, {"pip": {"packages": [3]}},
        {"pip": {"packages": ["a"], "pip_check": "yes"}}, {"pip": {"packages": ["a"], "pip_version": 3}},
        {"pip": {"packages": ["a"], "pip_install_options": "-U"}}, {"uv": {"packages": ["a"], "uv_check": 1}},
        {"excludes": "x"}, {"config": {"setup_timeout_seconds": "3"}}, [], "pip", 3,
    ],
    ids=repr,
)  # fmt: skip
def test_wrong_types_inside(env):
    with pytest.raises(TypeError):
        parse(env)


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"env_var": {}}, "Did you mean 'env_vars'"), ({"conda": "x"}, "no runtime_env field 'conda'"),
        ({"working_dir": "/not/there"}, "not a valid path"), ({"working_dir": "s3://bucket/x.zip"}, "local paths"),
        ({"working_dir": "/etc/passwd"}, "directory or a .zip"), ({"py_modules": ["/etc/passwd"]}, r"\.whl"),
        ({"py_modules": ["/not/there.whl"]}, "not a valid path"), ({"pip": "/not/there.txt"}, "not a valid file"),
        ({"pip": {"pip_check": True}}, "'packages'"), ({"pip": {"packages": [], "check": True}}, "can only have"),
        ({"pip": ["a"], "uv": ["b"]}, "at the same time"), ({"env_vars": {"A=B": "C"}}, "no process"),
        ({"config": {"setup_timeout_seconds": 0}}, "greater than zero"),
    ],
    ids=repr,
)  # fmt: skip
def test_impossible_values(env, words):
    with pytest.raises(ValueError, match=words):
        parse(env)


def test_what_is_empty_is_as_if_it_were_not_there():
    assert parse({"env_vars": {}, "pip": [], "uv": None, "py_modules": [], "excludes": [], "config": {}}) == {}


def test_packages_are_listed_once_and_defaults_filled_in():
    assert parse({"pip": ["b", "a", "b"]}) == {"pip": {"packages": ["b", "a"], "pip_check": False}}
    assert parse({"uv": {"packages": ["a"], "uv_check": True}}) == {"uv": {"packages": ["a"], "uv_check": True}}


def test_requirements_are_read_at_once(tmp_path):
    file = tmp_path / "requirements.txt"
    file.write_text("a==1\n# a remark\n\n  b  \n")
    assert parse({"pip": str(file)}) == parse({"pip": {"packages": str(file)}}) == parse({"pip": ["a==1", "b"]})


def test_paths_become_absolute_and_modules_their_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code").mkdir()
    (tmp_path / "one.py").touch()
    single = types.ModuleType("one")
    single.__file__ = str(tmp_path / "one.py")
    env = parse({"working_dir": "code", "py_modules": ["code", tmp_path / "one.py", single, hpcray, A_PACKAGE]})
    code, one = str(tmp_path / "code"), str(tmp_path / "one.py")
    assert env["working_dir"] == code
    assert env["py_modules"] == [code, one, one, hpcray.__path__[0], A_PACKAGE]


def test_a_module_in_several_places_is_refused():
    module = types.ModuleType("spread")
    module.__path__ = ["/a", "/b"]
    with pytest.raises(ValueError, match="one place"):
        parse({"py_modules": [module]})


def test_a_child_lays_its_fields_over_its_parents():
    parent = {"env_vars": {"A": "1", "B": "1"}, "working_dir": "/w", "pip": {"packages": ["a"]}}
    child = {"env_vars": {"B": "2", "C": "2"}, "pip": {"packages": ["b"]}}
    assert merge(parent, child) == {
        "env_vars": {"A": "1", "B": "2", "C": "2"},
        "working_dir": "/w",
        "pip": {"packages": ["b"]},
    }
    assert parent["env_vars"] == {"A": "1", "B": "1"}
    assert merge(parent, {}) == parent
    assert merge({}, child) == child


def test_pip_and_uv_replace_each_other():
    pip, uv = {"pip": {"packages": ["a"]}}, {"uv": {"packages": ["b"]}}
    assert merge(pip, uv) == uv
    assert merge(uv, pip) == pip


def test_a_runtime_env_is_a_dict_that_checks_what_is_put_in():
    env = RuntimeEnv(env_vars={"A": "1"})
    assert env == {"env_vars": {"A": "1"}}
    env["pip"] = ["a"]
    assert env["pip"]["packages"] == ["a"]
    env.set("pip", [])
    assert "pip" not in env
    with pytest.raises(TypeError):
        env["env_vars"] = 3
    assert pickle.loads(pickle.dumps(env)) == RuntimeEnv.deserialize(env.serialize()) == env
    assert type(pickle.loads(pickle.dumps(env))) is RuntimeEnv
    copy = env.to_dict()
    assert type(copy) is dict
    copy["env_vars"]["A"] = "2"
    assert env["env_vars"] == {"A": "1"}


def test_options_refuse_a_wrong_environment_at_once():
    @hpcray.remote
    def f(): ...

    @hpcray.remote
    class Actor: ...

    for make in (f.options, Actor.options, hpcray.remote):
        with pytest.raises(ValueError, match="is not a field"):
            make(runtime_env={"nonsense": 1})
        with pytest.raises(TypeError, match="must be a dict"):
            make(runtime_env="nonsense")


def test_package_uris():
    assert parse_package_uri(A_PACKAGE) == (bytes(16), "code.zip")
    for other in ("/a/path", "hpcray://00/x", "s3://bucket", f"hpcray://{bytes(16).hex()}/a/b"):
        assert parse_package_uri(other) is None
