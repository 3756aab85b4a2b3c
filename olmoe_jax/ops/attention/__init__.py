"""Causal attention over packed rows, computed by one of four backends.

Shapes: B rows, S positions, H heads, G key/value heads (G divides H; each serves H/G consecutive
heads), d head size.
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

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
    """Returns the backend for a platform ("cpu", "gpu" or "tpu")."""
    return {"gpu": "pallas_triton", "tpu": "splash"}.get(platform, "chunked")


def check_backend(backend: str | None, platform: str, head_size: int, dtype: DTypeLike) -> str:
    """Checks that a backend can run. Returns `backend`, or the platform's default if it is None.

    Args:
      backend: one of BACKENDS or None.
      platform: "cpu", "gpu" or "tpu".
      head_size: d.
      dtype: the compute dtype.

    Raises:
      UserError: the backend does not run on the platform, with this head size or in this dtype.
    """
    backend = backend or default_backend(platform)
    wrong = None
    if _PLATFORM.get(backend, platform) != platform:
        wrong = f"runs on {_PLATFORM[backend]}; this is {platform}"
    elif backend == "pallas_triton" and head_size < 16:
        wrong = f"needs heads of at least 16; the model has heads of {head_size}"
    elif backend == "cudnn" and (head_size > 128 or head_size % 8):
        wrong = f"needs heads of a multiple of 8 up to 128; the model has heads of {head_size}"
    elif backend == "cudnn" and dtype != jnp.bfloat16:
        wrong = "needs model.compute_dtype=bfloat16"
    if wrong:
        raise UserError(f"model.attention={backend}: {wrong}; write chunked, which always runs")
    return backend


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, backend: str | None = None
) -> jax.Array:
    """Returns softmax(q k^T / sqrt(d)) v over the position and earlier ones of its segment.

    Differentiable in q, k and v. Only cudnn makes an array of S^2 elements. The kernels (all
    backends but chunked) cannot be partitioned: under a mesh, call this inside `jax.shard_map`.

    Args:
      q: [B, S, H, d].
      k, v: [B, S, G, d].
      segments: [B, S] int. Padding is a segment of its own, so that every query sees itself.
      backend: one of BACKENDS; None takes the default of this process's platform.

    Returns:
      [B, S, H, d] in q's dtype. Scores and softmax are float32.

    Raises:
      ValueError: there is no such backend.
    """
    backend = backend or default_backend(jax.default_backend())
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} is none of {', '.join(BACKENDS)}")
    return BACKENDS[backend](q, k, v, segments)


def cached_attention(
    q: jax.Array, keys: jax.Array, values: jax.Array, visible: jax.Array
) -> jax.Array:
    """Returns softmax(q k^T / sqrt(d)) v over the visible keys of a cache, for decoding.

    The whole cache is read in place: slicing the filled part out would copy it. Not meant to be
    differentiated.

    Args:
      q: [B, 1, H, d], one query a row.
      keys, values: [B, G, C, d] for C columns of the cache.
      visible: [B, C] bool.

    Returns:
      [B, 1, H, d] in q's dtype. Scores and softmax are float32. A query that sees no key gives 0.
    """
    batch, groups, _, width = keys.shape
    queries = q.reshape(batch, groups, -1, width)
    scores = jnp.einsum("bghd,bgtd->bght", queries, keys, preferred_element_type=jnp.float32)
    visible = visible[:, None, None]
    scores = jnp.where(visible, scores / math.sqrt(width), jnp.finfo(jnp.float32).min)
    weights = jnp.where(visible, jax.nn.softmax(scores), 0)
    out = jnp.einsum(
        "bght,bgtd->bghd",
        weights.astype(values.dtype),
        values,
        preferred_element_type=jnp.float32,
    )
    return out.reshape(q.shape).astype(q.dtype)
