"""Runtime environments: what a job, task or actor may ask its workers to be set up with. Names and rules are Ray's.

    env_vars     environment variables; `${NAME}` is replaced on the worker's host
    working_dir  a directory or .zip whose copy is the worker's current directory
    py_modules   packages, modules and wheels that the worker can import
    pip, uv      packages that are installed into a virtual environment, made once per host and user
    excludes     patterns, as in .gitignore, of what is left out of directories
    config       {"setup_timeout_seconds": …}: how long an installation may take

What a task or actor asks for is laid over the environment of whoever calls it: `env_vars` variable by variable, other
fields whole.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

MAX_PACKAGES = 256 << 20
"""Bytes that the directories and files of one environment may have: they travel in messages."""
SETUP_TIMEOUT = 600
"""Seconds. Ray's default."""

_PACKAGE = re.compile(r"hpcray://(?P<id>[0-9a-f]{32})/(?P<name>[^/]+)")
_OF_RAY_ONLY = frozenset(
    {"conda", "container", "image_uri", "java_jars", "nsight", "_nsight", "py_executable", "rocprof_sys", "_rocprof_sys",
     "worker_process_setup_hook"}
)  # fmt: skip
_OF_PIP = frozenset({"packages", "pip_check", "pip_version", "pip_install_options"})
_OF_UV = frozenset({"packages", "uv_check", "uv_version", "uv_pip_install_options"})


class RuntimeEnv(dict[str, Any]):
    """A checked runtime environment; may be used wherever a plain dict may.

    Raises:
        ValueError: An unknown field, a path that does not exist, or `pip` together with `uv`.
        TypeError: A value of a wrong type.
    """

    def __init__(
        self,
        *,
        env_vars: Mapping[str, str] | None = None,
        working_dir: str | os.PathLike[str] | None = None,
        py_modules: list[str | os.PathLike[str] | ModuleType] | None = None,
        pip: str | list[str] | Mapping[str, Any] | None = None,
        uv: str | list[str] | Mapping[str, Any] | None = None,
        excludes: list[str] | None = None,
        config: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        fields = {
            "env_vars": env_vars, "working_dir": working_dir, "py_modules": py_modules, "pip": pip, "uv": uv,
            "excludes": excludes, "config": config, **others,
        }  # fmt: skip
        for name, value in fields.items():
            if value is not None:
                self[name] = value
        if "pip" in self and "uv" in self:
            raise ValueError(
                "the fields 'pip' and 'uv' of a runtime_env cannot be specified at the same time: name all packages "
                f"in one of them (pip: {self['pip']}, uv: {self['uv']})"
            )

    def __setitem__(self, name: str, value: Any) -> None:
        check = _CHECKS.get(name)
        if check is None:
            raise ValueError(_unknown(name))
        if (checked := check(value)) is None:
            self.pop(name, None)
        else:
            super().__setitem__(name, checked)

    def set(self, name: str, value: Any) -> None:
        """As `env[name] = value`."""
        self[name] = value

    def to_dict(self) -> dict[str, Any]:
        """A copy as a plain dict."""
        return deepcopy(dict(self))

    def serialize(self) -> str:
        """The environment as JSON."""
        return json.dumps(self, sort_keys=True)

    @classmethod
    def deserialize(cls, text: str) -> RuntimeEnv:
        """Inverse of `serialize`."""
        return cls.trusted(json.loads(text))

    @classmethod
    def trusted(cls, fields: Mapping[str, Any]) -> RuntimeEnv:
        """Fields that were checked before, perhaps on another host."""
        env = cls()
        env.update(deepcopy(dict(fields)))
        return env

    def __reduce__(self) -> Any:
        return RuntimeEnv.trusted, (dict(self),)


def parse(runtime_env: Any) -> dict[str, Any]:
    """A runtime environment as it may travel: checked, requirements read from their file, local paths absolute.

    Raises:
        ValueError: As `RuntimeEnv`.
        TypeError: Not a dict, or as `RuntimeEnv`.
    """
    if not isinstance(runtime_env, Mapping):
        raise TypeError(
            f"runtime_env must be a dict or a RuntimeEnv, not {type(runtime_env).__name__}: {runtime_env!r}"
        )
    fields = dict(RuntimeEnv(**runtime_env))
    if "working_dir" in fields:
        fields["working_dir"] = _absolute(fields["working_dir"])
    if "py_modules" in fields:
        fields["py_modules"] = [_absolute(path) for path in fields["py_modules"]]
    return fields


def merge(parent: Mapping[str, Any], child: Mapping[str, Any]) -> dict[str, Any]:
    """A child's environment: its own fields over its parent's, `env_vars` variable by variable. Pure.

    `pip` and `uv` replace each other: they name the contents of the same virtual environment.
    """
    merged = {**parent, **child}
    if "pip" in child:
        merged.pop("uv", None)
    elif "uv" in child:
        merged.pop("pip", None)
    if variables := {**parent.get("env_vars", {}), **child.get("env_vars", {})}:
        merged["env_vars"] = variables
    return merged


def package_uri(identifier: bytes, name: str) -> str:
    """How an environment names a directory or file that travels with the job."""
    return f"hpcray://{identifier.hex()}/{name}"


def parse_package_uri(text: str) -> tuple[bytes, str] | None:
    """Inverse of `package_uri`: id and name; None for a path."""
    match = _PACKAGE.fullmatch(text)
    return (bytes.fromhex(match["id"]), match["name"]) if match else None


def packages_of(fields: Mapping[str, Any]) -> list[str]:
    """The paths or URIs that an environment names, `working_dir` first."""
    return [*([fields["working_dir"]] if "working_dir" in fields else []), *fields.get("py_modules", [])]


def _absolute(path: str) -> str:
    return path if parse_package_uri(path) else str(Path(path).absolute())


def _unknown(name: str) -> str:
    if name in _OF_RAY_ONLY:
        return (
            f"hpcray has no runtime_env field {name!r}: use 'pip' or 'uv' for packages, and your site's modules or "
            "containers around the whole job for the rest"
        )
    near = difflib.get_close_matches(str(name), _CHECKS, 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{name!r} is not a field of a runtime_env.{hint} Valid are {sorted(_CHECKS)}."


# ----------------------------------------------------------------------------------------------------- checks of the fields
def _check_env_vars(value: Any) -> dict[str, str] | None:
    if not isinstance(value, Mapping):
        raise TypeError(f"runtime_env['env_vars'] must be of type Dict[str, str], not {type(value).__name__}")
    for name, text in value.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise TypeError(f"runtime_env['env_vars'] must be of type Dict[str, str], but has {name!r}: {text!r}")
        if not name or "=" in name or "\0" in name + text:
            raise ValueError(f"runtime_env['env_vars'] has {name!r}: {text!r}, which no process can be given")
    return dict(value) or None


def _check_working_dir(value: Any) -> str:
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"runtime_env['working_dir'] must be a string, not {type(value).__name__}")
    path = os.fspath(value)
    _check_path("working_dir", path)
    if not (parse_package_uri(path) or Path(path).is_dir() or Path(path).suffix == ".zip"):
        raise ValueError(f"runtime_env['working_dir'] must be a directory or a .zip file, not {path}")
    return path


def _check_py_modules(value: Any) -> list[str] | None:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"runtime_env['py_modules'] must be a list, not {type(value).__name__}")
    return [_module_path(entry) for entry in value] or None


def _module_path(entry: Any) -> str:
    if isinstance(entry, ModuleType):
        path = _path_of_module(entry)
    elif isinstance(entry, (str, os.PathLike)):
        path = os.fspath(entry)
    else:
        raise TypeError(f"runtime_env['py_modules'] must list paths or modules, not {type(entry).__name__}: {entry!r}")
    _check_path("py_modules", path)
    if not (parse_package_uri(path) or Path(path).is_dir() or Path(path).suffix in (".py", ".whl", ".zip")):
        raise ValueError(f"runtime_env['py_modules'] must list directories, .py, .whl or .zip files, not {path}")
    return path


def _path_of_module(module: ModuleType) -> str:
    paths = list(getattr(module, "__path__", None) or filter(None, [module.__file__]))
    if len(paths) != 1:
        raise ValueError(
            f"runtime_env['py_modules'] takes modules that lie in one place; {module.__name__} is in {paths or 'no file'}"
        )
    return str(paths[0])


def _check_path(field: str, path: str) -> None:
    if parse_package_uri(path):
        return
    if "://" in path:
        raise ValueError(
            f"runtime_env[{field!r}] takes local paths, which travel with the job; {path} would have to be downloaded: do that "
            "before the job, and name the path"
        )
    if not Path(path).exists():
        raise ValueError(
            f"runtime_env[{field!r}]: {path} is not a valid path: it does not exist on {os.uname().nodename}"
        )


def _check_excludes(value: Any) -> list[str] | None:
    return _strings("excludes", value) or None


def _check_pip(value: Any) -> dict[str, Any] | None:
    fields = _check_installer("pip", value, _OF_PIP)
    if fields is not None:
        fields.setdefault("pip_check", False)
    return fields


def _check_uv(value: Any) -> dict[str, Any] | None:
    fields = _check_installer("uv", value, _OF_UV)
    if fields is not None:
        fields.setdefault("uv_check", False)
    return fields


def _check_installer(field: str, value: Any, known: frozenset[str]) -> dict[str, Any] | None:
    if isinstance(value, (str, list)):
        value = {"packages": value}
    elif not isinstance(value, Mapping):
        raise TypeError(
            f"runtime_env[{field!r}] must be a list of packages, a path of a requirements file, or a dict, not "
            f"{type(value).__name__}"
        )
    fields = dict(value)
    if unknown := sorted(set(fields) - known):
        raise ValueError(f"runtime_env[{field!r}] can only have the fields {sorted(known)}, not {unknown}")
    if "packages" not in fields:
        raise ValueError(f"runtime_env[{field!r}] must have the field 'packages', but is {fields}")
    packages = fields["packages"]
    if isinstance(packages, str):
        packages = _read_requirements(field, packages)
    fields["packages"] = list(dict.fromkeys(_strings(f"{field}']['packages", packages)))
    for name, kind in ((f"{field}_check", bool), (f"{field}_version", str)):
        if name in fields and not isinstance(fields[name], kind):
            raise TypeError(
                f"runtime_env[{field!r}][{name!r}] must be of type {kind.__name__}, not {type(fields[name]).__name__}"
            )
    options = "pip_install_options" if field == "pip" else "uv_pip_install_options"
    if options in fields:
        _strings(f"{field}']['{options}", fields[options])
    return fields if fields["packages"] else None


def _read_requirements(field: str, path: str) -> list[str]:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as error:
        raise ValueError(
            f"runtime_env[{field!r}]: {path} is not a valid file of requirements: {error.strerror}"
        ) from None
    return [line for line in map(str.strip, lines) if line and not line.startswith("#")]


def _strings(field: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise TypeError(f"runtime_env['{field}'] must be of type List[str], not {value!r}")
    return list(value)


def _check_config(value: Any) -> dict[str, Any] | None:
    if not isinstance(value, Mapping):
        raise TypeError(f"runtime_env['config'] must be a dict, not {type(value).__name__}")
    seconds = value.get("setup_timeout_seconds", SETUP_TIMEOUT)
    if isinstance(seconds, bool) or not isinstance(seconds, int):
        raise TypeError(f"setup_timeout_seconds must be of type int, not {type(seconds).__name__}")
    if seconds <= 0 and seconds != -1:
        raise ValueError(f"setup_timeout_seconds must be greater than zero, or -1 for no limit, not {seconds}")
    # What else Ray knows (eager_install, log_files) has no meaning here, and harms nobody.
    return None if seconds == SETUP_TIMEOUT else {"setup_timeout_seconds": seconds}


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "env_vars": _check_env_vars,
    "working_dir": _check_working_dir,
    "py_modules": _check_py_modules,
    "pip": _check_pip,
    "uv": _check_uv,
    "excludes": _check_excludes,
    "config": _check_config,
}
