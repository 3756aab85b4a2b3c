"""A decode step's matmuls: few rows, and weights that are read where they lie.

Shapes: T tokens, K experts per token, E experts, L layers, D model width, F expert width.

The experts' weights are those of all layers, and a matrix is sliced out where it is used: a scan
over layers would first copy all experts of the layer, more than a step needs to read. Everything
that differs between platforms is in this file. No function has gradients.
"""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from olmoe_jax.ops.linear import ExpertWeights, Linear, linear
from olmoe_jax.ops.routing import sort_by_expert
from olmoe_jax.parallel import sharding

_LARGEST_BLOCK = 32
_STREAMS = 4
"""Rows of a matrix added at a time; with 8, a block of 8 rows is slower (on an AMD EPYC)."""
_PART_BYTES = 2**17
"""Bytes of a matrix that a core's cache holds beside what the core is reading."""


def backend(
    platform: str, tokens: int, per_token: int, num_experts: int
) -> Literal["loop", "gather"] | None:
    """Returns how a decode step of `tokens` tokens runs its experts, or None: as training does.

    "loop" on CPUs: it reads the weights of the experts in use once, however many tokens there are.
    On GPUs and TPUs, where each turn of a loop is a launch, "gather" while the tokens' experts are
    at most half of all (it reads, writes and reads).
    """
    if platform == "cpu":
        return "loop"
    return "gather" if 2 * tokens * per_token <= num_experts else None


def reads_in_place(tokens: int, per_token: int, num_experts: int) -> bool:
    """Returns whether `experts` serves a decode step of `tokens` tokens over all devices.

    False too where a mesh axis splits the experts' arrays along anything but the experts.
    """
    mesh = sharding.active_mesh()
    if mesh is not None:
        axes = sharding.expert_axes(num_experts, mesh)
        split = math.prod(mesh.shape[axis] for axis in axes)
        if split * mesh.shape["data"] != mesh.size:
            return False
        tokens, num_experts = tokens // mesh.shape["data"], num_experts // split
    return backend(jax.default_backend(), tokens, per_token, num_experts) is not None


def experts(
    x: jax.Array,
    weights: jax.Array,
    chosen: jax.Array,
    maps: ExpertWeights,
    layer: int | jax.Array,
    total_experts: int,
) -> jax.Array:
    """Runs the chosen experts of one layer on few tokens; reads no other expert.

    Args:
      x: [T, D].
      weights: [T, K] float32, of the chosen experts.
      chosen: [T, K] int32 in 0…E; E: none.
      maps: of all layers: [L, E, …].
      layer: which of the L.
      total_experts: experts of all devices that share these tokens, E of them at hand.

    Returns:
      [T, D] in x's dtype, each token's weighted sum over its experts.
    """
    num_experts = maps.gate.weight.shape[1]
    if backend(jax.default_backend(), len(x), chosen.shape[1], num_experts) == "gather":
        return experts_by_gather(x, weights, chosen, maps, layer)
    return experts_by_loop(x, weights, chosen, maps, layer, total_experts // num_experts)


def matmul(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """Returns x [..., D] @ matrix [D, F] for the few rows of a decode step, in x's dtype."""
    return matmul_by_rows(x, matrix) if jax.default_backend() == "cpu" else jnp.matmul(x, matrix)


def head_matmul(x: jax.Array, head: jax.Array) -> jax.Array:
    """Returns x [T, D] @ head [V, D]^T for the few rows of a decode step, [T, V] float32."""
    if jax.default_backend() == "cpu":
        return transposed_matmul_in_parts(x, head)
    return jnp.einsum("td,vd->tv", x, head, preferred_element_type=jnp.float32)


def matmul_by_rows(x: jax.Array, matrices: jax.Array, *index: int | jax.Array) -> jax.Array:
    """Returns x @ matrices[index] for few rows of x, on a CPU.

    XLA's matmul reads a matrix that lies in no cache at half the speed of memory, or less. This
    loop adds the outer products of a few rows of the matrix at a time. The rows lie far apart: a
    core prefetches several streams of addresses faster than one.

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

    def add_rows(turn: jax.Array, y: jax.Array) -> jax.Array:
        for first in range(0, width, apart):
            start = *index, first + turn, 0
            row = jax.lax.dynamic_slice(matrices, start, (*(1 for _ in index), 1, out))
            column = jax.lax.dynamic_slice_in_dim(x, first + turn, 1, axis=-1)
            y += column.astype(jnp.float32) * row.reshape(out).astype(jnp.float32)
        return y

    zeros = jnp.zeros((*x.shape[:-1], out), jnp.float32)
    return jax.lax.fori_loop(0, apart, add_rows, zeros).astype(x.dtype)


def transposed_matmul_in_parts(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """Returns x [T, D] @ matrix [F, D]^T, [T, F] float32, for few rows of x, on a CPU.

    Copies some rows of the matrix into the cache at a time.
    """
    size = min(len(matrix), max(1, _PART_BYTES * len(matrix) // matrix.nbytes))
    whole = len(matrix) - len(matrix) % size

    def product(rows: jax.Array) -> jax.Array:
        # In this order: XLA's matmul of few rows and a transposed matrix takes twice as long.
        return jnp.einsum("fd,td->ft", rows, x, preferred_element_type=jnp.float32)

    def part(start: jax.Array) -> jax.Array:
        return product(jax.lax.dynamic_slice_in_dim(matrix, start, size))

    y = jax.lax.map(part, jnp.arange(0, whole, size)).reshape(whole, len(x))
    return jnp.concatenate((y, product(matrix[whole:]))).T


def experts_by_loop(
    x: jax.Array,
    weights: jax.Array,
    chosen: jax.Array,
    experts: ExpertWeights,
    layer: int | jax.Array,
    devices: int = 1,
) -> jax.Array:
    """Computes `experts` by a loop over blocks of rows, each of one expert.

    A turn takes several blocks if their matrices are small, since each turn has its cost.
    `devices` is how many devices share the tokens' experts; `experts` holds one device's E.
    """
    _, num_experts, *matrix = experts[0].weight.shape
    in_part = _PART_BYTES // (math.prod(matrix) * experts[0].weight.dtype.itemsize)
    per_turn = max(1, in_part)
    mean = chosen.size / num_experts / devices
    blocks = _blocks(chosen, num_experts, mean, per_turn)
    token = blocks.assignment // chosen.shape[1]
    weights = weights.reshape(-1).at[blocks.assignment].get(mode="fill", fill_value=0)
    # [U, T, M]: adds up the rows of a block by token.
    combine = jnp.where(jnp.arange(len(x))[:, None] == token[:, None], weights[:, None], 0)

    def one_turn(turn: jax.Array, y: jax.Array) -> jax.Array:
        def of_turn(values: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(values, turn * per_turn, per_turn)

        expert = of_turn(blocks.expert)

        def by_expert(rows: jax.Array, part: Linear) -> jax.Array:
            def by_rows(rows: jax.Array, _: jax.Array) -> jax.Array:
                return matmul_by_rows(rows, part.weight, layer, expert[0])

            matmul = jnp.matmul if in_part else by_rows
            return linear(rows, _matrix(part, layer, expert), rows, matmul)

        rows = x.at[of_turn(token)].get(mode="clip")
        hidden = jax.nn.silu(by_expert(rows, experts[0])) * by_expert(rows, experts[1])
        rows = by_expert(hidden, experts[2]).astype(jnp.float32)
        return y + jnp.einsum("utm,umd->td", of_turn(combine), rows)

    y = jnp.zeros(x.shape, jnp.float32)
    return jax.lax.fori_loop(0, -(-blocks.filled // per_turn), one_turn, y).astype(x.dtype)


class _Blocks(NamedTuple):
    """The T*K assignments as U blocks of up to M rows, each of one expert."""

    filled: jax.Array  # [] int32: blocks that are not empty, the first ones
    expert: jax.Array  # [U] int32
    assignment: jax.Array  # [U, M] int32: which (token*K + k) a row is; T*K: none


def _blocks(chosen: jax.Array, num_experts: int, mean: float, multiple: int) -> _Blocks:
    """Makes blocks of twice the mean number of rows of an expert; `multiple` divides U."""
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
    # Blocks that only fill a turn repeat the last expert: no other matrix is read for them.
    return _Blocks(ends[-1], jnp.minimum(expert, expert[ends[-1] - 1]), assignment)


def experts_by_gather(
    x: jax.Array,
    weights: jax.Array,
    chosen: jax.Array,
    experts: ExpertWeights,
    layer: int | jax.Array,
) -> jax.Array:
    """Computes `experts` as one batched matmul, every token's K experts side by side."""
    gate, up, down = (_matrix(part, layer, chosen) for part in experts)  # [T, K, …]
    rows = x[:, None, None]
    hidden = jax.nn.silu(linear(rows, gate, rows)) * linear(rows, up, rows)
    weights = jnp.where(chosen < experts[0].weight.shape[1], weights, 0)
    hidden = (hidden * weights[:, :, None, None]).astype(x.dtype)
    out = linear(hidden, down, hidden)[:, :, 0]
    return jnp.sum(out, axis=1, dtype=jnp.float32).astype(x.dtype)


def _matrix(stacked: Linear, layer: int | jax.Array, expert: jax.Array) -> Linear:
    """Takes one layer's expert, or experts, out of the stack of all layers."""

    # Index E stands for no expert; clipped, it reads the last one, whose weight is zero.
    return jax.tree.map(lambda matrices: matrices.at[layer, expert].get(mode="clip"), stacked)
