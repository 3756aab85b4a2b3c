"""Attention of a few queries to a cache of keys and values, as decoding needs it.

Shapes: B rows, S queries, T positions of the cache, L layers, H heads, G key/value heads (G divides
H; each serves H/G consecutive heads), d head size.
"""

import math

import jax
import jax.numpy as jnp

KEYS_PER_TURN = 128


def cached_attention(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    layer: jax.Array | int,
    query_segments: jax.Array,
    key_segments: jax.Array,
    first_query: jax.Array | int,
) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v over earlier positions of the same segment; no gradients.

    A loop over the filled part of the cache, with a running softmax ("Online normalizer
    calculation for softmax", https://arxiv.org/abs/1805.02867): what is empty is not read, the
    layer's part of the cache is not copied out of it, and the scores of at most KEYS_PER_TURN keys
    exist at a time.

    Args:
      q: [B, S, H, d].
      keys, values: [L, B, G, T, d], of all layers.
      layer: [] int32: whose keys.
      query_segments: [B, S] int; key_segments: [B, T] int.
      first_query: index of query 0 among the keys; the keys behind a query are invisible to it.

    Returns:
      [B, S, H, d] in q's dtype; scores and softmax in float32. A query that sees no key gives 0.
    """
    batch, length, heads, width = q.shape
    groups, total = keys.shape[2:4]
    size = min(KEYS_PER_TURN, total)
    queries = q.reshape(batch, length, groups, heads // groups, width)
    index = first_query + jnp.arange(length)

    def one_turn(turn, carry):
        largest, weight_sum, out = carry
        start = jnp.minimum(turn * size, total - size)
        k, v = (
            jax.lax.dynamic_slice(
                part, (layer, 0, 0, start, 0), (1, batch, groups, size, width)
            ).squeeze(0)
            for part in (keys, values)
        )
        segments = jax.lax.dynamic_slice_in_dim(key_segments, start, size, axis=1)
        place = start + jnp.arange(size)
        # The last turn may start early, among keys that had theirs.
        visible = (place >= turn * size) & (place <= index[:, None])
        visible = visible & (query_segments[:, :, None] == segments[:, None, :])
        visible = visible[:, None, None]
        scores = jnp.einsum("bsghd,bgtd->bghst", queries, k, preferred_element_type=jnp.float32)
        scores = jnp.where(visible, scores / math.sqrt(width), jnp.finfo(jnp.float32).min)
        new_largest = jnp.maximum(largest, scores.max(axis=-1))
        weights = jnp.where(visible, jnp.exp(scores - new_largest[..., None]), 0)
        shrink = jnp.exp(largest - new_largest)
        seen = jnp.einsum(
            "bghst,bgtd->bghsd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
        )
        out = out * shrink[..., None] + seen
        return new_largest, weight_sum * shrink + weights.sum(axis=-1), out

    rows = (batch, groups, heads // groups, length)
    start = (
        jnp.full(rows, jnp.finfo(jnp.float32).min),
        jnp.zeros(rows),
        jnp.zeros((*rows, width)),
    )
    filled = first_query + length
    _, weight_sum, out = jax.lax.fori_loop(0, -(-filled // size), one_turn, start)
    out = out / jnp.where(weight_sum > 0, weight_sum, 1)[..., None]
    return jnp.moveaxis(out, 3, 1).reshape(q.shape).astype(q.dtype)
