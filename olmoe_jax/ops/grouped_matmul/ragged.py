"""Grouped matrix multiplication by `jax.lax.ragged_dot_general`, which is native on TPUs.

On CPUs and GPUs it becomes a matmul of all rows by all weights, which only tests use.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def dimensions(
    lhs: int, rhs: int, rhs_groups: tuple[int, ...]
) -> jax.lax.RaggedDotDimensionNumbers:
    """Returns the numbers of a product summed over lhs's dimension `lhs` and rhs's `rhs`.

    The rows of lhs are the groups' rows; `rhs_groups` are the dimensions of rhs that count groups.
    """
    return jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((lhs,), (rhs,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=list(rhs_groups),
    )


BY_WEIGHTS = dimensions(1, 1, (0,))
BY_TRANSPOSED_WEIGHTS = dimensions(1, 2, (0,))
BY_ROWS = dimensions(0, 0, ())


def rows_by_weights(
    x: jax.Array, w: jax.Array, group_sizes: jax.Array, contract_last: bool
) -> jax.Array:
    """Returns each group's rows times its matrix."""
    numbers = BY_TRANSPOSED_WEIGHTS if contract_last else BY_WEIGHTS
    return _dot(x, w, group_sizes, numbers).astype(x.dtype)


def rows_by_rows(
    x: jax.Array, g: jax.Array, sizes: jax.Array, ends: jax.Array, dtype: DTypeLike
) -> jax.Array:
    """Returns x^T g of each group's rows; the groups have no gap between them."""
    return _dot(x, g, sizes, BY_ROWS).astype(dtype)


def _dot(
    lhs: jax.Array, rhs: jax.Array, sizes: jax.Array, numbers: jax.lax.RaggedDotDimensionNumbers
) -> jax.Array:
    return jax.lax.ragged_dot_general(lhs, rhs, sizes, numbers, preferred_element_type=jnp.float32)
