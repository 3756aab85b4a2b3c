"""What the backward pass recomputes instead of keeping it (rematerialisation, `jax.checkpoint`).

Three choices, named as in Megatron-LM and torchtitan: "none" keeps whatever the backward reads,
"full" keeps a function's inputs alone, and "selective" keeps the outputs of matmuls and attention,
so that what is computed twice is elementwise, norms, sorting and gathering of weights.
"""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

_KEPT = "kept"
_KERNELS = ("pallas_call", "dot_product_attention_fwd_wrapper")
"""Primitives of kernels with outputs that only their own backward sees, such as attention's row
sums: nothing outside can name these."""


def keep(x: jax.Array) -> jax.Array:
    """Marks x as worth its memory under selective rematerialisation."""
    return checkpoint_name(x, _KEPT)


def rematerialised(function: Callable, remat: str) -> Callable:
    """`function`, to be scanned over, whose backward recomputes what `remat` does not keep."""
    if remat == "none":
        return function
    policy = _selective if remat == "selective" else None
    return jax.checkpoint(function, prevent_cse=False, policy=policy)


def _selective(primitive, *arguments, **parameters) -> bool:
    named = jax.checkpoint_policies.save_only_these_names(_KEPT)
    return named(primitive, *arguments, **parameters) or primitive.name in _KERNELS
