"""Who may import whom: MPI in two modules, no I/O in the cores, imports that point down only, and a light `import hpcray`."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import hpcray

ROOT = Path(hpcray.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))

MAY_IMPORT_MPI = {
    "transport/mpi.py", "transport/frames.py", "transport/bulk.py", "launcher/bootstrap.py", "testing/plugin.py",
    "testing/ranks.py",
}  # fmt: skip
CORES = {
    "protocol/messages.py", "protocol/codec.py", "ids.py", "resources.py", "payload.py", "exceptions.py",
    "store/table.py", "store/entry.py", "store/references.py", "store/memory.py", "store/transfers.py", "store/pulls.py",
    "store/allocator.py", "store/first_touch.py", "store/spilling.py", "store/pressure.py",
    "raylet/core.py", "raylet/tasks.py", "raylet/calls.py", "raylet/pool.py", "raylet/actors.py", "raylet/ledger.py",
    "raylet/lanes.py", "raylet/groups.py", "raylet/clients.py", "raylet/surveys.py", "raylet/dependencies.py",
    "raylet/queues.py", "raylet/binding.py",
    "raylet/sharing.py", "raylet/explaining.py", "raylet/states.py", "observe/states.py",
    "observe/statistics.py", "observe/findings.py",
    "gcs/core.py", "gcs/actors.py", "gcs/scheduling.py", "gcs/views.py", "gcs/groups.py", "gcs/policies.py",
    "gcs/patience.py", "gcs/packing.py", "raylet/feasibility.py",
}  # fmt: skip
IMPURE = {
    "os", "socket", "time", "threading", "selectors", "select", "signal", "subprocess", "multiprocessing", "asyncio",
    "random", "mmap", "mpi4py", "pickle", "cloudpickle", "numpy", "pathlib", "tempfile",
}  # fmt: skip


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path, *, also_inside_functions: bool = True) -> set[str]:
    """Full names of the modules that a file imports, those for type checking aside."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                for other in child.orelse:
                    visit(other)
            elif also_inside_functions or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                visit(child)

    visit(ast.parse(path.read_text()))
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_transport_and_bootstrap_import_mpi(path):
    uses_mpi = any(module.split(".")[0] == "mpi4py" for module in imports(path))
    assert not uses_mpi or name_of(path) in MAY_IMPORT_MPI


@pytest.mark.parametrize("path", [path for path in MODULES if name_of(path) in CORES], ids=name_of)
def test_cores_do_no_io(path):
    impure = {module.split(".")[0] for module in imports(path)} & IMPURE
    if name_of(path) == "ids.py":
        impure -= {"os"}  # urandom, for the one nonce of a job
    assert not impure


def test_all_cores_exist():
    assert {name_of(path) for path in MODULES} >= CORES


LAYERS = {
    "values": {
        "ids",
        "resources",
        "payload",
        "exceptions",
        "config",
        "observe.statistics",
        "observe.findings",
        "observe.states",
    },
    "protocol": {"protocol"},
    "cores": {
        "gcs",
        *(core[:-3].replace("/", ".") for core in CORES if core.startswith(("raylet/", "store/"))),
    },
}
ORDER = ["values", "protocol", "cores"]


def layer_of(module: str) -> int:
    """0 to 2 for what lies at the bottom, 3 for all above it."""
    short = module.removeprefix("hpcray.")
    for level, layer in enumerate(ORDER):
        if any(short == name or short.startswith(f"{name}.") for name in LAYERS[layer]):
            return level
    return len(ORDER)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path):
    module = "hpcray." + name_of(path)[:-3].replace("/", ".")
    level = layer_of(module)
    for other in imports(path, also_inside_functions=False):
        if other.startswith("hpcray.") and (ROOT / (other[7:].replace(".", "/") + ".py")).exists():
            assert layer_of(other) <= level, f"{module} imports {other}, which lies above it"


def run_python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT.parent, capture_output=True, text=True, check=True, timeout=60).stdout


def test_import_hpcray_loads_nothing_heavy():
    loaded = set(json.loads(run_python("import hpcray, sys, json; print(json.dumps(list(sys.modules)))")))
    heavy = {"numpy", "mpi4py", "cloudpickle", "msgspec", "socket", "multiprocessing", "asyncio", "click", "psutil"}
    assert not loaded & heavy
    assert {name for name in loaded if name.startswith("hpcray")} == {"hpcray"}


def test_import_hpcray_takes_little_more_than_starting_python():
    code = (
        "import time, importlib\n"
        "start = time.perf_counter(); import json, json.decoder; middle = time.perf_counter(); import hpcray\n"
        "print(middle - start, time.perf_counter() - middle)"
    )
    # The better of several, as the machine may be busy with other things.
    ratios = []
    for _ in range(5):
        yardstick, ours = map(float, run_python(code).split())
        ratios.append(ours / yardstick)
    assert min(ratios) < 5, f"import hpcray took {min(ratios):.1f} times as long as import json"
