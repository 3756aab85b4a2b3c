"""The choice of what the backward pass recomputes (rematerialisation, `jax.checkpoint`).

The three choices have the names of Megatron-LM and torchtitan. "none" keeps everything that the
backward pass reads. "full" keeps a function's inputs alone. "selective" also keeps the outputs of
matmuls, attention and sorting, so that only elementwise operations, norms and the gathering of
weights run twice.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

_KEPT = "kept"
_KERNELS = ("pallas_call", "dot_product_attention_fwd_wrapper")
"""Primitives of kernels. Some outputs, such as attention's row sums, are seen by the kernel's own
backward alone: code outside the kernel cannot name them."""


def keep(x: jax.Array) -> jax.Array:
    """Marks x as worth its memory under selective rematerialisation."""
    return checkpoint_name(x, _KEPT)


def rematerialised(function: Callable, remat: str) -> Callable:
    """Returns `function` with a backward that recomputes what `remat` does not keep.

    The result is meant for `jax.lax.scan`. Outside of a loop XLA could merge the second computation
    with the first, since `prevent_cse` is False.

    Args:
      remat: "none", "selective" or "full".
    """
    if remat == "none":
        return function
    policy = _selective if remat == "selective" else None
    return jax.checkpoint(function, prevent_cse=False, policy=policy)


def _selective(primitive: Any, *arguments: Any, **parameters: Any) -> bool:
    named = jax.checkpoint_policies.save_only_these_names(_KEPT)
    return named(primitive, *arguments, **parameters) or primitive.name in _KERNELS
