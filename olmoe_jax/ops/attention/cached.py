"""Attention of one query per row to a cache of keys and values, for decoding.

Shapes: B rows, T positions of the cache, H heads, G key/value heads (G divides H; each serves H/G
consecutive heads), d head size.
"""

import math

import jax
import jax.numpy as jnp


def cached_attention(
    q: jax.Array, keys: jax.Array, values: jax.Array, visible: jax.Array
) -> jax.Array:
    """Returns softmax(q k^T / sqrt(d)) v over the visible keys. Not meant to be differentiated.

    The whole cache is read in place: slicing the filled part out would copy it.

    Args:
      q: [B, 1, H, d].
      keys, values: [B, G, T, d].
      visible: [B, T] bool.

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
