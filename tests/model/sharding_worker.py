"""Run by test_sharding.py on 8 virtual devices: prints the worst error of each mesh as JSON."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from helpers import random_weights, relative_error, tiny_config
from jax.sharding import NamedSharding

from olmoe_jax import sharding
from olmoe_jax.model.config import ModelSettings
from olmoe_jax.model.loading import graph_of, parameter_specs
from olmoe_jax.model.parameters import merge
from olmoe_jax.ops.cross_entropy import weighted_cross_entropy

TOKENS = np.random.default_rng(0).integers(2, 61, (8, 10)).astype(np.int32)
SEGMENTS = np.where(np.arange(10) < np.array([10, 9, 4, 10, 1, 7, 10, 3])[:, None], 1, 0)


def run(config, mesh):
    """Loss, gradients and router load, as numpy."""
    specs = parameter_specs(config)
    shardings = sharding.parameter_shardings(specs, mesh)
    batch_sharding = NamedSharding(mesh, sharding.BATCH)
    graph = graph_of(config, ModelSettings(router_method="densemixer", remat="full"))

    def loss(parameters, tokens, segments):
        model = merge(graph, parameters)
        hidden, statistics = model.hidden(tokens, segments)
        weights = jnp.asarray(segments > 0, jnp.float32)
        targets = jnp.roll(tokens, -1, axis=1)
        return weighted_cross_entropy(hidden, model.head(), targets, weights), statistics

    with jax.set_mesh(mesh):
        parameters = jax.device_put(random_weights(config), shardings)
        batch = jax.device_put((TOKENS, SEGMENTS.astype(np.int32)), batch_sharding)
        step = jax.jit(jax.value_and_grad(loss, has_aux=True), out_shardings=(None, shardings))
        (value, statistics), gradients = step(parameters, *batch)
    return jax.device_get({"loss": value, "load": statistics.load, **gradients})


def main():
    assert jax.device_count() == 8
    devices = jax.devices()
    eight, six = tiny_config(), tiny_config(num_experts=6)
    meshes = {
        "data=2,fsdp=4": (eight, sharding.make_mesh(2, 4)),
        "fsdp=8": (eight, sharding.make_mesh(1, 8)),
        "6 experts,fsdp=4": (six, sharding.make_mesh(1, 4, devices[:4])),
    }
    errors, alone = {}, {}
    for name, (config, mesh) in meshes.items():
        if config not in alone:
            alone[config] = run(config, sharding.make_mesh(devices=devices[:1]))
        sharded = run(config, mesh)
        errors[name] = {key: relative_error(sharded[key], alone[config][key]) for key in sharded}
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
