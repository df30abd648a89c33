"""A pytest plugin: the fixture `hpcray_job`, with which a test is the driver of a job, in one process or on all ranks.

    @pytest.mark.hpcray(num_cpus=2)
    def test_squares(hpcray_job):
        square = hpcray.remote(lambda x: x * x)
        assert hpcray.get([square.remote(i) for i in range(3)]) == [0, 1, 4]

Under plain `pytest` the job has one rank. Under ``mpirun -n 4 python -m pytest --with-mpi`` it has four: rank 0 runs the test,
the others run none of its code and none of its fixtures but serve its job, and report a pass when rank 0 is through with the
test. All ranks must be given the same tests; what failed is told by rank 0.

Loading the plugin costs nothing: MPI and hpcray are imported once a collected test uses the fixture.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hpcray.api import Context

FIXTURE = "hpcray_job"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"hpcray(**arguments): what {FIXTURE} passes to hpcray.init(), on every rank")


def pytest_collection_finish(session: pytest.Session) -> None:
    items = [item for item in session.items if uses_job(item)]
    if not items or session.config.option.collectonly:
        return
    from hpcray.launcher.roles import detect_launch

    launch = detect_launch(os.environ)
    if launch.is_mpi and launch.size != 1:
        from hpcray.testing.ranks import take_part

        take_part(launch, session.config, items)


def uses_job(item: pytest.Item) -> bool:
    """Whether this test is the driver of a job."""
    return FIXTURE in getattr(item, "fixturenames", ())


@pytest.fixture
def hpcray_job(request: pytest.FixtureRequest) -> Iterator[Context]:
    """A job of this test's own, whose driver is the test: `hpcray.init()` before it, `hpcray.shutdown()` after it.

    The value is what `init` returned. Its arguments come from ``@pytest.mark.hpcray(...)``. The functions of the test's module
    travel to the workers by value, so workers need not be able to import it. A test may call `shutdown` and `init` itself;
    each `init` is a new job on all ranks.
    """
    import cloudpickle

    import hpcray

    marker = request.node.get_closest_marker("hpcray")
    arguments: dict[str, Any] = dict(marker.kwargs) if marker else {}
    module = request.module
    is_ours = module.__name__ not in cloudpickle.list_registry_pickle_by_value()
    if is_ours:
        cloudpickle.register_pickle_by_value(module)
    try:
        with hpcray.init(**arguments) as context:
            yield context
    finally:
        if is_ours:
            cloudpickle.unregister_pickle_by_value(module)
