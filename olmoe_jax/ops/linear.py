"""Linear maps: one matrix or one per expert, perhaps with a low-rank adapter or tuned experts.

Shapes: N rows, D in, F out, E experts, R rank, u tuned experts of a layer. LoRA
(https://arxiv.org/abs/2106.09685): the adapted matrix is W + scale * A B, with A [D, R] and
B [R, F]; W never changes.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from olmoe_jax.ops.grouped_matmul import (
    InStack,
    grouped_matmul,
    grouped_matmul_transposed,
    reads_in_stack,
)
from olmoe_jax.ops.remat import keep


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weight", "a", "b", "tuned", "indices", "stack", "sums"],
    meta_fields=["scale"],
)
@dataclasses.dataclass(frozen=True)
class Linear:
    """The arrays of a linear map [D, F], or of one per expert [E, D, F].

    `weight`, `tuned` and the adapter's factors have the compute dtype, a stack its own.
    `stack`, `sums`, `tuned` and `indices` are those of `grouped_matmul`.
    """

    weight: jax.Array  # [..., D, F]
    a: jax.Array | None = None  # [..., D, R], the adapter's first factor; None: no adapter
    b: jax.Array | None = None  # [..., R, F], the adapter's second factor
    tuned: jax.Array | None = None
    indices: jax.Array | None = None
    stack: InStack | None = None
    sums: Any = None
    scale: float = 1.0  # factor of the adapter's product


class ExpertWeights(NamedTuple):
    """The linear maps of E SwiGLU experts: gate and up [E, D, F], down [E, F, D]."""

    gate: Linear
    up: Linear
    down: Linear


def untuned(map_: Linear) -> Linear:
    """Returns the map without the arrays that only take a gradient; it computes the same."""
    return dataclasses.replace(map_, tuned=None, indices=None, sums=None)


def cast(map_: Linear, dtype: DTypeLike) -> Linear:
    """Returns the map in a dtype; a stack stays as it is stored."""
    arrays = {name: getattr(map_, name) for name in ("weight", "a", "b")}
    arrays = {name: None if x is None else x.astype(dtype) for name, x in arrays.items()}
    return dataclasses.replace(map_, **arrays)


def expert_of(map_: Linear, number: jax.Array, dtype: DTypeLike) -> Linear:
    """Returns the map of one expert, in a dtype.

    `weight` is a slice of the stack: XLA would copy it before a loop over its experts.
    """

    def taken(array: jax.Array | None) -> Any:
        return None if array is None else array.at[number].get(mode="clip").astype(dtype)

    stack = map_.stack
    weight = taken(map_.weight) if stack is None else stack.matrix(number).astype(dtype)
    return Linear(weight, taken(map_.a), taken(map_.b), scale=map_.scale)


def merged_weight(map_: Linear) -> jax.Array:
    """Returns W + scale * A B, computed in float32, in W's dtype."""
    if map_.a is None or map_.b is None:
        return map_.weight
    delta = jnp.matmul(map_.a, map_.b, preferred_element_type=jnp.float32)
    merged = map_.weight.astype(jnp.float32) + map_.scale * delta
    return merged.astype(map_.weight.dtype)


def linear(
    x: jax.Array,
    map_: Linear,
    dropped: jax.Array,
    matmul: Callable[[jax.Array, jax.Array], jax.Array] = jnp.matmul,
) -> jax.Array:
    """Returns x W + scale * dropped A B.

    Args:
      x: [..., D].
      map_: one matrix.
      dropped: [..., D], x after the adapter's dropout (x itself without dropout).
      matmul: computes x W.

    Returns:
      [..., F].
    """
    y = matmul(x, map_.weight)
    if map_.a is None or map_.b is None:
        return y
    return y + map_.scale * (keep(dropped @ map_.a) @ map_.b)


def grouped_linear(
    rows: jax.Array,
    map_: Linear,
    dropped: jax.Array,
    group_sizes: jax.Array,
    backend: str | None,
) -> jax.Array:
    """Applies each expert's map to that expert's rows: `linear` for rows sorted by expert.

    Args:
      rows: [N, D], sorted by expert.
      map_: one matrix per expert.
      dropped: [N, D], the rows after the adapters' dropout.
      group_sizes: [E] int32, rows of each expert; rows beyond their sum give zeros.
      backend: name of a backend of `olmoe_jax.ops.grouped_matmul`; None: the platform's.

    Returns:
      [N, F].
    """
    y = grouped_matmul(
        rows,
        map_.weight,
        group_sizes,
        backend,
        stack=map_.stack,
        sums=map_.sums,
        tuned=map_.tuned,
        indices=map_.indices,
    )
    if map_.a is None or map_.b is None:
        return y
    low = keep(grouped_matmul(dropped, map_.a, group_sizes, backend))
    return y + map_.scale * grouped_matmul(low, map_.b, group_sizes, backend)


def grouped_linear_transposed(
    rows: jax.Array, map_: Linear, group_sizes: jax.Array, backend: str | None
) -> jax.Array:
    """Applies each expert's transposed map, W^T + scale * B^T A^T, to that expert's rows.

    Not differentiable. No transposed matrix is made.

    Args:
      rows: [N, F], sorted by expert.
      map_, group_sizes, backend: those of `grouped_linear`.

    Returns:
      [N, D].
    """
    matmul = functools.partial(grouped_matmul_transposed, group_sizes=group_sizes, backend=backend)
    if map_.stack is not None and reads_in_stack(backend):
        y = matmul(rows, map_.stack)
    else:
        y = matmul(rows, map_.weight)
    if map_.a is None or map_.b is None:
        return y
    return y + map_.scale * matmul(matmul(rows, map_.b), map_.a)
