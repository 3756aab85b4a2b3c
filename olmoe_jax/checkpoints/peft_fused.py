"""PEFT adapters of transformers 5's fused experts, split into the matrices of each expert.

PEFT on transformers 5 keeps one A [E*r, D] (expert-major) and one B [2F, r*E] (rank-major) for the
gate and up matrices of all experts of a layer: the two share A, and B stacks them. Down has an A
[E*r, F] and a B [D, r*E]. Aimed at gate_proj and up_proj, PEFT gives the pair the rank 2r.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from olmoe_jax.checkpoints.safetensors_file import StoredTensor
from olmoe_jax.model.config import ModelConfig


class LoadedTensor(NamedTuple):
    """A tensor in memory that is read like a `StoredTensor`."""

    value: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def read(self) -> np.ndarray:
        return self.value


def modules(experts: str, a: StoredTensor, b: StoredTensor, config: ModelConfig) -> list[list[str]]:
    """Returns the modules that A and B of a layer's experts adapt: one or two of each expert.

    PEFT's name of the experts, which ends in `.base_layer` or not, depends on what else is adapted.
    The shapes of A and B tell gate and up from down in any model.
    """
    d, f = config.hidden_size, config.intermediate_size
    down = (a.shape[1:], b.shape[:1]) == ((f,), (d,))
    experts, parts = experts.removesuffix(".base_layer"), ["down"] if down else ["gate", "up"]
    return [[f"{experts}.{i}.{part}_proj" for part in parts] for i in range(config.num_experts)]


def split(
    a: StoredTensor, b: StoredTensor, modules: list[list[str]]
) -> Iterator[tuple[str, LoadedTensor, LoadedTensor]]:
    """Yields (module, A [r, in], B [out, r]), views, of A [E*r, in] and B [outs, r*E]."""
    experts, parts = len(modules), len(modules[0])
    all_a = a.read().reshape(experts, -1, a.shape[1])
    all_b = b.read().reshape(parts, b.shape[0] // parts, -1, experts)
    for expert, adapted in enumerate(modules):
        for part, module in enumerate(adapted):
            yield module, LoadedTensor(all_a[expert]), LoadedTensor(all_b[part, ..., expert])
