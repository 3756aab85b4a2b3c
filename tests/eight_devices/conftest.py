"""Tests that need eight devices: `make test-devices` runs them in one process.

XLA fixes the number of a CPU's virtual devices when jax starts. So these tests cannot run beside
the others, which see one device; a session of one device deselects them.
"""

import os
from pathlib import Path

import jax
import pytest
from jax.sharding import Mesh

from olmoe_jax.parallel.sharding import make_mesh

FLAG = "--xla_force_host_platform_device_count=8"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects these tests where there is one device; pytest exits with 5 when none is left."""
    if FLAG in os.environ.get("XLA_FLAGS", ""):
        return
    ours = [item for item in items if item.path.is_relative_to(Path(__file__).parent)]
    config.hook.pytest_deselected(items=ours)
    items[:] = [item for item in items if item not in ours]


@pytest.fixture(scope="session", autouse=True)
def _eight_devices() -> None:
    assert jax.device_count() == 8, "run these tests by `make test-devices`"


@pytest.fixture(scope="session")
def one_device() -> Mesh:
    """The mesh of the first device, on which all expected numbers are computed."""
    return make_mesh(devices=jax.devices()[:1])


@pytest.fixture
def with_optimizations():
    """Lets XLA optimise, which the other tests do not for the sake of compile time."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
