"""ESFT's experts: the selected ones of all layers in one pack, beside the frozen base.

Shapes: N selected experts over all layers, n the most in one layer, L layers, D, F as elsewhere.
The pack [N, …] is what trains, so that gradients, master copies and moments exist for it alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from olmoe_jax.model.config import ModelConfig
from olmoe_jax.model.parameters import matrix

NAMES = ("gate", "up", "down")


class LayerTunedExperts(NamedTuple):
    """The selected experts of one layer (stacked [L, …] for a model), in the compute dtype."""

    indices: jax.Array  # [n] int32; E where the layer has fewer than n
    gate: jax.Array  # [n, D, F]
    up: jax.Array  # [n, D, F]
    down: jax.Array  # [n, F, D]


def places(tuned_experts: tuple[tuple[int, ...], ...]) -> list[tuple[int, int]]:
    """(layer, expert) of each place in the pack."""
    return [(layer, expert) for layer, ids in enumerate(tuned_experts) for expert in ids]


class TunedExperts(nnx.Module):
    """The pack: gate, up [N, D, F] and down [N, F, D]."""

    def __init__(
        self,
        config: ModelConfig,
        tuned_experts: tuple[tuple[int, ...], ...],
        *,
        rngs: nnx.Rngs,
    ):
        self.experts = tuned_experts
        count = {"tuned": len(places(tuned_experts))}
        inward = {**count, "embed": config.hidden_size, "mlp": config.intermediate_size}
        outward = {axis: inward[axis] for axis in ("tuned", "mlp", "embed")}
        std = config.initializer_range
        for name in NAMES:
            setattr(self, name, matrix(rngs, outward if name == "down" else inward, std))

    def by_layer(self, num_experts: int, dtype) -> LayerTunedExperts:
        """The pack cut into layers, each filled up to the longest: [L, n, …]."""
        total, most = len(places(self.experts)), max(map(len, self.experts))
        slots = np.full((len(self.experts), most), total, np.int32)
        indices = np.full((len(self.experts), most), num_experts, np.int32)
        start = 0
        for layer, ids in enumerate(self.experts):
            slots[layer, : len(ids)] = range(start, start + len(ids))
            indices[layer, : len(ids)] = ids
            start += len(ids)
        return LayerTunedExperts(
            jnp.asarray(indices),
            *(
                jnp.take(
                    getattr(self, name)[...].astype(dtype), slots, 0, mode="fill", fill_value=0
                )
                for name in NAMES
            ),
        )
