"""Run by test_sharding.py on 8 virtual devices: prints the worst error of each mesh as JSON."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
from helpers import random_weights, relative_error, tiny_config
from jax.sharding import NamedSharding

from olmoe_jax.checkpoints.loading import graph_of, parameter_specs
from olmoe_jax.model.config import ModelSettings
from olmoe_jax.model.parameters import merge
from olmoe_jax.ops.cross_entropy import weighted_cross_entropy
from olmoe_jax.parallel import sharding

TOKENS = np.random.default_rng(0).integers(0, 488, (8, 10)).astype(np.int32)
SEGMENTS = np.where(np.arange(10) < np.array([10, 9, 4, 10, 1, 7, 10, 3])[:, None], 1, 0)


def run(config, mesh):
    """Loss, gradients and router load, as numpy; the program's arrays with a whole vocabulary."""
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
        batch = jax.device_put(
            (TOKENS % config.vocab_size, SEGMENTS.astype(np.int32)), batch_sharding
        )
        step = jax.jit(jax.value_and_grad(loss, has_aux=True), out_shardings=(None, shardings))
        step = step.lower(parameters, *batch).compile()
        (value, statistics), gradients = step(parameters, *batch)
    whole = re.findall(rf"\[(?:\d+,)*{config.vocab_size}[,\]]", step.as_text())
    return jax.device_get({"loss": value, "load": statistics.load, **gradients}), len(whole)


def main():
    assert jax.device_count() == 8
    devices = jax.devices()
    # 488 = 8 * 61 is the size of nothing else; 61 divides by no mesh.
    eight = tiny_config(vocab_size=488, pad_token_id=int(TOKENS[0, 0]))
    tied = dataclasses.replace(eight, tie_word_embeddings=True)
    six = tiny_config(num_experts=6)
    meshes = {
        "data=2,fsdp=4": (eight, sharding.make_mesh(2, 4)),
        "tied,fsdp=8": (tied, sharding.make_mesh(1, 8)),
        "6 experts,fsdp=4": (six, sharding.make_mesh(1, 4, devices=devices[:4])),
    }
    errors, alone = {}, {}
    for name, (config, mesh) in meshes.items():
        if config not in alone:
            alone[config] = run(config, sharding.make_mesh(devices=devices[:1]))[0]
        sharded, whole = run(config, mesh)
        errors[name] = {key: relative_error(sharded[key], alone[config][key]) for key in sharded}
        errors[name]["whole"] = whole
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
