"""Attention of one query a row to a cache of keys and values, as decoding needs it.

Shapes: B rows, T positions of the cache, H heads, G key/value heads (G divides H; each serves H/G
consecutive heads), d head size.
"""

import math

import jax
import jax.numpy as jnp


def cached_attention(
    q: jax.Array, keys: jax.Array, values: jax.Array, visible: jax.Array
) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v over the visible keys; no gradients.

    All of the cache is read, where it lies: to slice the filled part out would copy it.

    Args:
      q: [B, 1, H, d].
      keys, values: [B, G, T, d].
      visible: [B, T] bool.

    Returns:
      [B, 1, H, d] in q's dtype; scores and softmax in float32. A query that sees no key gives 0.
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
