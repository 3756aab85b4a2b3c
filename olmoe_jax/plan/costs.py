"""How fast a step can be at most: compute, memory and network, each at the device's peak."""

import dataclasses
import math

from olmoe_jax.model.config import ModelConfig, ModelSettings
from olmoe_jax.model.parameters import ParameterSpec
from olmoe_jax.plan.devices import Topology


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Lower bounds in seconds of a step, with the rest of the work hidden behind each."""

    compute: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.network)

    @property
    def bound(self) -> str:
        """The slowest of the three."""
        return max(vars(self), key=vars(self).get)


def roofline(
    topology: Topology, flops: float, memory_bytes: float, wire_bytes: float
) -> Roofline | None:
    """The bounds for one device's FLOPs and bytes in a step; None: no figures for the kind."""
    kind = topology.kind
    if kind.flops is None:
        return None
    return Roofline(
        flops / kind.flops, memory_bytes / kind.bandwidth, wire_bytes / topology.interconnect
    )


def microbatch_traffic(
    config: ModelConfig,
    settings: ModelSettings,
    specs: dict[str, ParameterSpec],
    trained: dict[str, int],
    tokens: float,
) -> float:
    """Bytes that a device must at least move from and to its memory for one micro-batch.

    All weights in the compute dtype are read once in the forward, the recomputation and the
    backward, and the experts' once more for DenseMixer; gradients are written whole in the compute
    dtype and added to their sum's shard (a read of both, a write). Every matmul's input is read
    and its output written once in each pass and twice in the backward. Scores, logits, gathered
    copies and everything a kernel writes in between are left out.

    Args:
      trained: bytes on this device (its shard) of the gradient of each parameter that trains.
      tokens: of this device.
    """
    size = settings.compute_dtype.itemsize
    passes = 2 + (settings.remat == "full")
    dense_router = settings.router_method == "densemixer"
    weights = gradients = 0.0
    for name, spec in specs.items():
        numbers = math.prod(spec.shape)
        weights += numbers * (passes + (dense_router and ".experts." in name))
        if name in trained:
            gradients += numbers * size + 3 * trained[name]
    heads = config.num_heads * config.head_dim
    kv_heads = config.num_kv_heads * config.head_dim
    attention = 4 * config.hidden_size + 2 * heads + 2 * kv_heads
    expert = 3 * config.hidden_size + 3 * config.intermediate_size
    activations = attention + config.num_experts_per_token * expert
    per_token = config.num_layers * activations * (passes + 1)
    return size * (weights + tokens * per_token) + gradients


def update_traffic(gradients: int, state: int) -> float:
    """Bytes of an update: reads gradients, weights and moments, writes the last two."""
    return gradients + 2 * state
