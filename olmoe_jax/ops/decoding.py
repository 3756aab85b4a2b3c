"""Matmuls of the few rows of a decode step; of the experts only those in use are read.

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
_STREAMS = 4
"""Rows a turn; with 8, a block of 8 rows is slower (measured on an AMD EPYC)."""
_PART_BYTES = 2**17
"""Of matrices: what a core's cache holds beside what is being read."""


def decoding_backend(platform: str, tokens: int, per_token: int, experts: int) -> str | None:
    """How a decode step runs its experts.

    "loop" on CPUs: it reads the weights of the experts in use once, however many tokens there are.
    On GPUs and TPUs, where each turn of a loop is a launch, "gather" while the tokens' experts are
    at most half of all (it reads, writes and reads); None: as in training, by the grouped matmul.
    """
    if platform == "cpu":
        return "loop"
    return "gather" if 2 * tokens * per_token <= experts else None


def matmul_by_rows(x: jax.Array, matrices: jax.Array, *index) -> jax.Array:
    """x @ matrices[index] for few rows of x, on a CPU.

    There XLA's matmul reads a matrix that lies in no cache at half the speed of memory, or less.
    Here a loop adds the outer products of a few rows of the matrix at a time. They lie far apart:
    a core fetches several streams of addresses ahead faster than one.

    Args:
      x: [..., D].
      matrices: [..., D, F].
      index: an int32 for each leading dimension of `matrices`.

    Returns:
      [..., F] in x's dtype, summed in float32.
    """
    *_, width, out = matrices.shape
    streams = math.gcd(_STREAMS, width)
    apart = width // streams

    def add_rows(turn, y):
        for first in range(0, width, apart):
            start = *index, first + turn, 0
            row = jax.lax.dynamic_slice(matrices, start, (*(1 for _ in index), 1, out))
            column = jax.lax.dynamic_slice_in_dim(x, first + turn, 1, axis=-1)
            y += column.astype(jnp.float32) * row.reshape(out).astype(jnp.float32)
        return y

    zeros = jnp.zeros((*x.shape[:-1], out), jnp.float32)
    return jax.lax.fori_loop(0, apart, add_rows, zeros).astype(x.dtype)


def transposed_matmul_in_parts(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """As `matmul_by_rows`: x [T, D] @ matrix [F, D]^T -> [T, F] float32.

    Some rows of the matrix are copied at a time, into the cache.
    """
    by_part = matrix.reshape(-1, _rows_of_part(matrix), matrix.shape[1])

    def product(rows):
        # In this order: XLA's matmul of few rows and a transposed matrix takes twice as long.
        return jnp.einsum("fd,td->ft", rows, x, preferred_element_type=jnp.float32)

    return jax.lax.map(product, by_part).reshape(-1, len(x)).T


def _rows_of_part(matrix: jax.Array) -> int:
    """Rows of a matrix [F, D] that are a part; they divide F."""
    rows = len(matrix)
    parts = min(rows, -(-matrix.nbytes // _PART_BYTES))
    while rows % parts:
        parts += 1
    return rows // parts


def experts_by_loop(x, weights, chosen, experts, layer, devices: int = 1) -> jax.Array:
    """The sum over each token's experts: a loop over blocks of rows, each of one expert.

    A turn takes several blocks where their matrices are small, since each turn has its cost.

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
    _, num_experts, *matrix = experts[0].weight.shape
    in_part = _PART_BYTES // (math.prod(matrix) * experts[0].weight.dtype.itemsize)
    per_turn = max(1, in_part)
    mean = chosen.size / num_experts / devices
    blocks = _blocks(chosen, num_experts, mean, per_turn)
    token = blocks.assignment // chosen.shape[1]
    weights = weights.reshape(-1).at[blocks.assignment].get(mode="fill", fill_value=0)
    # [U, T, M]: the rows of a block added up by token.
    combine = jnp.where(jnp.arange(len(x))[:, None] == token[:, None], weights[:, None], 0)

    def one_turn(turn, y):
        def of_turn(values):
            return jax.lax.dynamic_slice_in_dim(values, turn * per_turn, per_turn)

        expert = of_turn(blocks.expert)

        def by_expert(rows, part):
            def by_rows(rows, _):
                return matmul_by_rows(rows, part.weight, layer, expert[0])

            matmul = jnp.matmul if in_part else by_rows
            return project(rows, _matrix(part, layer, expert), rows, matmul)

        rows = x.at[of_turn(token)].get(mode="clip")
        hidden = jax.nn.silu(by_expert(rows, experts[0])) * by_expert(rows, experts[1])
        rows = by_expert(hidden, experts[2]).astype(jnp.float32)
        return y + jnp.einsum("utm,umd->td", of_turn(combine), rows)

    y = jnp.zeros(x.shape, jnp.float32)
    return jax.lax.fori_loop(0, -(-blocks.count // per_turn), one_turn, y).astype(x.dtype)


class _Blocks(NamedTuple):
    """The T*K assignments in U blocks of up to M rows of one expert each."""

    count: jax.Array  # [] int32: blocks that are not empty, the first ones
    expert: jax.Array  # [U] int32
    assignment: jax.Array  # [U, M] int32: which (token*K + k) a row is; T*K: none


def _blocks(chosen: jax.Array, num_experts: int, mean: float, multiple: int) -> _Blocks:
    """Blocks of twice the mean number of an expert's rows; U is a multiple of `multiple`."""
    assigned = chosen.size
    size = min(_LARGEST_BLOCK, 2 ** math.ceil(math.log2(max(1, 2 * mean))))
    most = min(assigned, num_experts) + assigned // size
    most = -(-most // multiple) * multiple
    order, _, rows = sort_by_expert(chosen, num_experts)
    of_expert = (rows + size - 1) // size
    ends = jnp.cumsum(of_expert)
    block = jnp.arange(most)
    expert = jnp.sum(block[:, None] >= ends, axis=1)
    first = jnp.append(ends - of_expert, 0)
    starts = jnp.append(jnp.cumsum(rows) - rows, assigned)
    # Row i of an expert's blocks is row i of its sorted rows.
    place = (block - first[expert])[:, None] * size + jnp.arange(size)
    is_row = place < jnp.append(rows, 0)[expert][:, None]
    place = jnp.where(is_row, starts[expert][:, None] + place, assigned)
    assignment = order.at[place].get(mode="fill", fill_value=assigned)
    # Those that only fill a turn: the last expert once more, no other matrix is read for them.
    return _Blocks(ends[-1], jnp.minimum(expert, expert[ends[-1] - 1]), assignment)


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
