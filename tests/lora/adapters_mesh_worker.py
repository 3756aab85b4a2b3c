"""Run by test_adapters_mesh.py on 8 virtual devices: the worst error of each mesh, as JSON."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from esft.test_esft_scores import PAD, make_examples
from helpers import random_weights, relative_error, tiny_config
from lora.tiny_adapters import BYTES, random_adapters

from olmoe_jax.checkpoints.huggingface import HFCheckpoint
from olmoe_jax.checkpoints.loading import load_parameters, quantized_like, stack_tuned
from olmoe_jax.data import Batch
from olmoe_jax.methods.scoring import expert_scores
from olmoe_jax.model.config import ModelSettings
from olmoe_jax.model.decoder import graph_of, parameter_specs
from olmoe_jax.model.lora import LoraSettings, is_target
from olmoe_jax.ops.quantization import quantize
from olmoe_jax.parallel import sharding
from olmoe_jax.training.optimizer import adamw, schedule
from olmoe_jax.training.step import Trainer, place_batch

EXPERTS = ((1, 4, 7), (0,))
LORA = LoraSettings(4, 8.0, dropout=0.3)
KINDS = {
    "lora": ModelSettings(router_method="densemixer", remat="full", lora=LORA),
    "nf4": ModelSettings(router_method="densemixer", remat="full", lora=LORA),
    "esft": ModelSettings(router_method="densemixer", tuned_experts=EXPERTS),
}


def make_batch() -> Batch:
    random = np.random.default_rng(0)
    tokens = random.integers(2, 61, (8, 10)).astype(np.int32)
    lengths = np.array([10, 9, 4, 10, 1, 7, 10, 3])
    segments = (np.arange(10) < lengths[:, None]).astype(np.int32)
    values = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "segment_ids": segments,
        "positions": np.broadcast_to(np.arange(10, dtype=np.int32), tokens.shape),
        "loss_weights": (segments / segments.sum()).astype(np.float32),
    }
    return Batch(**{field.name: values[field.name] for field in dataclasses.fields(Batch)})


def run(kind, config, mesh):
    """Loss and gradients of the trained parameters, on a mesh."""
    settings = KINDS[kind]
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


def loaded(base, mesh):
    """A base's weights, quantized as they are read; every number as float32."""
    parameters = load_parameters(HFCheckpoint(Path(base)), mesh, quantization="nf4")
    leaves = jax.tree_util.tree_leaves_with_path(parameters)
    return {jax.tree_util.keystr(path): np.asarray(leaf, np.float32) for path, leaf in leaves}


def scores(base, mesh, rows_per_device):
    source = HFCheckpoint(Path(base))
    config = source.config
    return expert_scores(
        graph_of(config, ModelSettings()),
        load_parameters(source, mesh, lambda name: jnp.float32),
        config,
        mesh,
        make_examples(),
        max_tokens=1000,
        max_seq_length=16,
        pack=True,
        rows_per_device=rows_per_device,
        pad_id=PAD,
        seed=0,
    )[0]


def main():
    assert jax.device_count() == 8
    one = sharding.make_mesh(devices=jax.devices()[:1])
    meshes = {"data=2,fsdp=4": sharding.make_mesh(2, 4), "fsdp=8": sharding.make_mesh(1, 8)}
    errors = {}
    for kind in KINDS:
        alone = run(kind, tiny_config(), one)
        for name, mesh in meshes.items():
            sharded = run(kind, tiny_config(), mesh)
            assert all(np.abs(value).max() > 0 for value in alone.values())
            errors[f"{kind} {name}"] = {
                key: relative_error(sharded[key], alone[key]) for key in alone
            }
    alone = loaded(sys.argv[1], one)
    for name, mesh in meshes.items():
        sharded = loaded(sys.argv[1], mesh)
        errors[f"loaded {name}"] = {key: relative_error(sharded[key], alone[key]) for key in alone}
    alone, sharded = scores(sys.argv[1], one, 4), scores(sys.argv[1], meshes["data=2,fsdp=4"], 1)
    errors["scores"] = {key: relative_error(sharded[key], alone[key]) for key in alone}
    assert BYTES["pad_token_id"] == PAD
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
