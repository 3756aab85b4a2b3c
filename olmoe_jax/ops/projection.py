"""A weight matrix, or one per expert, with an optional low-rank adapter beside it.

Shapes: N rows, D in, F out, E experts, R rank. LoRA (https://arxiv.org/abs/2106.09685): the
adapted matrix is W + scale * A B, with A [D, R] and B [R, F]; W itself is never changed.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from olmoe_jax.ops.grouped_matmul import (
    grouped_matmul,
    grouped_matmul_tuned,
    replace,
)
from olmoe_jax.ops.remat import keep


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weight", "a", "b", "tuned", "indices"],
    meta_fields=["scale"],
)
@dataclasses.dataclass(frozen=True)
class Projection:
    """Matrices [D, F] or [E, D, F], all in the compute dtype.

    a and b are None without adapter; with `tuned`, weight[indices] is replaced by it, and it
    gets the gradient (see `grouped_matmul_tuned`).
    """

    weight: jax.Array
    a: jax.Array | None = None  # [..., D, R]
    b: jax.Array | None = None  # [..., R, F]
    tuned: jax.Array | None = None  # [n, D, F]
    indices: jax.Array | None = None  # [n] int32
    scale: float = 1.0


def transposed(projection: Projection) -> Projection:
    """The projection by the transposed matrix."""

    def swap(matrix):
        return None if matrix is None else jnp.swapaxes(matrix, -1, -2)

    return Projection(
        swap(projection.weight), swap(projection.b), swap(projection.a), scale=projection.scale
    )


def with_tuned(projection: Projection) -> Projection:
    """The projection with the selected matrices put in their places."""
    if projection.tuned is None:
        return projection
    weight = replace(projection.weight, projection.tuned, projection.indices)
    return Projection(weight, projection.a, projection.b, scale=projection.scale)


def adapted_weight(projection: Projection) -> jax.Array:
    """W + scale * A B, computed in float32, in W's dtype."""
    if projection.a is None:
        return projection.weight
    delta = jnp.matmul(projection.a, projection.b, preferred_element_type=jnp.float32)
    adapted = projection.weight.astype(jnp.float32) + projection.scale * delta
    return adapted.astype(projection.weight.dtype)


def project(
    x: jax.Array, projection: Projection, dropped: jax.Array, matmul=jnp.matmul
) -> jax.Array:
    """x W + scale * dropped A B. x, dropped: [..., D] (the same, but for dropout) -> [..., F].

    `matmul` gives x W.
    """
    y = matmul(x, projection.weight)
    if projection.a is None:
        return y
    return y + projection.scale * (keep(dropped @ projection.a) @ projection.b)


def grouped_project(
    rows: jax.Array,
    projection: Projection,
    dropped: jax.Array,
    group_sizes: jax.Array,
    backend: str | None,
) -> jax.Array:
    """As `project` for rows [N, D] sorted by expert, each by its own expert's matrices."""
    weight = projection.weight
    if projection.tuned is None:
        y = grouped_matmul(rows, weight, group_sizes, backend)
    else:
        tuned, indices = projection.tuned, projection.indices
        y = grouped_matmul_tuned(rows, weight, tuned, indices, group_sizes, backend)
    if projection.a is None:
        return y
    low = keep(grouped_matmul(dropped, projection.a, group_sizes, backend))
    return y + projection.scale * grouped_matmul(low, projection.b, group_sizes, backend)
