"""Grouped matrix multiplication by tokamax's Triton kernels, for NVIDIA GPUs.

The makers of tokamax (https://github.com/openxla/tokamax) test and tune its kernels on such GPUs.
The library is imported when a kernel is called, since other machines need not have it installed.
"""

import importlib.util
import logging

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

from olmoe_jax.ops.grouped_matmul.ragged import BY_ROWS, BY_TRANSPOSED_WEIGHTS, BY_WEIGHTS


def missing() -> str | None:
    """Returns what stops these kernels from running and what to do; None if nothing does."""
    if importlib.util.find_spec("tokamax") is None:
        return "is not installed; run pip install tokamax==0.0.12"
    if jax.__version_info__ >= (0, 12):
        # tokamax 0.0.12's kernels call `pl.dot`, which jax 0.12 removed.
        return f"needs a jax below 0.12, and this is {jax.__version__}; install an older jax"
    return None


def rows_by_weights(
    x: jax.Array, w: jax.Array, group_sizes: jax.Array, contract_last: bool
) -> jax.Array:
    """Returns each group's rows times its matrix."""
    if contract_last:
        # tokamax transposes the weights before its kernel. In a loop over layers XLA would move
        # the transposition out of the loop and keep a second copy of all layers' weights. A fixed
        # layout forbids that.
        w = with_layout_constraint(w, Layout(major_to_minor=(0, 1, 2)))
    numbers = BY_TRANSPOSED_WEIGHTS if contract_last else BY_WEIGHTS
    y = _dot(x, w, group_sizes, numbers, x.dtype)
    # The kernel does not write the rows of no group.
    is_row = jnp.arange(x.shape[0]) < jnp.sum(group_sizes)
    return jnp.where(is_row[:, None], y, 0)


def rows_by_rows(
    x: jax.Array, g: jax.Array, sizes: jax.Array, ends: jax.Array, dtype: DTypeLike
) -> jax.Array:
    """Returns x^T g of each group's rows; the groups have no gap between them."""
    out = _dot(x, g, sizes, BY_ROWS, dtype)
    # By its source, the kernel of 0.0.12 multiplies other rows for an empty group.
    return jnp.where((sizes > 0)[:, None, None], out, 0)


def _dot(
    lhs: jax.Array,
    rhs: jax.Array,
    sizes: jax.Array,
    numbers: jax.lax.RaggedDotDimensionNumbers,
    dtype: DTypeLike,
) -> jax.Array:
    from absl import flags
    from tokamax import ragged_dot_general

    # tokamax's options are absl flags; absl would parse this program's command line for them.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    logger = logging.getLogger("absl")
    level = logger.level
    # tokamax warns about every shape that it ships no measurements for.
    logger.setLevel(logging.ERROR)
    try:
        return ragged_dot_general(
            lhs, rhs, sizes, numbers, preferred_element_type=dtype, implementation="triton"
        )
    finally:
        logger.setLevel(level)
