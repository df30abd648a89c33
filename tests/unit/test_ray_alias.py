"""What `import ray` finds once hpcray stands in for it."""

import importlib
import importlib.metadata
import importlib.util
import pickle
import subprocess
import sys
import types

import cloudpickle
import pytest

import hpcray
from hpcray import ray_alias


@pytest.fixture
def alias():
    """An installed finder; afterwards nothing of it is left."""
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name == "ray" or name.startswith("ray.")}
    finders = list(sys.meta_path)
    ray_alias.install()
    yield
    sys.meta_path[:] = finders
    for name in [name for name in sys.modules if name == "ray" or name.startswith("ray.")]:
        del sys.modules[name]
    sys.modules.update(hidden)


pytestmark = pytest.mark.usefixtures("alias")


def test_public_names_are_those_of_hpcray():
    import ray
    import ray.exceptions
    from ray.actor import ActorHandle
    from ray.exceptions import RayTaskError
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    assert ray.get is hpcray.get
    assert ray.exceptions.RayError is hpcray.exceptions.RayError
    assert RayTaskError is hpcray.exceptions.RayTaskError
    assert placement_group is hpcray.util.placement_group
    assert ray.util.placement_group is placement_group, "the function, as in Ray, not the module of the same name"
    assert NodeAffinitySchedulingStrategy is hpcray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    assert ActorHandle is hpcray.actor.ActorHandle
    assert ray.runtime_context.get_runtime_context is ray.get_runtime_context
    assert {"get", "remote", "util"} <= set(dir(ray))


def test_submodules_can_be_imported_in_all_ways():
    import ray.util as as_name
    from ray import cloudpickle as bundled
    from ray import exceptions, util

    assert as_name is util
    assert exceptions.GetTimeoutError is hpcray.exceptions.GetTimeoutError
    assert bundled.dumps is cloudpickle.dumps


def test_the_version_is_one_of_rays():
    import ray

    assert ray.__version__ == importlib.metadata.version("ray") == ray_alias.RAY_VERSION
    assert int(ray.__version__.split(".")[0]) >= 2
    assert hpcray.__version__ != ray.__version__
    assert importlib.metadata.version("numpy")


@pytest.mark.parametrize("module", ["ray.tune", "ray.data", "ray.util.dask", "ray.rllib.algorithms", "ray.client"])
def test_an_import_of_what_hpcray_lacks_is_an_import_error_that_names_it(module):
    with pytest.raises(ImportError, match=rf"^{module.removesuffix('.algorithms')} is not part of hpcray") as caught:
        importlib.import_module(module)
    assert isinstance(caught.value, ModuleNotFoundError)


def test_from_ray_import_of_what_hpcray_lacks_names_it():
    with pytest.raises(ImportError, match=r"ray\.tune is not part of hpcray"):
        from ray import tune  # noqa: F401
    with pytest.raises(ImportError, match=r"ray\.java_function is not part of hpcray"):
        from ray import java_function  # noqa: F401
    with pytest.raises(ImportError, match=r"ray\.exceptions\.RayCgraphCapacityExceeded is not part of hpcray"):
        from ray.exceptions import RayCgraphCapacityExceeded  # noqa: F401


def test_an_attribute_that_hpcray_lacks_is_an_attribute_error_that_names_it():
    import ray

    with pytest.raises(AttributeError, match=r"ray\.tune is not part of hpcray"):
        _ = ray.tune
    assert not hasattr(ray, "data")
    assert getattr(ray, "serve", None) is None


def test_the_class_of_references_is_also_where_ray_has_it():
    import ray
    from ray._raylet import ObjectRef

    assert ObjectRef is ray._raylet.ObjectRef is hpcray.ObjectRef
    with pytest.raises(ImportError, match=r"ray\._raylet\.CoreWorker is private to Ray"):
        from ray._raylet import CoreWorker  # noqa: F401
    assert not hasattr(ray._raylet, "counted")


@pytest.mark.parametrize("name", ["_private", "_common"])
def test_what_is_private_to_ray_is_refused_as_such(name):
    import ray

    with pytest.raises(ImportError, match=f"ray.{name} is private to Ray"):
        importlib.import_module(f"ray.{name}")
    with pytest.raises(AttributeError, match=f"ray.{name} is private to Ray"):
        getattr(ray, name)


@pytest.mark.parametrize("name", ["client", "raylet", "api", "importlib", "launcher", "ids"])
def test_the_inside_of_hpcray_does_not_show(name):
    import ray

    import hpcray.client

    assert hpcray.client
    assert not hasattr(ray, name)


def test_modules_pickle_by_reference_and_names_by_that_of_hpcray():
    import ray
    import ray.util

    assert pickle.loads(cloudpickle.dumps(ray)) is ray
    assert pickle.loads(cloudpickle.dumps(lambda: ray.util))() is ray.util
    assert type(ray) is types.ModuleType
    assert pickle.loads(pickle.dumps(ray.exceptions.GetTimeoutError)) is hpcray.exceptions.GetTimeoutError


def test_looking_for_it_finds_it():
    assert importlib.util.find_spec("ray") is not None
    assert importlib.util.find_spec("rayon_of_light") is None


def test_calling_it_again_is_harmless():
    before = list(sys.meta_path)
    hpcray.as_ray()
    assert sys.meta_path == before


def run_python(code, tmp_path):
    package = tmp_path / "ray"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = 'the real one'\n")
    (package / "tune.py").write_text("")
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_it_takes_the_place_of_an_installed_ray(tmp_path):
    code = (
        "import hpcray; hpcray.as_ray(); import ray; print(ray.__version__)\n"
        "try: import ray.tune\n"
        "except ImportError as error: print(error)"
    )
    finished = run_python(code, tmp_path)
    assert finished.stdout.splitlines()[0] == ray_alias.RAY_VERSION, finished.stderr
    assert "ray.tune is not part of hpcray" in finished.stdout


def test_after_an_import_of_ray_itself_it_is_refused(tmp_path):
    finished = run_python("import ray, hpcray; hpcray.as_ray()", tmp_path)
    assert "too late: ray has been imported already, from" in finished.stderr
    assert str(tmp_path) in finished.stderr
