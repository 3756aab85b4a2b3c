"""Tuned experts: the experts that a method such as ESFT trains, stacked beside the frozen base.

Shapes: U tuned experts over all layers, u the most in one layer, L layers, E experts, D model
width, F expert width. Only the stack [U, …] trains, so that gradients, master copies and moments
exist for the tuned experts alone.

A model reads all experts from the base's arrays [L, E, …], which hold the tuned ones' values too:
`hold_tuned` writes them there after each update. Written in the forward, they would cost a copy of
all experts of every layer.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from olmoe_jax.model.config import ModelConfig
from olmoe_jax.model.parameters import Parameters, weight

NAMES = ("gate", "up", "down")
HOLDERS = {f"layers.moe.experts.{name}": f"tuned.{name}" for name in NAMES}
"""The base's parameters that hold tuned experts, and the stacks of these."""


class LayerTunedExperts(NamedTuple):
    """The tuned experts of one layer (stacked [L, …] for a model), in the compute dtype."""

    indices: jax.Array  # [u] int32; E where the layer has fewer than u
    gate: jax.Array  # [u, D, F]
    up: jax.Array  # [u, D, F]
    down: jax.Array  # [u, F, D]


def places(tuned_experts: tuple[tuple[int, ...], ...]) -> list[tuple[int, int]]:
    """Returns (layer, expert) of each place in the stack."""
    return [(layer, expert) for layer, ids in enumerate(tuned_experts) for expert in ids]


def hold_tuned(
    base: Parameters, tuned: Parameters, tuned_experts: tuple[tuple[int, ...], ...]
) -> Parameters:
    """Returns the base's experts with the tuned ones' values at their places.

    Args:
      base: the experts of all layers, by `HOLDERS`' names.
      tuned: parameters, the stacks of tuned experts among them.
      tuned_experts: the ids of each layer's tuned experts.
    """
    layers, experts = np.array(places(tuned_experts)).T
    return {
        name: base[name].at[layers, experts].set(tuned[stack].astype(base[name].dtype))
        for name, stack in HOLDERS.items()
    }


class TunedExperts(nnx.Module):
    """The stack: gate, up [U, D, F] and down [U, F, D]."""

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
            setattr(self, name, weight(rngs, outward if name == "down" else inward, std))

    def by_layer(self, num_experts: int, dtype: DTypeLike) -> LayerTunedExperts:
        """Cuts the stack into layers, each filled up to the longest: [L, u, …]."""
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
