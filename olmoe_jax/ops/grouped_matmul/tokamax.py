"""Grouped matrix multiplication by tokamax's Triton kernels, for NVIDIA GPUs.

tokamax (https://github.com/openxla/tokamax) is a library of kernels that its makers test and tune
on such GPUs. It is imported when it is used, since it need not be installed elsewhere.
"""

import importlib.util
import logging

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from olmoe_jax.ops.grouped_matmul.ragged import BY_ROWS, BY_TRANSPOSED_WEIGHTS, BY_WEIGHTS


def missing() -> str | None:
    """What must be done before these kernels can be used; None: nothing."""
    if importlib.util.find_spec("tokamax") is None:
        return "is not installed; run pip install tokamax==0.0.12"
    if jax.__version_info__ >= (0, 12):
        # Its kernels call `pl.dot`, which is gone.
        return f"needs a jax below 0.12, and this is {jax.__version__}; install an older jax"
    return None


def rows_by_weights(x, w, group_sizes, contract_last: bool):
    """x [N, D] by w [E, D, F], or with `contract_last` x [N, F] by w transposed."""
    if contract_last:
        # tokamax transposes the weights before its kernel. In a loop over layers XLA would rather
        # keep all layers' weights transposed, a second copy of them; a fixed layout forbids it.
        w = with_layout_constraint(w, Layout(major_to_minor=(0, 1, 2)))
    numbers = BY_TRANSPOSED_WEIGHTS if contract_last else BY_WEIGHTS
    y = _dot(x, w, group_sizes, numbers, x.dtype)
    # The kernel leaves the rows of no group as it finds them.
    is_row = jnp.arange(x.shape[0]) < jnp.sum(group_sizes)
    return jnp.where(is_row[:, None], y, 0)


def rows_by_rows(x, g, sizes, ends, dtype):
    """For each group, x^T g over its rows, summed in float32: [groups, D, F] of `dtype`.

    The groups follow each other: `ends` is the cumulative sum of `sizes`.
    """
    out = _dot(x, g, sizes, BY_ROWS, dtype)
    # For an empty group the kernel of 0.0.12 multiplies the rows before it, by its source.
    return jnp.where((sizes > 0)[:, None, None], out, 0)


def _dot(lhs, rhs, sizes, numbers, dtype):
    from absl import flags
    from tokamax import ragged_dot_general

    # Its options are absl flags, for which it would parse this program's command line.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    logger = logging.getLogger("absl")
    level = logger.level
    # It would warn of every shape that it ships no measurements of.
    logger.setLevel(logging.ERROR)
    try:
        return ragged_dot_general(
            lhs, rhs, sizes, numbers, preferred_element_type=dtype, implementation="triton"
        )
    finally:
        logger.setLevel(level)
