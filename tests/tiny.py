"""The tiny models of all tests: configurations, weights, checkpoints, adapters and short runs."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from helpers import write_json

from olmoe_jax.checkpoints import names
from olmoe_jax.checkpoints.expert_config import ExpertConfig
from olmoe_jax.checkpoints.huggingface import DTYPES, HFCheckpoint
from olmoe_jax.checkpoints.loading import graph_of
from olmoe_jax.config import Config
from olmoe_jax.data import Batch, TokenizedDataset
from olmoe_jax.data.counts import Counts
from olmoe_jax.model.config import ModelConfig, ModelSettings
from olmoe_jax.model.decoder import Olmoe, parameter_specs
from olmoe_jax.model.lora import LoraSettings
from olmoe_jax.model.parameters import merge
from olmoe_jax.parallel.sharding import make_mesh
from olmoe_jax.sources import Source
from olmoe_jax.training.base_model import open_model
from olmoe_jax.training.program import build_program


def tiny_config(**changes) -> ModelConfig:
    """An OLMoE of 2 layers that compiles in a second; `changes` are fields of ModelConfig."""
    fields = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 4,
        "head_dim": 8,
        "num_experts": 8,
        "num_experts_per_token": 2,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
    }
    return ModelConfig(**(fields | changes))


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 parameters under our names, large enough that every part of the model matters."""
    random = np.random.default_rng(seed)
    weights = {}
    for weight in names.weights(config):
        shape = names.layer_shape(weight, config)
        shape = (config.num_layers, *shape) if weight.per_layer else shape
        value = random.normal(size=shape)
        is_scale = weight.name.endswith("norm")
        fan_in = config.hidden_size if weight.name in ("embed", "lm_head") else shape[-2:][0]
        value = 1 + 0.2 * value if is_scale else value / np.sqrt(fan_in)
        # Embeddings of size 1, and a router that prefers some experts clearly.
        value = value * {"embed": 5.0, "layers.moe.router": 2.0}.get(weight.name, 1.0)
        weights[weight.name] = value.astype(np.float32)
    return weights


def make_model(config: ModelConfig, weights=None, **settings) -> Olmoe:
    """The model of these weights (default: `random_weights`); settings as in ModelSettings."""
    weights = random_weights(config) if weights is None else weights
    return merge(graph_of(config, ModelSettings(**settings)), jax.tree.map(jnp.asarray, weights))


def hf_config(config: ModelConfig, **changes) -> dict:
    """The config.json of this architecture as transformers 4 wrote it."""
    return {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "clip_qkv": config.clip_qkv,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": 64,
        "norm_topk_prob": config.norm_topk_prob,
        "num_attention_heads": config.num_heads,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_token,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "pad_token_id": config.pad_token_id,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": "float32",
        "vocab_size": config.vocab_size,
        **changes,
    }


def hf_tensors(config: ModelConfig, weights=None, dtype=np.float32) -> dict[str, np.ndarray]:
    """The same parameters as Hugging Face's tensors, one per expert."""
    weights = random_weights(config) if weights is None else weights
    return {
        name: np.ascontiguousarray(value).astype(dtype)
        for name, value in names.all_to_hf(weights, config)
    }


def write_hf_checkpoint(
    path: Path, config: ModelConfig, weights=None, dtype: str = "float32", shards: int = 1
) -> dict[str, np.ndarray]:
    """Makes a random Hugging Face checkpoint with the safetensors library; returns its tensors."""
    tensors = hf_tensors(config, weights, DTYPES[dtype])
    write_tensors(path, tensors, shards)
    write_json(path / "config.json", hf_config(config, torch_dtype=dtype))
    return tensors


def write_tensors(path: Path, tensors: dict[str, np.ndarray], shards: int = 1) -> None:
    """Writes the weights of a checkpoint directory: one file, or shards and an index."""
    path.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        safetensors.numpy.save_file(tensors, path / "model.safetensors", {"format": "pt"})
        return
    weight_map = {}
    names_ = sorted(tensors)
    for shard in range(shards):
        part = names_[shard::shards]
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        in_file = {name: tensors[name] for name in part}
        safetensors.numpy.save_file(in_file, path / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(path / "model.safetensors.index.json", index)


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
    return Batch(
        tokens=tokens,
        targets=np.roll(tokens, -1, axis=1),
        segment_ids=segments,
        positions=np.broadcast_to(np.arange(10, dtype=np.int32), tokens.shape),
        loss_weights=(segments / segments.sum()).astype(np.float32),
    )


def program_of(config, experts=None):
    """The program of a run on one device, perhaps with these tuned experts."""
    model = open_model(config)
    if experts:
        method = model.method.with_experts(ExpertConfig(experts))
        model = dataclasses.replace(model, method=method)
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        return build_program(config, model, mesh, 4)


LENGTHS = [5, 9, 3, 12, 1, 7, 4, 10]
ROWS = {
    "max_seq_length": 16,
    "pack": True,
    "rows_per_batch": 2,
    "pad_id": 1,
    "process_index": 0,
    "process_count": 1,
}
"""How the examples of `make_examples` become rows: arguments of `evaluation_batches`."""


def make_examples(lengths=LENGTHS):
    """Examples with random tokens, the padding's id among them, where it counts like any other."""
    random = np.random.default_rng(0)
    total = sum(lengths)
    return TokenizedDataset(
        tokens=random.integers(0, 258, total, dtype=np.int32),
        in_loss=np.ones(total, bool),
        offsets=np.cumsum([0, *lengths], dtype=np.int64),
        members=np.arange(len(lengths)),
        sources=[Source("synthetic")],
        source_counts=[Counts(rows=len(lengths))],
        origin={"content": "synthetic"},
    )
