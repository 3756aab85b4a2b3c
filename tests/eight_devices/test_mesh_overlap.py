"""The layers one turn ahead (`model/overlap.py`): the numbers of the plain loop, on every mesh."""

import jax
import numpy as np
import pytest
from helpers import relative_error
from tiny import make_batch, random_adapters, random_weights, tiny_config

from olmoe_jax.checkpoints.loading import quantized_like, stack_tuned
from olmoe_jax.model import overlap
from olmoe_jax.model.config import ModelSettings
from olmoe_jax.model.decoder import parameter_specs
from olmoe_jax.model.lora import LoraSettings, is_target
from olmoe_jax.model.parameters import ROUTER
from olmoe_jax.ops.quantization import quantize
from olmoe_jax.parallel import sharding
from olmoe_jax.parallel.batch import place_batch
from olmoe_jax.training.optimizer import adamw, schedule
from olmoe_jax.training.step import Trainer

LORA = LoraSettings(4, 8.0, dropout=0.3)
EXPERTS = ((1, 4, 7), (0,))
METHODS = {
    "frozen": ({"router_trains": False}, lambda name: name != ROUTER),
    "conventional": ({}, lambda name: True),
    "densemixer": ({"dense_router_gradient": True}, lambda name: True),
    "densemixer, 4 experts": (
        {"dense_router_gradient": True, "router_gradient_experts": 4},
        lambda name: True,
    ),
    "lora": ({"lora": LORA}, lambda name: ".lora." in name or name == ROUTER),
    "nf4": ({"lora": LORA, "router_trains": False}, lambda name: ".lora." in name),
    "esft": ({"tuned_experts": EXPERTS}, lambda name: name.startswith("tuned.")),
    "esft, all else too": (
        {"tuned_experts": EXPERTS},
        lambda name: ".experts." not in name,
    ),
}
"""Settings of the model, and what trains."""
MESHES = {"fsdp=8": (1, 8), "data=2,fsdp=4": (2, 4)}


def accumulated(method: str, mesh) -> dict[str, np.ndarray]:
    """Loss, statistics and gradients after two micro-batches, with a load-balancing loss."""
    settings, trains = METHODS[method]
    settings, config = ModelSettings(remat="full", **settings), tiny_config(num_layers=2)
    weights = random_weights(config)
    if settings.lora:
        weights |= random_adapters(config, LORA)
    if settings.tuned_experts:
        weights |= stack_tuned(weights, EXPERTS)
    specs = parameter_specs(config, settings)
    shardings = sharding.parameter_shardings(specs, mesh)
    if method == "nf4":
        for name in filter(is_target, weights):
            weights[name] = quantize(weights[name], method)
            like = quantized_like(specs[name], method, mesh)
            shardings[name] = jax.tree.map(lambda part: part.sharding, like)
    optimizer = adamw(0.9, 0.999, 1e-8, 0.0)
    trainer = Trainer(config, settings, optimizer, schedule("constant", 1.0, 0, 1), 1.0, 0.1)
    with jax.set_mesh(mesh):
        placed = jax.device_put(weights, {name: shardings[name] for name in weights})
        trained = {name: value for name, value in placed.items() if trains(name)}
        frozen = {name: value for name, value in placed.items() if name not in trained}
        batch, sums = place_batch(make_batch(), mesh), trainer.zero_sums(trained)
        accumulate = jax.jit(trainer.accumulate)
        for part in range(2):
            sums = accumulate(trained, frozen, sums, batch, np.array([3, part], np.uint32))
    statistics = sums.statistics._asdict()
    statistics.pop("logits")
    return jax.device_get({"loss": sums.loss, **statistics, **sums.gradients})


@pytest.mark.parametrize(
    ("method", "mesh"),
    [
        ("frozen", "data=2,fsdp=4"),
        pytest.param("conventional", "fsdp=8", marks=pytest.mark.exhaustive),
        pytest.param("densemixer", "data=2,fsdp=4", marks=pytest.mark.exhaustive),
        pytest.param("densemixer, 4 experts", "fsdp=8", marks=pytest.mark.exhaustive),
        pytest.param("lora", "data=2,fsdp=4", marks=pytest.mark.exhaustive),
        pytest.param("nf4", "fsdp=8", marks=pytest.mark.exhaustive),
        ("esft", "fsdp=8"),
        pytest.param("esft, all else too", "data=2,fsdp=4", marks=pytest.mark.exhaustive),
    ],
)
def test_the_numbers_of_the_plain_loop(method, mesh, monkeypatch):
    mesh = sharding.make_mesh(*MESHES[mesh])
    asked = []
    monkeypatch.setattr(overlap, "serves", lambda *arguments: asked.append(arguments))
    expected = accumulated(method, mesh)
    assert asked
    monkeypatch.undo()
    actual = accumulated(method, mesh)
    assert actual.keys() == expected.keys()
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    worst = max(errors, key=errors.get)
    assert errors[worst] <= 2e-6, f"{worst}: {errors[worst]:.3g}"
    assert all(np.abs(value).max() > 0 for value in actual.values())


@pytest.mark.parametrize(
    ("mesh", "remat", "expected"),
    [
        ((1, 8, 1), "full", True),
        ((2, 4, 1), "full", True),
        ((8, 1, 1), "full", False),
        ((1, 4, 2), "full", False),
        ((1, 8, 1), "selective", False),
    ],
)
def test_where_it_is_used(mesh, remat, expected):
    assert overlap.serves(sharding.make_mesh(*mesh), remat) == expected
