"""Tiny bases, adapters with non-zero B, and short runs for the tests of LoRA and ESFT."""

import dataclasses

import numpy as np
from helpers import random_weights, tiny_config, write_hf_checkpoint

from olmoe_jax.checkpoints.huggingface import HFCheckpoint
from olmoe_jax.config import Config
from olmoe_jax.data import Batch
from olmoe_jax.model.config import ModelConfig, ModelSettings
from olmoe_jax.model.decoder import parameter_specs
from olmoe_jax.model.lora import LoraSettings

BYTES = {"vocab_size": 258, "num_kv_heads": 2, "pad_token_id": 1}
"""The base of the runs: its vocabulary is the byte tokenizer's."""

LORA = {"method__lora_rank": 4, "method__lora_alpha": 8.0}
SHORT = {
    "model__init": "pretrained",
    "model__config_path": None,
    "model__remat": "none",
    "data__eval_path": None,
    "data__eval_fraction": 0.0,
    "train__max_steps": 4,
}
"""Four steps without evaluation: two programs to compile."""


def write_base(path, dtype="float32", **changes):
    """A pretrained base for runs; returns its path."""
    write_hf_checkpoint(path, tiny_config(**(BYTES | changes)), dtype=dtype)
    return path


def short_run(files, base, output, **changes) -> Config:
    """Four steps from a pretrained base."""
    return files.config(output, **(SHORT | {"model__path": str(base)} | changes))


def random_adapters(config: ModelConfig, lora: LoraSettings, seed: int = 0):
    """Our adapter parameters with every number random, B too."""
    random = np.random.default_rng(seed)
    specs = parameter_specs(config, ModelSettings(lora=lora))
    return {
        name: (random.normal(size=spec.shape) / np.sqrt(spec.shape[-2])).astype(np.float32)
        for name, spec in specs.items()
        if ".lora." in name
    }


def merged_weights(weights, adapters, scale: float):
    """The oracle: each adapted matrix W + scale * A B, in float64 rounded to float32 once."""
    merged = dict(weights)
    for name, a in adapters.items():
        if name.endswith("_a"):
            base = name.replace(".lora.", ".").removesuffix("_a")
            product = a.astype(np.float64) @ adapters[name[:-1] + "b"]
            merged[base] = (weights[base] + scale * product).astype(np.float32)
    assert len(merged) == len(weights)
    return merged


def base_weights(path) -> dict[str, np.ndarray]:
    """Our parameters of a base that `write_base` wrote in float32."""
    return random_weights(HFCheckpoint(path).config)


def make_batch() -> Batch:
    """Eight rows of ragged lengths."""
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
