"""Causal attention over packed rows, chunked over queries so that no [S, S] scores exist.

Shapes: B rows, S query and T key positions, H heads, G key/value heads (G divides H), d head size.
"""

import functools
import math

import jax
import jax.numpy as jnp

CHUNK = 512
"""Queries per chunk: bounds the live scores to [B, H, CHUNK, T]."""


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_segments: jax.Array,
    key_segments: jax.Array,
    first_query: jax.Array | int = 0,
) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v over earlier positions of the same segment.

    Args:
      q: [B, S, H, d]; k, v: [B, T, G, d].
      query_segments: [B, S] int; key_segments: [B, T] int. Padding is a segment of its own, so
        that every query sees at least itself.
      first_query: index of query 0 among the keys (decoding with a cache).

    Returns:
      [B, S, H, d] in q's dtype; scores and softmax in float32.
    """
    length = q.shape[1]
    index = first_query + jnp.arange(length)
    attend = functools.partial(_attend, k, v, key_segments)
    if length <= CHUNK or length % CHUNK:
        return attend(q, query_segments, index)

    def chunks(x, axis):
        x = x.reshape(*x.shape[:axis], length // CHUNK, CHUNK, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    # Remat: the backward recomputes a chunk's probabilities instead of keeping all of them.
    out = jax.lax.map(
        lambda inputs: jax.checkpoint(attend)(*inputs),
        (chunks(q, 1), chunks(query_segments, 1), chunks(index, 0)),
    )
    return jnp.moveaxis(out, 0, 1).reshape(q.shape)


def _attend(k, v, key_segments, q, query_segments, index):
    batch, length, heads, size = q.shape
    groups = k.shape[2]
    q = q.reshape(batch, length, groups, heads // groups, size)
    scores = jnp.einsum("bsghd,btgd->bghst", q, k, preferred_element_type=jnp.float32)
    scores = scores / math.sqrt(size)
    earlier = jnp.arange(k.shape[1])[None, :] <= index[:, None]
    visible = earlier[None] & (query_segments[:, :, None] == key_segments[:, None, :])
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bghst,btgd->bsghd", probabilities, v)
    return out.reshape(batch, length, heads, size)
