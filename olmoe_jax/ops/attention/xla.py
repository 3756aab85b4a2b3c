"""Causal attention over packed rows in plain XLA: FlashAttention-2's loops over square blocks.

https://arxiv.org/abs/2307.08691. Blocks of later keys, and of keys whose segments the queries do
not meet, are not computed. Everything is laid out with the positions of the queries last: then the
softmax reduces over rows, and no matmul has to transpose a block of scores, which costs a CPU as
much as the matmul.

Shapes: B rows, G key/value heads, N = B*G, R heads for each of them, n blocks of b positions,
Q = R*b the queries of a block, d head size.
"""

import math

import jax
import jax.numpy as jnp

from olmoe_jax.ops.remat import keep

BLOCK = 128
"""Positions per block, at most: two heads' scores fit into a core's cache."""

_MASKED = -1e30


def chunked(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    """See `olmoe_jax.ops.attention.attention`."""
    batch, length, heads, size = q.shape
    groups = k.shape[2]
    count = -(-length // BLOCK)
    block = -(-length // count)
    padding = count * block - length

    def blocks(x):  # [B, S, heads, d] -> [n, N, Q, d], for keys [n, N, b, d]
        x = jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0)))
        x = x.reshape(batch, count, block, groups, -1, size)
        return x.transpose(1, 0, 3, 4, 2, 5).reshape(count, batch * groups, -1, size)

    # Padding comes last, so that no query sees it.
    segments = jnp.pad(segments, ((0, 0), (0, padding)), constant_values=-1)
    segments = segments.reshape(batch, count, block).swapaxes(0, 1)
    out = _attention(blocks(q), blocks(k), blocks(v), segments)
    out = out.reshape(count, batch, groups, size, -1, block).transpose(1, 0, 5, 2, 4, 3)
    return out.reshape(batch, -1, heads, size)[:, :length]


@jax.custom_vjp
def _attention(q, k, v, segments):
    """q [n, N, Q, d]; k, v [n, N, b, d]; segments [n, B, b] -> [n, N, d, Q] in q's dtype."""
    return _forward(q, k, v, segments)[0]


def _forward(q, k, v, segments):
    v_t = v.swapaxes(2, 3)

    def queries(_, inputs):
        i, first, q_i, k_i, v_i, segments_i = inputs
        scores = _scores(q_i, k_i, segments_i, segments_i, diagonal=True)
        top = scores.max(axis=1)
        p = jnp.exp(scores - top[:, None])
        state = top, p.sum(axis=1), _matmul(v_i, p.astype(v.dtype))

        def earlier(j, state):
            top, total, out = state
            scores = _scores(q_i, k[j], segments_i, segments[j], diagonal=False)
            new_top = jnp.maximum(top, scores.max(axis=1))
            p, shrink = jnp.exp(scores - new_top[:, None]), jnp.exp(top - new_top)
            out = out * shrink[:, None] + _matmul(v_t[j], p.astype(v.dtype))
            return new_top, total * shrink + p.sum(axis=1), out

        top, total, out = jax.lax.fori_loop(first, i, earlier, state)
        return None, ((out / total[:, None]).astype(q.dtype), top + jnp.log(total))

    inputs = jnp.arange(len(q)), _first_blocks(segments), q, k, v_t, segments
    out, log_totals = map(keep, jax.lax.scan(queries, None, inputs)[1])
    return out, (q, k, v, segments, out, log_totals)


def _backward(residuals, g):
    q, k, v, segments, out, log_totals = residuals
    scale = 1 / math.sqrt(q.shape[-1])
    k_t, g_rows = k.swapaxes(2, 3), g.swapaxes(2, 3)
    # Softmax's gradient p * (dp - sum(p * dp)); the sum is that of g * out over d.
    sums = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), axis=2)

    def queries(carry, inputs):
        i, first, q_i, segments_i, g_i, sums_i, log_totals_i = inputs

        def pair(j, carry, diagonal=False):
            dq_i, dk, dv = carry
            scores = _scores(q_i, k[j], segments_i, segments[j], diagonal)
            p = jnp.exp(scores - log_totals_i[:, None])
            dp = _matmul(v[j], g_i, transpose_right=True)
            ds = (p * (dp - sums_i[:, None]) * scale).astype(q.dtype)
            dv = _add_at(dv, j, _matmul(p.astype(v.dtype), g_i))
            dk = _add_at(dk, j, _matmul(ds, q_i))
            return dq_i + _matmul(k_t[j], ds), dk, dv

        zero = jnp.zeros(k_t.shape[1:3] + q_i.shape[1:2], jnp.float32)
        state = pair(i, (zero, *carry), diagonal=True)
        dq_i, *carry = jax.lax.fori_loop(first, i, pair, state)
        return tuple(carry), dq_i.astype(q.dtype)

    zeros = jnp.zeros(k.shape, jnp.float32)
    inputs = jnp.arange(len(q)), _first_blocks(segments), q, segments, g_rows, sums, log_totals
    (dk, dv), dq = jax.lax.scan(queries, (zeros, zeros), inputs)
    return dq.swapaxes(2, 3), dk.astype(k.dtype), dv.astype(v.dtype), None


_attention.defvjp(_forward, _backward)


def _scores(q, k, query_segments, key_segments, diagonal: bool):
    """k q^T / sqrt(d) [N, b, Q] float32, masked; `diagonal`: the keys are the queries' own."""
    scores = _matmul(k, q, transpose_right=True) / math.sqrt(q.shape[-1])
    visible = key_segments[:, :, None] == query_segments[:, None, :]
    block = visible.shape[-1]
    if diagonal:
        visible &= jnp.arange(block)[:, None] <= jnp.arange(block)
    by_head = scores.reshape(visible.shape[0], -1, block, scores.shape[-1] // block, block)
    return jnp.where(visible[:, None, :, None], by_head, _MASKED).reshape(scores.shape)


def _first_blocks(segments):
    """[n] for each block of queries, the first block of keys with a segment in its range."""
    low, high = segments.min(axis=-1), segments.max(axis=-1)  # [n, B]
    meet = (low[:, None] <= high[None]) & (low[None] <= high[:, None])
    return jnp.argmax(meet.any(axis=-1), axis=1)


def _matmul(a, b, transpose_right=False):
    """For each of N, a b or a b^T, in float32."""
    dimensions = (((2,), (2 if transpose_right else 1,)), ((0,), (0,)))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _add_at(x, index, value):
    """x[index] += value, in place (`x.at` would scatter)."""
    return jax.lax.dynamic_update_index_in_dim(x, x[index] + value, index, 0)
