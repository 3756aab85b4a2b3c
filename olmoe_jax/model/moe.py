"""The mixture-of-experts block and its router statistics.

Shapes: B rows, S positions, T = B*S tokens, D model width, F expert width, E experts, K experts
per token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from olmoe_jax import sharding
from olmoe_jax.model.config import ModelConfig, ModelSettings
from olmoe_jax.model.parameters import matrix
from olmoe_jax.ops.grouped_matmul import grouped_matmul
from olmoe_jax.ops.router_gradient import router_gradient
from olmoe_jax.ops.routing import from_experts, sort_by_expert, to_experts


class RouterStatistics(NamedTuple):
    """Sums over the real (unpadded) tokens of a batch; stacked [L, …] for a whole model."""

    load: jax.Array  # [E] float32: tokens that selected the expert
    probability: jax.Array  # [E] float32: sum of the router's probabilities
    entropy: jax.Array  # [] float32: sum of the entropies (nats) of the probabilities
    logits: jax.Array | None  # [B, S, E] float32, only on request


class Experts(nnx.Module):
    """E SwiGLU networks: W_down (silu(W_gate x) * W_up x)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        layers, std = config.num_layers, config.initializer_range
        inward = {
            "layer": layers,
            "expert": config.num_experts,
            "embed": config.hidden_size,
            "mlp": config.intermediate_size,
        }
        outward = {axis: inward[axis] for axis in ("layer", "expert", "mlp", "embed")}
        self.gate = matrix(rngs, inward, std)
        self.up = matrix(rngs, inward, std)
        self.down = matrix(rngs, outward, std)


class MoE(nnx.Module):
    """Router and experts; every token is processed by its K most probable experts, none dropped."""

    def __init__(self, config: ModelConfig, settings: ModelSettings, *, rngs: nnx.Rngs):
        self.config = config
        self.settings = settings
        self.router = matrix(
            rngs,
            {"layer": config.num_layers, "embed": config.hidden_size, "router": config.num_experts},
            config.initializer_range,
        )
        self.experts = Experts(config, rngs=rngs)

    def __call__(
        self, x: jax.Array, is_token: jax.Array, with_logits: bool = False
    ) -> tuple[jax.Array, RouterStatistics]:
        """x [B, S, D], is_token [B, S] bool (False: padding, routed nowhere) -> y [B, S, D]."""
        dtype = self.settings.compute_dtype
        names = ("gate", "up", "down")
        parameters = [getattr(self.experts, name) for name in names]
        experts = tuple(parameter[...].astype(dtype) for parameter in parameters)
        router = self.router[...]
        mesh = sharding.active_mesh()
        if mesh is None:
            return self._local(x, is_token, router, experts, with_logits)

        specs = tuple(
            sharding.partition_spec(weight.shape, parameter.get_metadata("axes")[1:], mesh)
            for weight, parameter in zip(experts, parameters, strict=True)
        )

        def on_device(x, is_token, router, experts):
            whole = tuple(_all_gather(w, spec) for w, spec in zip(experts, specs, strict=True))
            y, statistics = self._local(x, is_token, router, whole, with_logits)
            summed = jax.tree.map(
                lambda value: jax.lax.psum(value, sharding.AXES), statistics._replace(logits=None)
            )
            return y, summed._replace(logits=statistics.logits)

        out = RouterStatistics(P(), P(), P(), sharding.BATCH if with_logits else None)
        return jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(sharding.BATCH, sharding.BATCH, P(), specs),
            out_specs=(sharding.BATCH, out),
            check_vma=False,
        )(x, is_token, router, experts)

    def _local(self, x, is_token, router, experts, with_logits):
        """The block on the tokens of one device, with all experts at hand."""
        config, shape = self.config, x.shape
        x, is_token = x.reshape(-1, shape[-1]), is_token.reshape(-1)
        with jax.named_scope("router"):
            if self.settings.router_method == "frozen":
                router = jax.lax.stop_gradient(router)
            logits = jnp.dot(x.astype(jnp.float32), router, precision=jax.lax.Precision.HIGHEST)
            probabilities = jax.nn.softmax(logits, axis=-1)
            weights, chosen = jax.lax.top_k(probabilities, config.num_experts_per_token)
            if config.norm_topk_prob:
                weights = weights / weights.sum(axis=-1, keepdims=True)
            chosen = jnp.where(is_token[:, None], chosen, config.num_experts)
        with jax.named_scope("experts"):
            y, load = self._run_experts(x, weights, chosen, experts)
        if self.settings.router_method == "densemixer":
            y = y + self._dense_router_term(x, probabilities, chosen, is_token, experts)
        statistics = RouterStatistics(
            load=load,
            probability=jnp.sum(probabilities * is_token[:, None], axis=0),
            entropy=-jnp.sum(jax.nn.log_softmax(logits) * probabilities * is_token[:, None]),
            logits=logits.reshape(*shape[:-1], -1) if with_logits else None,
        )
        return y.reshape(shape), statistics

    def _run_experts(self, x, weights, chosen, experts):
        gate, up, down = experts
        backend = self.settings.grouped_matmul
        order, inverse, group_sizes = sort_by_expert(chosen, self.config.num_experts)
        rows = to_experts(x, order, inverse, chosen.shape[1])
        hidden = jax.nn.silu(grouped_matmul(rows, gate, group_sizes, backend))
        hidden = hidden * grouped_matmul(rows, up, group_sizes, backend)
        rows = grouped_matmul(hidden, down, group_sizes, backend)
        y = from_experts(rows, weights, order, inverse).astype(x.dtype)
        return y, group_sizes.astype(jnp.float32)

    def _dense_router_term(self, x, probabilities, chosen, is_token, experts):
        """Zeros that carry the router gradient of the experts that were not selected."""
        config, limit = self.config, self.settings.router_gradient_experts
        per_token = config.num_experts_per_token
        is_selected = jax.nn.one_hot(chosen, config.num_experts, dtype=bool).any(axis=1)
        # Padding learns nothing, whatever gradient reaches its output.
        unselected = jnp.where(is_selected | ~is_token[:, None], 0.0, probabilities)
        if config.norm_topk_prob:
            selected_sum = jnp.sum(jnp.where(is_selected, probabilities, 0.0), -1, keepdims=True)
            # Padding selects nothing; its sum must not divide by zero.
            selected_sum = jnp.where(is_token[:, None], selected_sum, 1.0)
            unselected = unselected / jax.lax.stop_gradient(selected_sum)
        if limit is None or limit >= config.num_experts:
            limit, candidates = None, chosen
        else:
            # The K selected already have their exact term from the sparse backward.
            candidates = jax.lax.top_k(probabilities, limit)[1][:, per_token:]
            candidates = jnp.where(is_token[:, None], candidates, config.num_experts)
        return router_gradient(
            limit, self.settings.grouped_matmul, unselected, x, *experts, candidates
        )


def _all_gather(weight: jax.Array, spec: P) -> jax.Array:
    """Joins a weight's shards; transposed, it sums and scatters the gradient."""
    for dimension, axis in enumerate(spec):
        if axis is not None:
            weight = jax.lax.all_gather(weight, axis, axis=dimension, tiled=True)
    return weight
