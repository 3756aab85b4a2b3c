"""Causal attention over packed rows in plain XLA: FlashAttention-2's loops over square blocks.

The algorithm is that of https://arxiv.org/abs/2307.08691. It skips blocks of later keys, and blocks
of keys that share no segment with the queries. The positions of the queries are the last dimension
of every array. So the softmax reduces over rows, and no matmul transposes a block of scores, which
would cost a CPU as much as the matmul itself.

Shapes: B rows, G key/value heads, N = B*G, R heads per key/value head, n blocks of b positions,
Q = R*b queries of a block, d head size.
"""

import math

import jax
import jax.numpy as jnp

from olmoe_jax.ops.remat import keep

BLOCK = 128
"""The most positions per block: two heads' scores fit into a core's cache."""

_State = tuple[jax.Array, jax.Array, jax.Array]
_Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]

_MASKED = -1e30


def chunked(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    """Computes `olmoe_jax.ops.attention.attention`."""
    batch, length, heads, size = q.shape
    groups = k.shape[2]
    count = -(-length // BLOCK)
    block = -(-length // count)
    padding = count * block - length

    def blocks(x: jax.Array) -> jax.Array:  # [B, S, heads, d] -> [n, N, Q or b, d]
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
def _attention(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    """Attends with q [n, N, Q, d], k, v [n, N, b, d], segments [n, B, b]; returns [n, N, d, Q]."""
    return _forward(q, k, v, segments)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array
) -> tuple[jax.Array, _Residuals]:
    v_t = v.swapaxes(2, 3)

    def queries(_: None, inputs: tuple[jax.Array, ...]):
        """Attends from one block of queries to its own block of keys, then to the earlier ones."""
        i, first, q_i, k_i, v_i, segments_i = inputs
        scores = _scores(q_i, k_i, segments_i, segments_i, diagonal=True)
        top = scores.max(axis=1)
        p = jnp.exp(scores - top[:, None])
        state = top, p.sum(axis=1), _matmul(v_i, p.astype(v.dtype))

        def earlier(j: jax.Array, state: _State) -> _State:
            # The online softmax: a new maximum shrinks the sums so far.
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


def _backward(residuals: _Residuals, g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, segments, out, log_totals = residuals
    scale = 1 / math.sqrt(q.shape[-1])
    k_t, g_rows = k.swapaxes(2, 3), g.swapaxes(2, 3)
    # The softmax's gradient is p * (dp - sum(p * dp)); that sum equals the sum of g * out over d.
    sums = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), axis=2)

    def queries(carry: tuple[jax.Array, jax.Array], inputs: tuple[jax.Array, ...]):
        """Adds one block of queries' share to dk and dv; returns its dq."""
        i, first, q_i, segments_i, g_i, sums_i, log_totals_i = inputs

        def pair(j: jax.Array, carry: _State, diagonal: bool = False) -> _State:
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
        dq_i, dk, dv = jax.lax.fori_loop(first, i, pair, state)
        return (dk, dv), dq_i.astype(q.dtype)

    zeros = jnp.zeros(k.shape, jnp.float32)
    inputs = jnp.arange(len(q)), _first_blocks(segments), q, segments, g_rows, sums, log_totals
    (dk, dv), dq = jax.lax.scan(queries, (zeros, zeros), inputs)
    return dq.swapaxes(2, 3), dk.astype(k.dtype), dv.astype(v.dtype), None


_attention.defvjp(_forward, _backward)


def _scores(
    q: jax.Array,
    k: jax.Array,
    query_segments: jax.Array,
    key_segments: jax.Array,
    diagonal: bool,
) -> jax.Array:
    """Returns k q^T / sqrt(d) [N, b, Q] float32, masked; `diagonal`: of the queries' own block."""
    scores = _matmul(k, q, transpose_right=True) / math.sqrt(q.shape[-1])
    visible = key_segments[:, :, None] == query_segments[:, None, :]
    block = visible.shape[-1]
    if diagonal:
        visible &= jnp.arange(block)[:, None] <= jnp.arange(block)
    by_head = scores.reshape(visible.shape[0], -1, block, scores.shape[-1] // block, block)
    return jnp.where(visible[:, None, :, None], by_head, _MASKED).reshape(scores.shape)


def _first_blocks(segments: jax.Array) -> jax.Array:
    """Returns, for each block of queries, the first block of keys that can share a segment.

    Two blocks share no segment if the ranges of their segment numbers do not meet.
    """
    low, high = segments.min(axis=-1), segments.max(axis=-1)  # [n, B]
    meet = (low[:, None] <= high[None]) & (low[None] <= high[:, None])
    return jnp.argmax(meet.any(axis=-1), axis=1)


def _matmul(a: jax.Array, b: jax.Array, transpose_right: bool = False) -> jax.Array:
    """Returns a b, or a b^T, for each of the N, in float32."""
    dimensions = (((2,), (2 if transpose_right else 1,)), ((0,), (0,)))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _add_at(x: jax.Array, index: jax.Array, value: jax.Array) -> jax.Array:
    """Adds `value` to x[index] in place; `x.at[index].add` would become a scatter."""
    return jax.lax.dynamic_update_index_in_dim(x, x[index] + value, index, 0)
