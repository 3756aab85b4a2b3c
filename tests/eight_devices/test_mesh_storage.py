"""Updates that round at random: no mesh changes a bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from olmoe_jax.parallel.sharding import make_mesh
from olmoe_jax.training.optimizer import adamw

SHAPES = {"a": (16, 8, 24), "b": (64, 3)}
SPECS = {"a": P(None, "fsdp"), "b": P("fsdp")}


def updates(place, moments: str) -> dict[str, bytes]:
    """The parameters' bytes after three updates with weights in bfloat16."""
    random = np.random.default_rng(0)

    def draw(dtype):
        return place({n: jnp.asarray(random.normal(size=s), dtype) for n, s in SHAPES.items()})

    optimizer = adamw(0.9, 0.999, 1e-8, 0.0, jnp.dtype(moments), jnp.bfloat16)
    parameters = draw(jnp.bfloat16)
    state, update = optimizer.init(parameters), jax.jit(optimizer.update)
    for step in range(3):
        key = jax.random.key(step)
        parameters, state = update(draw(jnp.float32), state, parameters, 1e-3, key)
    return {name: np.asarray(value).tobytes() for name, value in parameters.items()}


@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
def test_the_mesh_changes_no_bit(moments):
    mesh = make_mesh(2, 4)
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    with jax.set_mesh(mesh):
        sharded = updates(lambda tree: jax.device_put(tree, shardings), moments)
    assert sharded == updates(lambda tree: tree, moments)
