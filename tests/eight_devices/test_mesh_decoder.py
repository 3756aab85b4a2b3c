"""The whole model on a mesh: loss, router load and every gradient are those of one device."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error
from jax.sharding import Mesh, NamedSharding
from tiny import random_weights, tiny_config

from olmoe_jax.checkpoints.loading import graph_of, parameter_specs
from olmoe_jax.model.config import ModelConfig, ModelSettings
from olmoe_jax.model.parameters import merge
from olmoe_jax.ops.cross_entropy import weighted_cross_entropy
from olmoe_jax.parallel import sharding

TOKENS = np.random.default_rng(0).integers(0, 488, (8, 10)).astype(np.int32)
SEGMENTS = np.where(np.arange(10) < np.array([10, 9, 4, 10, 1, 7, 10, 3])[:, None], 1, 0)
# 488 = 8 * 61 is the size of nothing else; 61 divides by no mesh.
PLAIN = tiny_config(vocab_size=488, pad_token_id=int(TOKENS[0, 0]))
CASES = {
    "data=2,fsdp=4": (PLAIN, (2, 4)),
    "tied,fsdp=8": (dataclasses.replace(PLAIN, tie_word_embeddings=True), (1, 8)),
    "6 experts,fsdp=4": (tiny_config(num_experts=6), (1, 4)),
}


def run(config: ModelConfig, mesh: Mesh) -> tuple[dict[str, np.ndarray], int]:
    """Loss, gradients and router load, and how many arrays hold a whole vocabulary."""
    specs = parameter_specs(config)
    shardings = sharding.parameter_shardings(specs, mesh)
    batch_sharding = NamedSharding(mesh, sharding.BATCH)
    graph = graph_of(config, ModelSettings(dense_router_gradient=True, remat="full"))

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


@pytest.mark.parametrize("case", CASES)
def test_meshes_change_no_number(one_device, case):
    """A DenseMixer step with padding and remat."""
    config, (data, fsdp) = CASES[case]
    mesh = sharding.make_mesh(data, fsdp, devices=jax.devices()[: data * fsdp])
    expected, (actual, whole) = run(config, one_device)[0], run(config, mesh)
    assert set(actual) > {"loss", "load", "layers.moe.router", "layers.moe.experts.down"}
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    assert errors.pop("load") == 0
    # A vocabulary of 61 does not divide and is gathered; the others never are.
    assert (whole > 0) == (case == "6 experts,fsdp=4")
    worst = max(errors, key=errors.get)
    assert errors[worst] < 1e-5, f"{worst}: {errors[worst]:.3g}"
