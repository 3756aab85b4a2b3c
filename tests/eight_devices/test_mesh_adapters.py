"""Adapters, quantized bases, tuned experts and expert scores on a mesh: one device's numbers."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error
from jax.sharding import Mesh
from tiny import (
    ROWS,
    make_batch,
    make_examples,
    random_adapters,
    random_weights,
    tiny_config,
    write_base,
)

from olmoe_jax.checkpoints.huggingface import HFCheckpoint
from olmoe_jax.checkpoints.loading import load_parameters, quantized_like, stack_tuned
from olmoe_jax.methods.scoring import expert_scores
from olmoe_jax.model.config import ModelSettings
from olmoe_jax.model.decoder import graph_of, parameter_specs
from olmoe_jax.model.lora import LoraSettings, is_target
from olmoe_jax.model.tuned import HOLDERS, hold_tuned, places
from olmoe_jax.ops.quantization import quantize
from olmoe_jax.parallel import sharding
from olmoe_jax.parallel.batch import place_batch
from olmoe_jax.training.optimizer import adamw, schedule
from olmoe_jax.training.step import Trainer

EXPERTS = ((1, 4, 7), (0,))
LORA = LoraSettings(4, 8.0, dropout=0.3)
KINDS = {
    "lora": ModelSettings(dense_router_gradient=True, remat="full", lora=LORA),
    "nf4": ModelSettings(dense_router_gradient=True, remat="full", lora=LORA),
    "esft": ModelSettings(dense_router_gradient=True, tuned_experts=EXPERTS),
}
MESHES = {"data=2,fsdp=4": (2, 4), "fsdp=8": (1, 8)}


def run(kind: str, mesh: Mesh) -> dict[str, np.ndarray]:
    """Loss and gradients of the trained parameters."""
    config, settings = tiny_config(), KINDS[kind]
    weights = random_weights(config)
    weights |= stack_tuned(weights, EXPERTS) if kind == "esft" else random_adapters(config, LORA)
    trainer = Trainer(
        config, settings, adamw(0.9, 0.999, 1e-8, 0.0), schedule("constant", 1.0, 0, 1), 1.0
    )
    specs = parameter_specs(config, settings)
    shardings = sharding.parameter_shardings(specs, mesh)
    if kind == "nf4":
        for name in filter(is_target, weights):
            weights[name] = quantize(weights[name], kind)
            like = quantized_like(specs[name], kind, mesh)
            shardings[name] = jax.tree.map(lambda part: part.sharding, like)
    marks = (".lora.", "tuned.", "router", "lm_head")
    with jax.set_mesh(mesh):
        placed = jax.device_put(weights, {name: shardings[name] for name in weights})
        trained = {n: value for n, value in placed.items() if any(mark in n for mark in marks)}
        frozen = {name: value for name, value in placed.items() if name not in trained}
        position = np.array([3, 1], np.uint32)
        batch = place_batch(make_batch(), mesh)
        zero = trainer.zero_sums(trained)
        result = jax.jit(trainer.accumulate)(trained, frozen, zero, batch, position)
    return jax.device_get({"loss": result.loss, **result.gradients})


def assert_same(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Names the array with the largest error."""
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    worst = max(errors, key=errors.get)
    assert errors[worst] <= 1e-5, f"{worst}: {errors[worst]:.3g}"


@pytest.mark.parametrize(
    ("kind", "mesh", "gradients"),
    [
        # Seven targets' A and B, router and head; three tuned matrices, router and head.
        ("lora", "data=2,fsdp=4", 14 + 2),
        ("nf4", "fsdp=8", 14 + 2),
        pytest.param("esft", "data=2,fsdp=4", 3 + 2, marks=pytest.mark.exhaustive),
    ],
)
def test_loss_and_gradients(one_device, kind, mesh, gradients):
    """DenseMixer's router gradient, dropout in the adapters."""
    expected = run(kind, one_device)
    assert len(expected) == 1 + gradients
    assert all(np.abs(value).max() > 0 for value in expected.values())
    assert_same(run(kind, sharding.make_mesh(*MESHES[mesh])), expected)


def test_tuned_experts_reach_their_places():
    """The stack of tuned experts travels between the devices, and nothing of the base."""
    config, mesh = tiny_config(), sharding.make_mesh(1, 4, 2)
    weights = random_weights(config)
    tuned = {name: 2 * value for name, value in stack_tuned(weights, EXPERTS).items()}
    specs = parameter_specs(config, ModelSettings(tuned_experts=EXPERTS))
    shardings = sharding.parameter_shardings(specs, mesh)
    arrays = {name: weights[name] for name in HOLDERS}, tuned
    arrays = jax.device_put(arrays, tuple({n: shardings[n] for n in part} for part in arrays))
    function = functools.partial(hold_tuned, tuned_experts=EXPERTS)
    function = jax.jit(function, out_shardings={name: shardings[name] for name in HOLDERS})
    collectives = re.findall(
        r"= f32\[([\d,]+)\]\S* (?:all|collective)-", function.lower(*arrays).compile().as_text()
    )
    assert collectives
    assert {shape.split(",")[0] for shape in collectives} == {str(len(places(EXPERTS)))}
    for name, held in function(*arrays).items():
        expected = np.array(weights[name])
        for place, at in enumerate(places(EXPERTS)):
            expected[at] = tuned[HOLDERS[name]][place]
        np.testing.assert_array_equal(held, expected)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "float32")


@pytest.mark.parametrize("mesh", MESHES)
def test_a_base_quantized_as_it_is_read(one_device, base, mesh):
    def loaded(mesh: Mesh) -> dict[str, np.ndarray]:
        parameters = load_parameters(HFCheckpoint(base), mesh, quantization="nf4")
        leaves = jax.tree_util.tree_leaves_with_path(parameters)
        return {jax.tree_util.keystr(path): np.asarray(leaf, np.float32) for path, leaf in leaves}

    assert_same(loaded(sharding.make_mesh(*MESHES[mesh])), loaded(one_device))


def test_expert_scores(one_device, base):
    source = HFCheckpoint(base)

    def scores(mesh: Mesh, rows_per_device: int) -> dict[str, np.ndarray]:
        return expert_scores(
            graph_of(source.config, ModelSettings()),
            load_parameters(source, mesh, lambda name: jnp.float32),
            source.config,
            mesh,
            make_examples(),
            max_tokens=1000,
            seed=0,
            layout=ROWS | {"rows_per_batch": rows_per_device * mesh.size},
        )[0]

    assert_same(scores(sharding.make_mesh(2, 4), 1), scores(one_device, 4))
