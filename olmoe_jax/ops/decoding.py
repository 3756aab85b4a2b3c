"""Experts on the few tokens of a decode step: only the weights of experts in use are read.

Shapes: T tokens, K experts per token, E experts, L layers, D width, F expert width.

The weights are those of all layers, and a matrix is sliced out where it is used: a scan over layers
would first copy all experts of the layer, more than a step needs to read. No gradients.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from olmoe_jax.ops.projection import Projection, project
from olmoe_jax.ops.routing import sort_by_expert

_LARGEST_BLOCK = 32
_TURN_BYTES = 2**19


def decoding_backend(platform: str, tokens: int, per_token: int, experts: int) -> str | None:
    """How a decode step runs its experts.

    "loop" on CPUs: it reads the weights of the experts in use once, however many tokens there are.
    On GPUs and TPUs, where each turn of a loop is a launch, "gather" while the tokens' experts are
    at most half of all (it reads, writes and reads); None: as in training, by the grouped matmul.
    """
    if platform == "cpu":
        return "loop"
    return "gather" if 2 * tokens * per_token <= experts else None


def experts_by_loop(x, weights, chosen, experts, layer, devices: int = 1) -> jax.Array:
    """The sum over each token's experts: a loop over blocks of rows, each of one expert.

    A turn takes several blocks, so that both the copying of their matrices and their matmuls are
    large enough to be shared by a CPU's cores.

    Args:
      x: [T, D].
      weights: [T, K] float32, of the experts.
      chosen: [T, K] int32 in 0…E; E: none.
      experts: (gate, up, down), `Projection`s of [L, E, …] each.
      layer: which of the L.
      devices: that share the tokens' experts, these E being one's part.

    Returns:
      [T, D] in x's dtype.
    """
    per_turn = max(1, _TURN_BYTES // experts[0].weight[0, 0].nbytes)
    num_experts = experts[0].weight.shape[1]
    mean = chosen.size / num_experts / devices
    blocks = _blocks(chosen, num_experts, mean, per_turn)
    weights = weights.reshape(-1).at[blocks.assignment].get(mode="fill", fill_value=0)[..., None]
    token = blocks.assignment // chosen.shape[1]

    def one_turn(turn, out):
        def of_turn(values):
            return jax.lax.dynamic_slice_in_dim(values, turn * per_turn, per_turn)

        gate, up, down = (_matrix(part, layer, of_turn(blocks.expert)) for part in experts)
        rows = x.at[of_turn(token)].get(mode="clip")
        hidden = jax.nn.silu(project(rows, gate, rows)) * project(rows, up, rows)
        hidden = (hidden * of_turn(weights)).astype(x.dtype)
        rows = project(hidden, down, hidden)
        return jax.lax.dynamic_update_slice_in_dim(out, rows, turn * per_turn, axis=0)

    out = jnp.zeros((*blocks.assignment.shape, x.shape[1]), x.dtype)
    out = jax.lax.fori_loop(0, -(-blocks.count // per_turn), one_turn, out)
    out = out.reshape(-1, x.shape[1]).at[blocks.row].get(mode="fill", fill_value=0)
    return jnp.sum(out, axis=1, dtype=jnp.float32).astype(x.dtype)


class _Blocks(NamedTuple):
    """The T*K assignments in U blocks of up to M rows of one expert each."""

    count: jax.Array  # [] int32: blocks that are not empty, the first ones
    expert: jax.Array  # [U] int32
    assignment: jax.Array  # [U, M] int32: which (token*K + k) a row is; T*K: none
    row: jax.Array  # [T, K] int32: the row of U*M that an assignment is; U*M: none


def _blocks(chosen: jax.Array, num_experts: int, mean: float, multiple: int) -> _Blocks:
    """Blocks of twice the mean number of an expert's rows; U is a multiple of `multiple`."""
    assigned = chosen.size
    size = min(_LARGEST_BLOCK, 2 ** math.ceil(math.log2(max(1, 2 * mean))))
    most = min(assigned, num_experts) + assigned // size
    most = -(-most // multiple) * multiple
    order, inverse, rows = sort_by_expert(chosen, num_experts)
    of_expert = (rows + size - 1) // size
    ends = jnp.cumsum(of_expert)
    block = jnp.arange(most)
    expert = jnp.sum(block[:, None] >= ends, axis=1)
    ends, first = (jnp.append(values, most) for values in (ends, ends - of_expert))
    starts = jnp.append(jnp.cumsum(rows) - rows, assigned)
    # Row i of an expert's blocks is row i of its sorted rows.
    place = (block - first[expert])[:, None] * size + jnp.arange(size)
    is_row = place < jnp.append(rows, 0)[expert][:, None]
    place = jnp.where(is_row, starts[expert][:, None] + place, assigned)
    assignment = order.at[place].get(mode="fill", fill_value=assigned)
    flat = chosen.reshape(-1)
    row = first[flat] * size + inverse - starts[flat]
    row = jnp.where(flat < num_experts, row, most * size).reshape(chosen.shape)
    return _Blocks(ends[-2], expert, assignment, row)


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
