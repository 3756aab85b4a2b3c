"""PEFT adapters of transformers 5's fused experts, brought into the per-expert layout.

PEFT on transformers 5 keeps one A [E*r, in] (expert-major) and one B [out, r*E] (rank-major) for
all experts of a layer, with gate and up stacked in B's rows and sharing A; aimed at gate_proj and
up_proj, it gives that pair the rank 2r. Our adapters have one rank R, the largest: smaller ones
are filled up with zeros, and what differs in scale goes into B, so that W + scale * A B stays.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from olmoe_jax.checkpoints.safetensors_file import StoredTensor
from olmoe_jax.errors import UserError
from olmoe_jax.model.config import ModelConfig
from olmoe_jax.model.lora import LoraSettings

_FUSED = re.compile(r"(.*\.mlp\.experts)((?:\.base_layer)?)\.lora_A\.weight")


class Tensor(NamedTuple):
    """A tensor in memory, with the face of a `StoredTensor`."""

    value: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def read(self) -> np.ndarray:
        return self.value


def is_fused(tensors: dict[str, StoredTensor]) -> bool:
    """Whether an adapter's experts are fused."""
    return any(_FUSED.fullmatch(name) for name in tensors)


def per_expert(
    tensors: dict[str, StoredTensor],
    settings: LoraSettings,
    adapter_config: dict[str, Any],
    config: ModelConfig,
    file: Path,
) -> tuple[LoraSettings, dict[str, Tensor]]:
    """The settings and tensors of the same adapter with one A and B per expert and projection.

    Raises:
      UserError: the shapes are not this model's.
    """
    ranks = {True: _pattern(adapter_config, "rank_pattern", settings.rank)}
    alphas = {True: _pattern(adapter_config, "alpha_pattern", settings.alpha)}
    ranks[False], alphas[False] = settings.rank, settings.alpha
    largest = max(ranks.values())
    scales = {
        pair: LoraSettings(ranks[pair], alphas[pair], rslora=settings.rslora).scale
        for pair in ranks
    }
    out: dict[str, Tensor] = {}

    def put(module: str, a: np.ndarray, b: np.ndarray, pair: bool) -> None:
        missing = largest - len(a)
        b = b * np.float32(scales[pair] / scales[False])
        out[f"{module}.lora_A.weight"] = Tensor(np.pad(a, ((0, missing), (0, 0))))
        out[f"{module}.lora_B.weight"] = Tensor(np.pad(b, ((0, 0), (0, missing))))

    for name in tensors:
        if not name.endswith(".lora_A.weight"):
            continue
        b_name = name.replace(".lora_A.", ".lora_B.")
        if b_name not in tensors:
            raise UserError(f"{file}: tensor {b_name} is missing")
        a, b = (tensors[part].read().astype(np.float32) for part in (name, b_name))
        match = _FUSED.fullmatch(name)
        if not match:
            put(name.removesuffix(".lora_A.weight"), a, b, False)
            continue
        # The down projection reads the experts' width, the pair the model's. (Where these are
        # the same, what is inside, the base_layer, is the pair: PEFT wraps it first.)
        d, f, experts = config.hidden_size, config.intermediate_size, config.num_experts
        pair = a.shape[1] == d and (d != f or bool(match[2]))
        rank, outputs = ranks[pair], 2 * f if pair else d
        expected = (experts * rank, d if pair else f), (outputs, rank * experts)
        if (a.shape, b.shape) != expected:
            raise UserError(
                f"{file}: tensors {name} {list(a.shape)} and lora_B {list(b.shape)}, but this "
                f"model and rank need {list(expected[0])} and {list(expected[1])}"
            )
        a, b = a.reshape(experts, rank, -1), b.reshape(outputs, rank, experts)
        for expert in range(experts):
            module, matrix = f"{match[1]}.{expert}", b[:, :, expert]
            if pair:
                put(f"{module}.gate_proj", a[expert], matrix[:f], True)
                put(f"{module}.up_proj", a[expert], matrix[f:], True)
            else:
                put(f"{module}.down_proj", a[expert], matrix, False)
    return LoraSettings(largest, scales[False] * largest), out


def _pattern(adapter_config: dict[str, Any], field: str, default: float) -> float:
    """The entry for gate_up_proj, the only one that PEFT makes itself (see `unreadable`)."""
    return next(iter((adapter_config.get(field) or {}).values()), default)


def unreadable(adapter_config: dict[str, Any]) -> str | None:
    """The first field of patterns that name anything but the fused pair."""
    for field in ("rank_pattern", "alpha_pattern"):
        keys = adapter_config.get(field) or {}
        if any(not re.fullmatch(r".*[.]gate_up_proj", key) for key in keys) or len(keys) > 1:
            return field
    return None
