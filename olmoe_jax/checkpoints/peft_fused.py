"""PEFT adapters of transformers 5's fused experts, brought into the per-expert layout.

PEFT on transformers 5 keeps one A [E*r, D] (expert-major) and one B [2F, r*E] (rank-major) for the
gate and up matrices of all experts of a layer: the two share A, and B stacks them. Down has an A
[E*r, F] and a B [D, r*E]. Aimed at gate_proj and up_proj, PEFT gives the pair the rank 2r.

This project's adapters have one rank R and one scale. R is the largest rank: smaller ones are
filled up with zeros. A scale of the pair's own goes into its B, so that W + scale * A B stays.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from olmoe_jax.checkpoints.safetensors_file import StoredTensor
from olmoe_jax.errors import UserError
from olmoe_jax.model.config import LoraSettings, ModelConfig

_FUSED = re.compile(r"(.*\.mlp\.experts)((?:\.base_layer)?)\.lora_A\.weight")


class LoadedTensor(NamedTuple):
    """A tensor in memory that is read like a `StoredTensor`."""

    value: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def read(self) -> np.ndarray:
        return self.value


def is_fused(tensors: Mapping[str, StoredTensor]) -> bool:
    """Returns whether an adapter's experts are fused."""
    return any(_FUSED.fullmatch(name) for name in tensors)


def per_expert(
    tensors: Mapping[str, StoredTensor],
    settings: LoraSettings,
    adapter_config: dict[str, Any],
    config: ModelConfig,
    file: Path,
) -> tuple[LoraSettings, dict[str, LoadedTensor]]:
    """Returns the same adapter with one A and B for each expert and matrix.

    Args:
      tensors: the adapter's tensors.
      settings: rank and scale of all matrices but the fused pair.
      adapter_config: adapter_config.json; its patterns give the pair's rank and scale.
      config: the base model's architecture.
      file: the adapter's file, for messages.

    Raises:
      UserError: the shapes are not this model's.
    """
    pair_settings = LoraSettings(
        int(_pattern(adapter_config, "rank_pattern", settings.rank)),
        _pattern(adapter_config, "alpha_pattern", settings.alpha),
        rslora=settings.rslora,
    )
    rank = max(settings.rank, pair_settings.rank)
    out: dict[str, LoadedTensor] = {}

    def put(module: str, a: np.ndarray, b: np.ndarray, scale: float) -> None:
        missing = rank - len(a)
        b = b * np.float32(scale / settings.scale)
        out[f"{module}.lora_A.weight"] = LoadedTensor(np.pad(a, ((0, missing), (0, 0))))
        out[f"{module}.lora_B.weight"] = LoadedTensor(np.pad(b, ((0, 0), (0, missing))))

    d, f, experts = config.hidden_size, config.intermediate_size, config.num_experts
    for name in tensors:
        if not name.endswith(".lora_A.weight"):
            continue
        a, b = _read_pair(tensors, name, file)
        match = _FUSED.fullmatch(name)
        if not match:
            put(name.removesuffix(".lora_A.weight"), a, b, settings.scale)
            continue
        # Down's A reads the experts' width F, the pair's the model's width D. Where D equals F,
        # the name tells: PEFT wraps the pair first, so that the pair is the inner base_layer.
        is_pair = a.shape[1] == d and (d != f or bool(match[2]))
        own = pair_settings if is_pair else settings
        width, outputs = (d, 2 * f) if is_pair else (f, d)
        expected = (experts * own.rank, width), (outputs, own.rank * experts)
        if (a.shape, b.shape) != expected:
            raise UserError(
                f"{file}: tensors {name} {list(a.shape)} and lora_B {list(b.shape)}, but this "
                f"model and rank need {list(expected[0])} and {list(expected[1])}"
            )
        a = a.reshape(experts, own.rank, width)
        b = b.reshape(outputs, own.rank, experts)
        for expert in range(experts):
            module, expert_b = f"{match[1]}.{expert}", b[:, :, expert]
            if is_pair:
                put(f"{module}.gate_proj", a[expert], expert_b[:f], own.scale)
                put(f"{module}.up_proj", a[expert], expert_b[f:], own.scale)
            else:
                put(f"{module}.down_proj", a[expert], expert_b, own.scale)
    return LoraSettings(rank, settings.scale * rank), out


def _read_pair(
    tensors: Mapping[str, StoredTensor], a_name: str, file: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Reads A and its B, float32."""
    b_name = a_name.replace(".lora_A.", ".lora_B.")
    if b_name not in tensors:
        raise UserError(f"{file}: tensor {b_name} is missing")
    a, b = (tensors[name].read().astype(np.float32) for name in (a_name, b_name))
    return a, b


def _pattern(adapter_config: dict[str, Any], field: str, default: float) -> float:
    """Returns the pattern's only entry: gate_up_proj's, which PEFT writes itself."""
    return next(iter((adapter_config.get(field) or {}).values()), default)


def unreadable(adapter_config: dict[str, Any]) -> str | None:
    """Returns the first pattern field that names anything but the fused pair, or None."""
    for field in ("rank_pattern", "alpha_pattern"):
        keys = adapter_config.get(field) or {}
        if any(not re.fullmatch(r".*[.]gate_up_proj", key) for key in keys) or len(keys) > 1:
            return field
    return None
