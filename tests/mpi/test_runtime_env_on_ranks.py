"""Runtime environments where tasks run on other ranks: what they need travels, is set up there, and goes with the job."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import hpcray
from hpcray.exceptions import RuntimeEnvSetupError
from tests.process.wheels import make_wheel

# Set where all ranks import it, before they start anything: what is installed here must not stay in this user's own cache.
ROOT = Path(tempfile.gettempdir()) / f"hpcray-tests-of-{os.getuid()}"
os.environ["HPCRAY_ENV_DIR"] = str(ROOT)

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.hpcray(num_cpus=1, object_store_memory=128 << 20, runtime_env={"env_vars": {"FROM_JOB": "job"}}),
    pytest.mark.usefixtures("nothing_left_behind", "nothing_left_on_disk", "hpcray_job"),
]


@pytest.fixture
def nothing_left_on_disk() -> Iterator[None]:
    """After the job: no unpacked directory is left."""
    yield
    deadline = time.monotonic() + 10
    while any((ROOT / "jobs").glob("*")):
        assert time.monotonic() < deadline, list((ROOT / "jobs").glob("*"))
        time.sleep(0.05)
    shutil.rmtree(ROOT, ignore_errors=True)


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A directory with a module and some data, large enough to be no ordinary frame."""
    code = tmp_path / "code"
    code.mkdir()
    (code / "hpcray_test_module.py").write_text("answer = 42")
    (code / "data").write_bytes(bytes(3 << 20))
    return code


def cpus() -> int:
    return int(hpcray.cluster_resources()["CPU"])


def test_tasks_on_all_ranks_find_their_working_dir(code):
    @hpcray.remote(runtime_env={"working_dir": str(code), "env_vars": {"OWN": "task"}}, scheduling_strategy="SPREAD")
    def look(seconds):
        import hpcray_test_module

        time.sleep(seconds)
        size = (Path.cwd() / "data").stat().st_size
        return (
            hpcray.get_runtime_context().get_node_id(),
            hpcray_test_module.answer,
            size,
            os.environ["FROM_JOB"] + os.environ["OWN"],
        )

    found = hpcray.get([look.remote(0.3) for _ in range(2 * cpus())])
    assert {tuple(rest) for _, *rest in found} == {(42, 3 << 20, "jobtask")}
    assert len({node for node, *_ in found}) == cpus()


def test_calls_one_at_a_time(code):
    @hpcray.remote(runtime_env={"working_dir": str(code)})
    def look(number):
        import hpcray_test_module

        return hpcray_test_module.answer + number

    for number in range(50):
        assert hpcray.get(look.remote(number)) == 42 + number


def test_children_on_other_ranks_inherit(code):
    @hpcray.remote
    def child():
        import hpcray_test_module

        return hpcray_test_module.answer, os.environ["FROM_JOB"], os.environ.get("OWN")

    @hpcray.remote(runtime_env={"working_dir": str(code), "env_vars": {"OWN": "parent"}})
    def parent():
        spread = child.options(scheduling_strategy="SPREAD")
        other = child.options(scheduling_strategy="SPREAD", runtime_env={"env_vars": {"OWN": "child"}})
        return hpcray.get([spread.remote() for _ in range(4)]), hpcray.get([other.remote() for _ in range(4)])

    inherited, own = hpcray.get(parent.remote())
    assert set(inherited) == {(42, "job", "parent")}
    assert set(own) == {(42, "job", "child")}


def test_actors_have_theirs_on_every_rank(code):
    @hpcray.remote(num_cpus=1, runtime_env={"py_modules": [str(code / "hpcray_test_module.py")]})
    class Actor:
        def look(self):
            import hpcray_test_module

            return hpcray_test_module.answer, hpcray.get_runtime_context().get_node_id()

    actors = [Actor.remote() for _ in range(cpus())]
    found = [hpcray.get(actor.look.remote()) for actor in actors]
    assert {answer for answer, _ in found} == {42}
    assert len({node for _, node in found}) == cpus()


def test_ranks_of_a_host_share_what_is_installed(tmp_path):
    wheel = make_wheel(tmp_path, "hpcray_test_wheel")

    @hpcray.remote(runtime_env={"pip": [str(wheel)]}, scheduling_strategy="SPREAD")
    def look():
        import hpcray_test_wheel

        time.sleep(0.3)
        return hpcray.get_runtime_context().get_node_id(), hpcray_test_wheel.version, sys.prefix

    found = hpcray.get([look.remote() for _ in range(2 * cpus())])
    assert len({node for node, *_ in found}) == cpus()
    assert {version for _, version, _ in found} == {"1.0"}
    assert len({prefix for *_, prefix in found}) == 1


def test_a_failed_installation_on_any_rank_is_the_tasks_error(tmp_path):
    @hpcray.remote(
        runtime_env={"pip": [str(tmp_path / "hpcray_nowhere-1.0-py3-none-any.whl")]}, scheduling_strategy="SPREAD"
    )
    def look():
        pass

    refs = [look.remote() for _ in range(2 * cpus())]
    for ref in refs:
        with pytest.raises(RuntimeEnvSetupError, match="hpcray_nowhere"):
            hpcray.get(ref)
