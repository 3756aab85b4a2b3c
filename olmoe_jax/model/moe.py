"""The mixture-of-experts block and its router statistics.

Shapes: B rows, S positions, T = B*S tokens, D model width, F expert width, E experts, K experts
per token.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from olmoe_jax.model.config import ModelConfig, ModelSettings
from olmoe_jax.model.lora import TARGETS, Adapters, dropout, projection
from olmoe_jax.model.parameters import matrix
from olmoe_jax.model.tuned import LayerTunedExperts
from olmoe_jax.ops.decoding import decoding_backend, experts_by_gather, experts_by_loop
from olmoe_jax.ops.expert_parallel import ExpertGroup
from olmoe_jax.ops.projection import grouped_project
from olmoe_jax.ops.remat import keep
from olmoe_jax.ops.router_gradient import ExpertProjections, router_gradient
from olmoe_jax.ops.routing import from_experts, permute, sort_by_expert, to_experts
from olmoe_jax.parallel import sharding


class RouterStatistics(NamedTuple):
    """Sums over the real (unpadded) tokens of a batch; stacked [L, …] for a whole model."""

    load: jax.Array  # [E] float32: tokens that selected the expert
    probability: jax.Array  # [E] float32: sum of the router's probabilities
    entropy: jax.Array  # [] float32: sum of the entropies (nats) of the probabilities
    logits: jax.Array | None  # [B, S, E] float32, only on request


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
        self.gate = matrix(rngs, inward, std)
        self.up = matrix(rngs, inward, std)
        self.down = matrix(rngs, outward, std)
        matrices = {"gate": inward, "up": inward, "down": outward}
        self.lora = Adapters(settings.lora, matrices, rngs) if settings.lora else None

    def projections(self, settings: ModelSettings) -> ExpertProjections:
        """One layer's matrices in the compute dtype, as they are sharded."""
        return ExpertProjections(
            *(
                projection(
                    getattr(self, name)[...], self.lora, name, settings.lora, settings.compute_dtype
                )
                for name in ExpertProjections._fields
            )
        )

    def specs(self, settings: ModelSettings, mesh, tuned: LayerTunedExperts | None):
        """The partition specs of `projections` with the tuned, leaf by leaf."""
        shapes = jax.eval_shape(lambda: with_tuned_experts(self.projections(settings), tuned))

        def spec(path, shape):
            name, part = path[0].name, path[1].name
            if part == "indices":
                return P()
            parameter = getattr(self, name)
            axes = parameter.get_metadata("axes")[1:]
            if part == "tuned":
                axes = ("tuned", *axes[1:])
            elif part != "weight":
                axes = getattr(self.lora, f"{name}_{part}").get_metadata("axes")[1:]
            return sharding.partition_spec(shape.shape, axes, mesh)

        return jax.tree_util.tree_map_with_path(spec, shapes)


def with_tuned_experts(
    experts: ExpertProjections, tuned: LayerTunedExperts | None
) -> ExpertProjections:
    """The experts' projections with the selected experts in the place of theirs."""
    if tuned is None:
        return experts
    return ExpertProjections(
        *(
            dataclasses.replace(
                getattr(experts, name),
                tuned=getattr(tuned, name),
                indices=tuned.indices,
            )
            for name in ExpertProjections._fields
        )
    )


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
        self.experts = Experts(config, settings, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        is_token: jax.Array,
        dropout_keys: jax.Array | None = None,
        tuned: LayerTunedExperts | None = None,
        with_logits: bool = False,
    ) -> tuple[jax.Array, RouterStatistics]:
        """One layer's block.

        Args:
          x: [B, S, D].
          is_token: [B, S] bool; False: padding, routed nowhere.
          dropout_keys: [B] random keys of the adapters' dropout; None: no dropout.
          tuned: experts that replace some of this module's.
          with_logits: whether the statistics hold the router's logits.

        Returns:
          [B, S, D] and the router's statistics.
        """
        router = self.router[...].astype(jnp.float32)
        experts = with_tuned_experts(self.experts.projections(self.settings), tuned)
        mesh = sharding.active_mesh()
        if mesh is None:
            group = ExpertGroup()
            return self._local(x, is_token, dropout_keys, router, experts, with_logits, group)
        specs = self.experts.specs(self.settings, mesh, tuned)
        sharding.check_experts(mesh.shape[sharding.EXPERT], self.config.num_experts)
        group = ExpertGroup()
        if x.shape[1] == 1:  # a decode step, where fewer bytes of tokens than of weights travel
            group = self._decoding_group()
        elif mesh.shape[sharding.EXPERT] > 1 and self.settings.expert_exchange == "tokens":
            group = ExpertGroup((sharding.EXPERT,))

        def on_device(x, is_token, dropout_keys, router, experts):
            experts = jax.tree.map(functools.partial(_all_gather, apart=group.axes), experts, specs)
            experts = _of_group(experts, group, self.config.num_experts)
            y, statistics = self._local(
                x, is_token, dropout_keys, router, experts, with_logits, group
            )
            summed = jax.tree.map(
                lambda value: jax.lax.psum(value, sharding.AXES), statistics._replace(logits=None)
            )
            return y, summed._replace(logits=statistics.logits)

        batch = sharding.BATCH
        out = RouterStatistics(P(), P(), P(), batch if with_logits else None)
        return jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(batch, batch, None if dropout_keys is None else batch, P(), specs),
            out_specs=(batch, out),
            check_vma=False,
        )(
            x,
            is_token,
            dropout_keys,
            *jax.tree.map(sharding.by_value, (router, experts)),
        )

    def decoding_experts(self, tokens: int) -> ExpertProjections | None:
        """All layers' experts where `decode` is the way for this many tokens, else None."""
        if self._decoding_backend(tokens) is None:
            return None
        return self.experts.projections(self.settings)

    def decode(
        self, x: jax.Array, is_token: jax.Array, experts: ExpertProjections, layer: int
    ) -> jax.Array:
        """The block for x [B, 1, D], reading only the experts in use of all layers' `experts`.

        Under a mesh each device reads of those that lie there, for all tokens of its group.
        """
        backend, group = self._decoding_backend(len(x)), self._decoding_group()

        def on_device(x, is_token, router, experts, layer):
            shape, x = x.shape, x[:, 0]
            # By every device for all tokens of the group, so that x is all that travels.
            logits = jnp.dot(x.astype(jnp.float32), router, precision=jax.lax.Precision.HIGHEST)
            weights, chosen = self._choose(jax.nn.softmax(logits), is_token)
            chosen = group.own(chosen, self.config.num_experts)
            if backend == "gather":
                y = experts_by_gather(x, weights, chosen, experts, layer)
            else:
                y = experts_by_loop(x, weights, chosen, experts, layer, group.size)
            if group.axes:
                # In the order of the batch, which is not that of the experts.
                axes = tuple(axis for axis in sharding.AXES if axis in group.axes)
                y = jax.lax.psum_scatter(y, axes, tiled=True)
            return y.reshape(-1, *shape[1:])

        mesh, of_group = sharding.active_mesh(), P(sharding.AXES[0])
        if mesh is not None:
            specs = self.experts.specs(self.settings, mesh, None)
            specs = jax.tree.map(lambda spec: P(None, *spec), specs)
            on_device = jax.shard_map(
                on_device,
                mesh=mesh,
                in_specs=(of_group, of_group, P(), specs, P()),
                out_specs=sharding.BATCH,
                check_vma=False,
            )
        return on_device(x, is_token, self.router[...].astype(jnp.float32), experts, layer)

    def _decoding_group(self) -> ExpertGroup:
        """Who shares the experts while few tokens are decoded: they travel, never the weights."""
        mesh = sharding.active_mesh()
        axes = () if mesh is None else sharding.expert_axes(self.config.num_experts, mesh)
        return ExpertGroup(axes)

    def _decoding_backend(self, tokens: int) -> str | None:
        """Of this many tokens of all devices; None too where more than the experts are split."""
        config, mesh, experts = self.config, sharding.active_mesh(), self.config.num_experts
        if mesh is not None:
            split = math.prod(mesh.shape[axis] for axis in self._decoding_group().axes)
            if split * mesh.shape["data"] != mesh.size:
                return None
            tokens, experts = tokens // mesh.shape["data"], experts // split
        backend = jax.default_backend()
        return decoding_backend(backend, tokens, config.num_experts_per_token, experts)

    def _choose(self, probabilities: jax.Array, is_token: jax.Array):
        """The K most probable experts' weights and numbers [T, K]; E for what is no token."""
        weights, chosen = jax.lax.top_k(probabilities, self.config.num_experts_per_token)
        if self.config.norm_topk_prob:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        return weights, jnp.where(is_token.reshape(-1, 1), chosen, self.config.num_experts)

    def _local(self, x, is_token, dropout_keys, router, experts, with_logits, group):
        """The block on the tokens of one device, with all experts at hand or in its group."""
        config, shape = self.config, x.shape
        in_group, dropout_keys = group.gather(x), group.gather(dropout_keys)
        dropped = self._dropped(in_group, dropout_keys, "gate").reshape(-1, shape[-1])
        in_group = in_group.reshape(-1, shape[-1])
        x, is_token = x.reshape(-1, shape[-1]), is_token.reshape(-1)
        with jax.named_scope("router"):
            if self.settings.router_method == "frozen":
                router = jax.lax.stop_gradient(router)
            logits = keep(
                jnp.dot(x.astype(jnp.float32), router, precision=jax.lax.Precision.HIGHEST)
            )
            probabilities = jax.nn.softmax(logits, axis=-1)
            weights, chosen = self._choose(probabilities, is_token)
        with jax.named_scope("experts"):
            own = group.own(group.gather(chosen), config.num_experts)
            y = self._run_experts(
                in_group, dropped, group.gather(weights), own, experts, dropout_keys
            )
        if self.settings.router_method == "densemixer":
            y = y + self._dense_router_term(
                in_group, probabilities, chosen, is_token, experts, group
            )
        y = group.scatter_sum(y)
        load = jnp.bincount(chosen.reshape(-1), length=config.num_experts + 1)[:-1]
        statistics = RouterStatistics(
            load=load.astype(jnp.float32),
            probability=jnp.sum(probabilities * is_token[:, None], axis=0),
            entropy=-jnp.sum(jax.nn.log_softmax(logits) * probabilities * is_token[:, None]),
            logits=logits.reshape(*shape[:-1], -1) if with_logits else None,
        )
        return y.reshape(shape), statistics

    def _dropped(self, x: jax.Array, keys: jax.Array | None, target: str) -> jax.Array:
        """x [B, ...] as the adapters of `target` see it."""
        rate = self.settings.lora.dropout if self.settings.lora else 0.0
        return dropout(x, keys, rate, TARGETS.index(target))

    def _run_experts(self, x, dropped, weights, chosen, experts, dropout_keys):
        """The weighted sum of the chosen experts' outputs; experts beyond the given ones give 0."""
        per_token, backend = chosen.shape[1], self.settings.grouped_matmul
        num_experts = experts.gate.weight.shape[0]
        order, inverse, group_sizes = map(keep, sort_by_expert(chosen, num_experts))
        rows = to_experts(x, order, inverse, per_token)
        # One draw per token serves gate and up and all its experts; PEFT draws for each.
        low_rows = to_experts(dropped, order, inverse, per_token)
        gate, up = (
            keep(grouped_project(rows, part, low_rows, group_sizes, backend))
            for part in (experts.gate, experts.up)
        )
        hidden = jax.nn.silu(gate) * up
        # The weights multiply what goes into `down`, not what comes out: then no gradient needs its
        # output, which is neither kept nor recomputed.
        weights = permute(weights.reshape(-1, 1), order, inverse)
        hidden = (hidden * weights).astype(x.dtype)
        low_hidden = hidden
        if dropout_keys is not None:
            # Drawn in the order of the tokens, which sorting does not change.
            by_row = permute(hidden, inverse, order).reshape(len(dropout_keys), -1, hidden.shape[1])
            low_hidden = self._dropped(by_row, dropout_keys, "down").reshape(hidden.shape)
            low_hidden = permute(low_hidden, order, inverse)
        rows = grouped_project(hidden, experts.down, low_hidden, group_sizes, backend)
        return from_experts(rows, order, inverse, per_token)

    def _dense_router_term(self, x, probabilities, chosen, is_token, experts, group):
        """Zeros that carry the router gradient of the experts that were not selected.

        x and the zeros: the group's tokens; the rest: those of this device.
        """
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
        settings = self.settings
        return router_gradient(
            limit,
            settings.router_gradient_dtype,
            settings.grouped_matmul,
            group.by_expert(unselected),
            x,
            experts,
            group.own(group.gather(candidates), config.num_experts),
        )


def _of_group(
    experts: ExpertProjections, group: ExpertGroup, num_experts: int
) -> ExpertProjections:
    """The projections of a device's own experts, among which the selected ones are looked for."""
    if experts.gate.indices is None:
        return experts
    indices = group.own(experts.gate.indices, num_experts)
    return ExpertProjections(*(dataclasses.replace(part, indices=indices) for part in experts))


def _all_gather(weight: jax.Array, spec: P, apart: tuple[str, ...]) -> jax.Array:
    """Joins a weight's shards; transposed, it sums and scatters the gradient.

    Along the mesh axes `apart` the experts, a weight's first dimension, are not joined.
    """
    for dimension, entry in enumerate(spec):
        axes = [axis for axis in sharding.mesh_axes(entry) if dimension or axis not in apart]
        if axes:
            weight = jax.lax.all_gather(weight, tuple(axes), axis=dimension, tiled=True)
    return weight
