"""Run by test_plan.py on 8 virtual devices: a loop's all-gathers, as plan counts them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from olmoe_jax.plan.collectives import communication


def gathered(layers: int) -> list[list]:
    def layer(total, weight):
        return jnp.tanh(total @ jax.lax.all_gather(weight, "x", tiled=True)), None

    sharded = jax.shard_map(
        lambda weights: jax.lax.scan(layer, jnp.eye(16), weights)[0],
        mesh=Mesh(np.array(jax.devices()), ("x",)),
        in_specs=P(None, "x"),
        out_specs=P(),
        check_vma=False,
    )
    shape = jax.ShapeDtypeStruct((layers, 16, 16), jnp.float32)
    found = communication(jax.jit(sharded).lower(shape).compile().as_text())
    assert found.exact
    return [[c.kind, c.dtype, c.count, c.bytes] for c in found.collectives]


print(json.dumps({layers: gathered(layers) for layers in (3, 7)}))
