"""Grouped matrix multiplication by `jax.lax.ragged_dot_general`, which is native on TPUs.

On CPUs and GPUs it becomes a matmul of all rows with all weights: there, for tests only.
"""

import jax
import jax.numpy as jnp


def dimensions(
    lhs: int, rhs: int, rhs_groups: tuple[int, ...]
) -> jax.lax.RaggedDotDimensionNumbers:
    """Of a product over lhs's and rhs's dimensions, the groups being lhs's rows."""
    return jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((lhs,), (rhs,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=list(rhs_groups),
    )


BY_WEIGHTS = dimensions(1, 1, (0,))
BY_TRANSPOSED_WEIGHTS = dimensions(1, 2, (0,))
BY_ROWS = dimensions(0, 0, ())


def rows_by_weights(x, w, group_sizes, contract_last: bool):
    """x [N, D] by w [E, D, F], or with `contract_last` x [N, F] by w transposed."""
    numbers = BY_TRANSPOSED_WEIGHTS if contract_last else BY_WEIGHTS
    return _dot(x, w, group_sizes, numbers).astype(x.dtype)


def rows_by_rows(x, g, sizes, ends, dtype):
    """For each group, x^T g over its rows, summed in float32: [groups, D, F] of `dtype`.

    The groups follow each other: `ends` is the cumulative sum of `sizes`.
    """
    return _dot(x, g, sizes, BY_ROWS).astype(dtype)


def _dot(lhs, rhs, sizes, numbers):
    return jax.lax.ragged_dot_general(lhs, rhs, sizes, numbers, preferred_element_type=jnp.float32)
