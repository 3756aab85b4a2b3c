"""Attention against a plain softmax, with grouped keys, segments and chunks of queries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, relative_error

from olmoe_jax.ops import attention as module
from olmoe_jax.ops.attention import attention

SEGMENTS = np.array([[1] * 5 + [2] * 4 + [3] * 3, [1] * 7 + [0] * 5])  # B=2, S=12


def case(heads=4, groups=2, size=6, seed=0):
    random = np.random.default_rng(seed)

    def normal(count):
        return jnp.asarray(random.normal(size=(*SEGMENTS.shape, count, size)), jnp.float32)

    return normal(heads), normal(groups), normal(groups), jnp.asarray(SEGMENTS)


def softmax_oracle(q, k, v, segments):
    """One query at a time, float64; each group of H/G heads shares a key head."""
    q, k, v = (np.asarray(value, np.float64) for value in (q, k, v))
    batch, length, heads, size = q.shape
    out = np.zeros(q.shape)
    for b, s, h in np.ndindex(batch, length, heads):
        group = h // (heads // k.shape[2])
        keys = [t for t in range(s + 1) if segments[b, t] == segments[b, s]]
        scores = k[b, keys, group] @ q[b, s, h] / np.sqrt(size)
        p = np.exp(scores - scores.max())
        out[b, s, h] = p / p.sum() @ v[b, keys, group]
    return out


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (4, 1)])
def test_equals_plain_softmax(heads, groups):
    q, k, v, segments = case(heads, groups)
    out = attention(q, k, v, segments, segments)
    assert relative_error(out, softmax_oracle(q, k, v, np.asarray(segments))) < 1e-6


def test_first_token_of_a_segment_sees_itself_only():
    q, k, v, segments = case(heads=2, groups=2)
    out = attention(q, k, v, segments, segments)
    for b, s in [(0, 0), (0, 5), (0, 9), (1, 0), (1, 7)]:
        np.testing.assert_allclose(out[b, s], v[b, s], rtol=1e-6)


def value_and_gradients(q, k, v, segments):
    def loss(q, k, v):
        out = attention(q, k, v, segments, segments)
        return jnp.sum(out * jnp.sin(jnp.arange(out.size)).reshape(out.shape)), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    return out, gradients


@pytest.mark.parametrize("chunk", [4, 3])
def test_chunks_change_nothing(monkeypatch, chunk):
    inputs = case()
    whole = value_and_gradients(*inputs)
    calls = []
    plain_map = jax.lax.map
    monkeypatch.setattr(jax.lax, "map", lambda f, x: calls.append(len(x[0])) or plain_map(f, x))
    monkeypatch.setattr(module, "CHUNK", chunk)
    assert_close(value_and_gradients(*inputs), whole, 1e-6)
    assert calls == [12 // chunk]
    # A length that is not a multiple is one chunk.
    monkeypatch.setattr(module, "CHUNK", 5)
    assert_close(value_and_gradients(*inputs), whole, 0)
    assert len(calls) == 1


@pytest.mark.parametrize("chunk", [512, 4])
def test_other_segments_do_not_matter(monkeypatch, chunk):
    """Not even in the last bit: what is masked has probability zero, exactly."""
    monkeypatch.setattr(module, "CHUNK", chunk)
    q, k, v, segments = case()
    out = attention(q, k, v, segments, segments)
    mine = np.asarray(segments)[0] == 2
    others = np.flatnonzero(~mine)
    k2, v2 = k.at[0, others].set(100.0), v.at[0, others].set(-100.0)
    changed = attention(q, k2, v2, segments, segments)
    np.testing.assert_array_equal(changed[0, mine], out[0, mine])
    assert np.any(changed[0, others] != out[0, others])


def test_gradients_equal_those_of_separate_rows():
    q, k, v, segments = case()
    _, packed = value_and_gradients(q, k, v, segments)
    weights = jnp.sin(jnp.arange(q.size)).reshape(q.shape)
    where = np.flatnonzero(SEGMENTS[0] == 2)
    ones = jnp.ones((1, len(where)), jnp.int32)

    def loss(q, k, v):
        return jnp.sum(attention(q, k, v, ones, ones) * weights[:1, where])

    alone = jax.jit(jax.grad(loss, (0, 1, 2)))(*(part[:1, where] for part in (q, k, v)))
    assert_close(tuple(gradient[:1, where] for gradient in packed), alone, 1e-5)


def test_decoding_sees_earlier_keys_only():
    """Query 0 at index 6 of the keys: what lies after it (an unfilled cache) is invisible."""
    q, k, v, _ = case()
    ones = jnp.ones((2, 12), jnp.int32)
    whole = attention(q, k, v, ones, ones)
    later = jnp.arange(12)[None, :, None, None] > 7
    out = attention(
        q[:, 6:8], jnp.where(later, 9.0, k), jnp.where(later, 9.0, v), ones[:, 6:8], ones, 6
    )
    assert_close(out, whole[:, 6:8], 1e-6)


def test_bfloat16_scores_are_float32():
    """Scores near 256 differ by less than bfloat16 can tell; the softmax must still see it."""
    q = jnp.full((1, 2, 1, 4), 16.0, jnp.bfloat16)
    k = jnp.stack([jnp.full((4,), 8.0), jnp.array([8.0, 8.0, 8.0, 8.0625])])
    k = k.reshape(1, 2, 1, 4).astype(jnp.bfloat16)
    v = jnp.array([0.0, 1.0], jnp.bfloat16).reshape(1, 2, 1, 1) * jnp.ones((4,), jnp.bfloat16)
    ones = jnp.ones((1, 2), jnp.int32)
    out = attention(q, k, v, ones, ones)
    assert out.dtype == jnp.bfloat16
    # Scores 256 and 256.5: in bfloat16 both are 256 and the probability were 0.5.
    np.testing.assert_allclose(out[0, 1, 0].astype(np.float32), 1 / (1 + np.exp(-0.5)), rtol=2**-8)
