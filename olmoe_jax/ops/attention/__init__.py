"""Causal attention over packed rows: the choice of a backend.

Shapes: B rows, S positions, H heads, G key/value heads (G divides H; each serves H/G consecutive
heads), d head size.
"""

from typing import Any

import jax
import jax.numpy as jnp

from olmoe_jax.errors import UserError
from olmoe_jax.ops.attention.kernels import cudnn, pallas_triton, splash
from olmoe_jax.ops.attention.xla import chunked

BACKENDS = {
    "chunked": chunked,
    "pallas_triton": pallas_triton,
    "cudnn": cudnn,
    "splash": splash,
}
_PLATFORM = {"pallas_triton": "gpu", "cudnn": "gpu", "splash": "tpu"}


def default_backend(platform: str) -> str:
    """The backend for a platform ("cpu", "gpu", "tpu")."""
    return {"gpu": "pallas_triton", "tpu": "splash"}.get(platform, "chunked")


def check_backend(backend: str | None, platform: str, head_size: int, dtype: Any) -> str:
    """The backend that computes attention: `backend`, or where it is None the platform's.

    Raises:
      UserError: it does not run on the platform, or not with this head size or dtype.
    """
    backend = backend or default_backend(platform)
    wrong = None
    if _PLATFORM.get(backend, platform) != platform:
        wrong = f"runs on {_PLATFORM[backend]}, and this is {platform}"
    elif backend == "pallas_triton" and head_size < 16:
        wrong = f"needs heads of at least 16, and the model's have {head_size}"
    elif backend == "cudnn" and (head_size > 128 or head_size % 8):
        wrong = f"needs heads of a multiple of 8 up to 128, and the model's have {head_size}"
    elif backend == "cudnn" and dtype != jnp.bfloat16:
        wrong = "needs model.compute_dtype=bfloat16"
    if wrong:
        raise UserError(f"model.attention={backend}: {wrong}; write chunked, which always runs")
    return backend


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, backend: str | None = None
) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v over earlier positions of the same segment, differentiable.

    No backend but cudnn makes an array of S^2 elements. The kernels (all but chunked) cannot be
    partitioned: under a mesh, call this inside `jax.shard_map`.

    Args:
      q: [B, S, H, d]; k, v: [B, S, G, d].
      segments: [B, S] int; padding is a segment of its own, so that every query sees itself.
      backend: one of BACKENDS; None is the default backend's choice for this process's platform.

    Returns:
      [B, S, H, d] in q's dtype; scores and softmax in float32.
    """
    backend = backend or default_backend(jax.default_backend())
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} is none of {', '.join(BACKENDS)}")
    return BACKENDS[backend](q, k, v, segments)
