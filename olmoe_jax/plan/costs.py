"""The speed limit of a step: compute, memory and network, each at the device's peak."""

import dataclasses
import math
from collections.abc import Mapping

from olmoe_jax.model.config import ModelConfig, ModelSettings
from olmoe_jax.model.decoder import parameter_specs
from olmoe_jax.plan.devices import Topology


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Lower bounds of a step's seconds, one for each resource while the others cost nothing.

    `exposed` is the part of `network` in which the devices compute nothing.
    """

    compute: float
    memory: float
    network: float
    exposed: float

    @property
    def seconds(self) -> float:
        """The least time of a step: what is exposed adds to the largest other bound."""
        return max(max(self.compute, self.memory) + self.exposed, self.network)

    @property
    def bound(self) -> str:
        """The name of the largest bound of a resource."""
        return max(("compute", "memory", "network"), key=vars(self).get)


def roofline(
    topology: Topology,
    flops: float,
    memory_bytes: float,
    wire_bytes: float,
    exposed_wire_bytes: float,
) -> Roofline | None:
    """Returns the bounds for one device's FLOPs and bytes in a step.

    `exposed_wire_bytes` are those of `wire_bytes` that travel while the device computes nothing.
    None for a kind of device without figures.
    """
    kind = topology.kind
    if kind.flops is None:
        return None
    return Roofline(
        flops / kind.flops,
        memory_bytes / kind.bandwidth,
        wire_bytes / topology.interconnect,
        exposed_wire_bytes / topology.interconnect,
    )


def microbatch_traffic(
    config: ModelConfig, settings: ModelSettings, gradients: Mapping[str, int], tokens: float
) -> float:
    """Returns the bytes that a device moves at least between its memory and its cores.

    The bound is that of one micro-batch. It leaves out scores, logits, gathered copies and
    whatever a kernel writes in between.

    `gradients` are the bytes of this device's shard of each trained parameter's gradient, and
    `tokens` those of one micro-batch on this device.
    """
    size = settings.compute_dtype.itemsize
    passes = 2 + (settings.remat == "full")  # forward, backward, recomputation
    dense_router = settings.dense_router_gradient
    weights = gradient_bytes = 0.0
    for name, spec in parameter_specs(config, settings).items():
        numbers = math.prod(spec.shape)
        # Each pass reads all weights; DenseMixer reads the experts once more.
        weights += numbers * (passes + (dense_router and ".experts." in name))
        if name in gradients:
            # A gradient is written whole, then added to its shard of the sum: two reads, a write.
            gradient_bytes += numbers * size + 3 * gradients[name]
    # Each matmul reads its input and writes its output: once in a pass, twice in the backward.
    heads = config.num_heads * config.head_dim
    kv_heads = config.num_kv_heads * config.head_dim
    attention = 4 * config.hidden_size + 2 * heads + 2 * kv_heads
    expert = 3 * config.hidden_size + 3 * config.intermediate_size
    activations = attention + config.num_experts_per_token * expert
    per_token = config.num_layers * activations * (passes + 1)
    return size * (weights + tokens * per_token) + gradient_bytes
