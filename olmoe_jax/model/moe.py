"""The mixture-of-experts block: route, dispatch, compute, combine.

Shapes: B rows, S positions, T = B*S tokens, D model width, F expert width, E experts, K experts
per token. With expert parallelism a device sees the tokens of its group and holds E/n experts
(`olmoe_jax.ops.expert_parallel`).
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from olmoe_jax.model.config import ModelConfig, ModelSettings
from olmoe_jax.model.lora import Adapters, adapted, dropout
from olmoe_jax.model.parameters import weight
from olmoe_jax.model.tuned import LayerTunedExperts
from olmoe_jax.ops import decoding
from olmoe_jax.ops.expert_parallel import on_devices, own_experts
from olmoe_jax.ops.grouped_matmul import InStack
from olmoe_jax.ops.linear import ExpertWeights, grouped_linear
from olmoe_jax.ops.remat import keep
from olmoe_jax.ops.router_gradient import dense_router_term
from olmoe_jax.ops.routing import (
    RouterStatistics,
    combine,
    dispatch,
    permute,
    route,
    router_statistics,
    sort_by_expert,
)
from olmoe_jax.parallel import sharding


class AllLayers(NamedTuple):
    """The experts of all layers, stacked, and the number of one layer, to be read in place."""

    experts: ExpertWeights  # gate, up [L, E, D, F], down [L, E, F, D]
    layer: int | jax.Array


class Experts(nnx.Module):
    """E SwiGLU networks: W_down (silu(W_gate x) * W_up x), each matrix perhaps with an adapter."""

    def __init__(self, config: ModelConfig, settings: ModelSettings, *, rngs: nnx.Rngs):
        std = config.initializer_range
        inward = {
            "layer": config.num_layers,
            "expert": config.num_experts,
            "embed": config.hidden_size,
            "mlp": config.intermediate_size,
        }
        outward = {axis: inward[axis] for axis in ("layer", "expert", "mlp", "embed")}
        self.gate = weight(rngs, inward, std)
        self.up = weight(rngs, inward, std)
        self.down = weight(rngs, outward, std)
        matrices = {"gate": inward, "up": inward, "down": outward}
        self.lora = Adapters(settings.lora, matrices, rngs) if settings.lora else None

    def weights(
        self,
        settings: ModelSettings,
        tuned: LayerTunedExperts | None = None,
        stacked: AllLayers | None = None,
    ) -> ExpertWeights:
        """Returns one layer's matrices in the compute dtype, sharded as the parameters are."""
        maps = []
        for name in ExpertWeights._fields:
            map_ = adapted(getattr(self, name)[...], self.lora, name, settings)
            if tuned is not None:
                map_ = dataclasses.replace(map_, tuned=getattr(tuned, name), indices=tuned.indices)
            if stacked is not None:
                whole = getattr(stacked.experts, name)
                stack = InStack(whole.weight, jnp.asarray(stacked.layer))
                map_ = dataclasses.replace(map_, stack=stack, sums=whole.sums)
            maps.append(map_)
        return ExpertWeights(*maps)

    def specs(
        self,
        settings: ModelSettings,
        mesh: jax.sharding.AbstractMesh,
        tuned: LayerTunedExperts | None,
    ) -> ExpertWeights:
        """Returns the partition spec of each array of `weights`."""
        shapes = jax.eval_shape(lambda: self.weights(settings, tuned))

        def spec(path: tuple, shape: jax.ShapeDtypeStruct) -> P:
            name, part = path[0].name, path[1].name
            if part == "indices":
                return P()
            axes = getattr(self, name).get_metadata("axes")[1:]
            if part == "tuned":
                axes = ("tuned", *axes[1:])
            elif part != "weight":
                axes = getattr(self.lora, f"{name}_{part}").get_metadata("axes")[1:]
            return sharding.partition_spec(shape.shape, axes, mesh)

        return jax.tree_util.tree_map_with_path(spec, shapes)


class MoE(nnx.Module):
    """Router and experts; every token is processed by its K most probable experts, none dropped."""

    def __init__(self, config: ModelConfig, settings: ModelSettings, *, rngs: nnx.Rngs):
        self.config = config
        self.settings = settings
        self.router = weight(
            rngs,
            {"layer": config.num_layers, "embed": config.hidden_size, "router": config.num_experts},
            config.initializer_range,
        )
        self.experts = Experts(config, settings, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        is_token: jax.Array,
        dropout_keys: jax.Array | None = None,
        tuned: LayerTunedExperts | None = None,
        with_logits: bool = False,
        decode_experts: AllLayers | None = None,
        stacked_experts: AllLayers | None = None,
    ) -> tuple[jax.Array, RouterStatistics]:
        """Runs one layer's block.

        Args:
          x: [B, S, D].
          is_token: [B, S] bool; False: padding, routed nowhere.
          dropout_keys: [B] random keys of the adapters' dropout; None: no dropout.
          tuned: tuned experts, which equal experts of this module and get their gradients.
          with_logits: whether the statistics hold the router's logits.
          decode_experts: the experts that a decode step reads, instead of this module's.
          stacked_experts: this module's experts among those of all layers, where loops over
            experts read them and add their gradients.

        Returns:
          [B, S, D] and the router's statistics.
        """
        router = self.router[...].astype(jnp.float32)
        if decode_experts:
            experts = decode_experts.experts
        else:
            experts = self.experts.weights(self.settings, tuned, stacked_experts)
        block = functools.partial(
            moe_block,
            self.config,
            self.settings,
            with_logits=with_logits,
            layer=decode_experts.layer if decode_experts else None,
        )
        if (mesh := sharding.active_mesh()) is None:
            return block(x, is_token, dropout_keys, router, experts)
        specs = self.experts.specs(self.settings, mesh, tuned)
        if decode_experts:
            specs = jax.tree.map(lambda spec: P(None, *spec), specs)
        run = on_devices(block, specs, self._token_axes(mesh, x.shape[1]))
        return run(x, is_token, dropout_keys, router, experts)

    def _token_axes(self, mesh: jax.sharding.AbstractMesh, positions: int) -> tuple[str, ...]:
        """Returns the mesh axes along which tokens travel to the experts, not weights to tokens."""
        sharding.check_experts(mesh.shape[sharding.EXPERT], self.config.num_experts)
        if positions == 1:
            # A decode step's tokens are fewer bytes than any weights.
            return sharding.expert_axes(self.config.num_experts, mesh)
        return (sharding.EXPERT,) if mesh.shape[sharding.EXPERT] > 1 else ()


def moe_block(
    config: ModelConfig,
    settings: ModelSettings,
    x: jax.Array,
    is_token: jax.Array,
    dropout_keys: jax.Array | None,
    router: jax.Array,
    experts: ExpertWeights,
    first_expert: jax.Array | int = 0,
    *,
    with_logits: bool = False,
    layer: int | jax.Array | None = None,
) -> tuple[jax.Array, RouterStatistics]:
    """Runs the block on one device, with the experts that the device has at hand.

    Args:
      config: the architecture.
      settings: how to compute; says how the router learns.
      x: [B, S, D].
      is_token: [B, S] bool.
      dropout_keys: [B] random keys; None: no dropout.
      router: [D, E] float32.
      experts: consecutive experts; other experts' tokens get zeros from this device.
      first_expert: the number of the first of them.
      with_logits: whether the statistics hold the router's logits.
      layer: the experts are those of all layers, and this is the layer to read (a decode step,
        whose statistics hold no logits).

    Returns:
      [B, S, D] and the router's statistics of these tokens.
    """
    num_own, num_chosen = experts.gate.weight.shape[-3], config.num_experts_per_token
    tokens, is_token = x.reshape(-1, x.shape[-1]), is_token.reshape(-1)  # [T, D], [T]

    with jax.named_scope("route"):
        if not settings.router_trains:
            # On the weight, not on the logits: x still gets its gradient through the router. A
            # run's step does not differentiate this weight at all; other callers may.
            router = jax.lax.stop_gradient(router)
        routing = route(tokens, router, is_token, num_chosen, config.norm_topk_prob)
        own = own_experts(routing.chosen, first_expert, num_own)  # [T, K]
    if layer is not None:
        y = decoding.experts(tokens, routing.weights, own, experts, layer, config.num_experts)
        return y.reshape(x.shape), router_statistics(routing, is_token)

    with jax.named_scope("dispatch"):
        order, inverse, group_sizes = map(keep, sort_by_expert(own, num_own))
        rows = dispatch(tokens, order, inverse, num_chosen)  # [T*K, D]
        # One draw per token serves gate and up and all its experts; PEFT draws for each.
        dropped = dropout(x, dropout_keys, settings.lora, "gate").reshape(tokens.shape)
        dropped_rows = dispatch(dropped, order, inverse, num_chosen)
        # The weights multiply what goes into `down`, not what comes out: then no gradient needs
        # the output of `down`, which is neither kept nor recomputed.
        row_weights = permute(routing.weights.reshape(-1, 1), order, inverse)  # [T*K, 1]

    with jax.named_scope("compute"):
        backend = settings.grouped_matmul
        gate = keep(grouped_linear(rows, experts.gate, dropped_rows, group_sizes, backend))
        up = keep(grouped_linear(rows, experts.up, dropped_rows, group_sizes, backend))
        hidden = _weighted_swiglu(gate, up, row_weights)  # [T*K, F]
        dropped_hidden = hidden
        if dropout_keys is not None:
            # Drawn in the tokens' order, which no routing changes: `inverse` undoes the sorting.
            by_token = permute(hidden, inverse, order).reshape(len(x), -1, hidden.shape[1])
            by_token = dropout(by_token, dropout_keys, settings.lora, "down")
            dropped_hidden = permute(by_token.reshape(hidden.shape), order, inverse)
        outputs = grouped_linear(hidden, experts.down, dropped_hidden, group_sizes, backend)

    with jax.named_scope("combine"):
        y = combine(outputs, order, inverse, num_chosen)  # [T*K, D] -> [T, D]
        if settings.dense_router_gradient:
            y = y + dense_router_term(
                tokens,
                routing,
                is_token,
                experts,
                first_expert,
                normalize=config.norm_topk_prob,
                router_gradient_experts=settings.router_gradient_experts,
                dtype=settings.router_gradient_dtype,
                backend=backend,
            )

    statistics = router_statistics(routing, is_token)
    if with_logits:
        statistics = statistics._replace(logits=routing.logits.reshape(*x.shape[:-1], -1))
    return y.reshape(x.shape), statistics


@functools.partial(jax.checkpoint, prevent_cse=False)
def _weighted_swiglu(gate: jax.Array, up: jax.Array, row_weights: jax.Array) -> jax.Array:
    """Returns silu(gate) * up * row_weights in gate's dtype.

    The backward computes it again from gate and up, even if `remat` keeps all else: differentiation
    would keep four more arrays of this size for each layer.
    """
    return (jax.nn.silu(gate) * up * row_weights).astype(gate.dtype)
