"""Expert parallelism: runs the MoE block on every device, and moves what the devices exchange.

Every device holds a share of the experts. Experts and tokens meet in one of two ways:

- The weights travel (over `fsdp`): a device gathers all experts and processes its own tokens.
- The tokens travel (over `expert`, and in a decode step over both): the devices of a group share
  the experts. Each gets all tokens of the group, runs its own experts on them, and the outputs are
  summed where the tokens came from: an all-gather and a reduce-scatter, as in Megatron-LM's
  `--moe-token-dispatcher-type=allgather` (https://github.com/NVIDIA/Megatron-LM). Every device of a
  group routes all its tokens, which costs less than sending routing decisions. No buffer's size
  depends on the routing, so that no token is ever dropped.

Shapes: B rows, S positions, D model width, E experts, n devices of a group, E/n experts a device.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from olmoe_jax.ops.linear import ExpertWeights
from olmoe_jax.ops.routing import RouterStatistics
from olmoe_jax.parallel import sharding

Block = Callable[..., tuple[jax.Array, RouterStatistics]]
"""block(x, is_token, dropout_keys, router, experts, first_expert) -> y [B, S, D], statistics."""


def on_devices(
    block: Block, specs: ExpertWeights, group: tuple[str, ...]
) -> Callable[..., tuple[jax.Array, RouterStatistics]]:
    """Returns `block` for the whole mesh: the batch is split, router and experts are shared.

    The result takes the block's arguments, without `first_expert`.

    Args:
      block: computes x's part of the batch with consecutive experts, the first of which has the
        number `first_expert`; it gives zeros for tokens of other experts.
      specs: how the experts' arrays are sharded.
      group: the mesh axes along which tokens travel; (): the experts' weights are gathered.
    """
    mesh = sharding.active_mesh()
    batch: Any = sharding.BATCH
    # In the order of the batch, which need not be that of the experts.
    batch_axes = tuple(axis for axis in sharding.AXES if axis in group)
    elsewhere = tuple(axis for axis in sharding.AXES if axis not in group)

    def on_device(
        x: jax.Array,
        is_token: jax.Array,
        dropout_keys: jax.Array | None,
        router: jax.Array,
        experts: ExpertWeights,
    ) -> tuple[jax.Array, RouterStatistics]:
        experts = jax.tree.map(lambda w, spec: _gather_weight(w, spec, group), experts, specs)
        first: jax.Array | int = 0
        if group:
            first = jax.lax.axis_index(group) * experts.gate.weight.shape[-3]
            experts = _own_tuned(experts, first)
            x, is_token = (_gather_tokens(value, batch_axes) for value in (x, is_token))
            if dropout_keys is not None:
                dropout_keys = _gather_tokens(dropout_keys, batch_axes)
        y, statistics = block(x, is_token, dropout_keys, router, experts, first)
        logits = statistics.logits
        if group:
            y = jax.lax.psum_scatter(y, batch_axes, tiled=True)
            if logits is not None:
                own = jax.lax.axis_index(batch_axes) * len(y)
                logits = jax.lax.dynamic_slice_in_dim(logits, own, len(y))
        # A group's devices have the statistics of the same tokens: the sum is over the others.
        sums = statistics._replace(logits=None)
        if elsewhere:
            sums = jax.tree.map(lambda value: jax.lax.psum(value, elsewhere), sums)
        return y, sums._replace(logits=logits)

    def run(
        x: jax.Array,
        is_token: jax.Array,
        dropout_keys: jax.Array | None,
        router: jax.Array,
        experts: ExpertWeights,
    ) -> tuple[jax.Array, RouterStatistics]:
        # The spec of keys or logits that are None has nothing to apply to.
        sums: Any = P()
        return jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(batch, batch, batch, P(), specs),
            out_specs=(batch, RouterStatistics(sums, sums, sums, batch)),
            check_vma=False,
        )(x, is_token, dropout_keys, *jax.tree.map(sharding.by_value, (router, experts)))

    return run


def own_experts(chosen: jax.Array, first: jax.Array | int, count: int) -> jax.Array:
    """Renumbers experts 0…E as a device's own 0…count-1; `count` stands for others and for none."""
    local = chosen - first
    return jnp.where((local >= 0) & (local < count), local, count)


def _own_tuned(experts: ExpertWeights, first: jax.Array | int) -> ExpertWeights:
    """Renumbers the tuned experts as a device's own."""
    if experts.gate.indices is None:
        return experts
    indices = own_experts(experts.gate.indices, first, experts.gate.weight.shape[0])
    return ExpertWeights(*(dataclasses.replace(part, indices=indices) for part in experts))


def _gather_tokens(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Joins the group's tokens, or random keys, on each of its devices: [B, …] -> [n*B, …]."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        keys = _gather_tokens(jax.random.key_data(x), axes)
        return jax.random.wrap_key_data(keys, impl=jax.random.key_impl(x))
    return jax.lax.all_gather(x, axes, tiled=True)


def _gather_weight(weight: jax.Array, spec: P, group: tuple[str, ...]) -> jax.Array:
    """Joins the shards of a weight [..., E, D, F], and leaves its experts split over `group`.

    The transpose sums and scatters the gradient.
    """
    for dimension, entry in enumerate(spec):
        is_expert = dimension == weight.ndim - 3
        axes = sharding.mesh_axes(entry)
        axes = tuple(axis for axis in axes if not (is_expert and axis in group))
        if axes:
            weight = jax.lax.all_gather(weight, axes, axis=dimension, tiled=True)
    return weight
