"""Experts on the few tokens of a decode step: only the weights of experts in use are read.

Shapes: T tokens, K experts per token, E experts, L layers, D width, F expert width.

The weights are those of all layers, and a matrix is sliced out where it is used: a scan over layers
would first copy all experts of the layer, more than a step needs to read. No gradients.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from olmoe_jax.ops.projection import Projection, project
from olmoe_jax.ops.routing import from_experts, sort_by_expert

_LARGEST_BLOCK = 32


def decoding_backend(platform: str, tokens: int, per_token: int, experts: int) -> str | None:
    """How a decode step runs its experts.

    "loop" on CPUs: it reads the weights of the experts in use once, however many tokens there are.
    On GPUs and TPUs, where each turn of a loop is a launch, "gather" while the tokens' experts are
    at most half of all (it reads, writes and reads); None: as in training, by the grouped matmul.
    """
    if platform == "cpu":
        return "loop"
    return "gather" if 2 * tokens * per_token <= experts else None


def experts_by_loop(x, weights, chosen, experts, layer) -> jax.Array:
    """The sum over each token's experts: a loop over the experts in use, then over their rows.

    Args:
      x: [T, D].
      weights: [T, K] float32, of the experts.
      chosen: [T, K] int32 in 0…E; E: none.
      experts: (gate, up, down), `Projection`s of [L, E, …] each.
      layer: [] int32.

    Returns:
      [T, D] in x's dtype.
    """
    count, per_token = experts[0].weight.shape[1], chosen.shape[1]
    order, inverse, sizes = sort_by_expert(chosen, count)
    ends, assigned = jnp.cumsum(sizes), chosen.size
    used = jnp.argsort(sizes == 0, stable=True)
    mean = max(1, assigned // count)
    size = min(_LARGEST_BLOCK, 2 ** math.ceil(math.log2(mean)))
    rows = jnp.pad(x[order // per_token], ((0, size), (0, 0)))
    row_weights = jnp.pad(weights.reshape(-1)[order], (0, size))[:, None]

    def one_expert(turn, out):
        expert = used[turn]
        gate, up, down = (_matrix(part, layer, expert) for part in experts)
        first = ends[expert] - sizes[expert]

        def one_block(index, out):
            start = first + index * size
            block = jax.lax.dynamic_slice_in_dim(rows, start, size)
            scale = jax.lax.dynamic_slice_in_dim(row_weights, start, size)
            hidden = jax.nn.silu(project(block, gate, block)) * project(block, up, block)
            hidden = (hidden * scale).astype(x.dtype)
            # Rows of later experts are written again when their expert comes.
            return jax.lax.dynamic_update_slice_in_dim(
                out, project(hidden, down, hidden), start, axis=0
            )

        return jax.lax.fori_loop(0, (sizes[expert] + size - 1) // size, one_block, out)

    out = jnp.zeros((assigned + size, x.shape[1]), x.dtype)
    out = jax.lax.fori_loop(0, jnp.sum(sizes > 0), one_expert, out)[:assigned]
    out = jnp.where(jnp.arange(assigned)[:, None] < ends[-1], out, 0)
    return from_experts(out, order, inverse, per_token)


def experts_by_gather(x, weights, chosen, experts, layer) -> jax.Array:
    """As `experts_by_loop`: every token's K experts side by side, as one batched matmul."""
    gate, up, down = (_matrix(part, layer, chosen) for part in experts)  # [T, K, …]
    rows = x[:, None, None]
    hidden = jax.nn.silu(project(rows, gate, rows)) * project(rows, up, rows)
    weights = jnp.where(chosen < experts[0].weight.shape[1], weights, 0)
    hidden = (hidden * weights[:, :, None, None]).astype(x.dtype)
    out = project(hidden, down, hidden)[:, :, 0]
    return jnp.sum(out, axis=1, dtype=jnp.float32).astype(x.dtype)


def _matrix(stacked: Projection, layer, expert) -> Projection:
    """The projection of one layer's expert, or experts."""

    def take(matrix):
        # What is chosen by nobody has index E, the last one's here.
        return None if matrix is None else matrix.at[layer, expert].get(mode="clip")

    return dataclasses.replace(
        stacked, weight=take(stacked.weight), a=take(stacked.a), b=take(stacked.b)
    )
