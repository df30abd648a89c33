"""A job of three ranks on as many hosts, and its driver."""

from __future__ import annotations

from random import Random

import pytest

from hpcray.testing.cluster import Cluster
from hpcray.testing.process import Process


@pytest.fixture
def cluster() -> Cluster:
    return Cluster([1, 1, 1])


@pytest.fixture
def driver(cluster: Cluster) -> Process:
    driver = cluster.add_driver()
    cluster.run(Random(0).choice)
    return driver
