"""Attention against a plain softmax: every backend, values and gradients, and decoding.

The Pallas kernels run in interpret mode; cuDNN's is only compiled (test_attention_compiled.py).
"""

import functools
import re
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, relative_error

from olmoe_jax.config import ModelOptions
from olmoe_jax.errors import UserError
from olmoe_jax.ops.attention import (
    BACKENDS,
    attention,
    cached_attention,
    check_backend,
    default_backend,
)
from olmoe_jax.ops.attention import xla as chunked_attention
from olmoe_jax.ops.attention.kernels import pallas_triton, splash
from olmoe_jax.ops.attention.xla import chunked

FUNCTIONS = {
    "chunked": chunked,
    "pallas_triton": functools.partial(pallas_triton, interpret=True),
    "splash": functools.partial(splash, interpret=True),
}
SHORT = np.array([[1] * 5 + [2] * 4 + [3] * 3, [1] * 7 + [0] * 5])  # B=2, S=12
LONG = np.array([[1] * 40 + [2] * 60 + [3] * 50, [1] * 9 + [0] * 141])  # two odd blocks


def case(segments=SHORT, heads=4, groups=2, size=6, dtype=jnp.float32, seed=0):
    """q, k, v, segments and a gradient of the output."""
    random = np.random.default_rng(seed)

    def normal(count):
        return jnp.asarray(random.normal(size=(*segments.shape, count, size)), dtype)

    q, k, v, g = normal(heads), normal(groups), normal(groups), normal(heads)
    return q, k, v, jnp.asarray(segments, jnp.int32), g


def oracle(q, k, v, segments, g):
    """Output and gradients of q, k, v in float64, all scores at once."""
    q, k, v, g = (np.asarray(value, np.float64) for value in (q, k, v, g))
    segments = np.asarray(segments)
    batch, length, groups, size = k.shape
    whole = [np.repeat(value, q.shape[2] // groups, axis=2) for value in (k, v)]
    visible = np.tril(segments[:, :, None] == segments[:, None, :])[:, None]
    scores = np.einsum("bshd,bthd->bhst", q, whole[0]) / np.sqrt(size)
    p = np.exp(np.where(visible, scores, -np.inf) - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    out = np.einsum("bhst,bthd->bshd", p, whole[1])
    dp = np.einsum("bshd,bthd->bhst", g, whole[1])
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) / np.sqrt(size)
    dk, dv = np.einsum("bhst,bshd->bthd", ds, q), np.einsum("bhst,bshd->bthd", p, g)
    by_group = [x.reshape(batch, length, groups, -1, size).sum(3) for x in (dk, dv)]
    return out, np.einsum("bhst,bthd->bshd", ds, whole[0]), *by_group


def value_and_gradients(function, q, k, v, segments, g):
    @jax.jit
    def run(q, k, v):
        out, backward = jax.vjp(lambda q, k, v: function(q, k, v, segments), q, k, v)
        return out, *backward(g)

    return run(q, k, v)


@pytest.mark.parametrize("backend", FUNCTIONS)
@pytest.mark.parametrize(
    ("heads", "groups", "size", "dtype", "tolerance"),
    [
        (2, 1, 16, jnp.float32, 2e-6),
        pytest.param(2, 2, 128, jnp.bfloat16, 2e-2, marks=pytest.mark.slow),
    ],
)
def test_values_and_gradients(backend, heads, groups, size, dtype, tolerance):
    inputs = case(LONG, heads, groups, size, dtype)
    actual = value_and_gradients(FUNCTIONS[backend], *inputs)
    assert [part.dtype for part in actual] == [dtype] * 4
    for name, a, e in zip(("out", "dq", "dk", "dv"), actual, oracle(*inputs), strict=True):
        assert relative_error(a.astype(jnp.float32), e) < tolerance, name


@pytest.mark.parametrize(
    ("heads", "groups", "block"),
    [(4, 4, 5), (4, 2, 128), (4, 2, 5), (4, 2, 4), (4, 2, 1), (4, 1, 5)],
)
def test_blocks_of_any_size(monkeypatch, heads, groups, block):
    monkeypatch.setattr(chunked_attention, "BLOCK", block)
    inputs = case(SHORT, heads, groups)
    assert_close(value_and_gradients(chunked, *inputs), oracle(*inputs), 2e-6)


def test_segments_need_not_be_runs(monkeypatch):
    """Skipped are only blocks whose range of segments the queries do not meet."""
    monkeypatch.setattr(chunked_attention, "BLOCK", 3)
    inputs = case(np.array([[7, 1, 7, 2, 2, 2, 1, 1, 2, 7, 2, 1]]))
    assert_close(value_and_gradients(chunked, *inputs), oracle(*inputs), 2e-6)


def test_first_token_of_a_segment_sees_itself_only():
    q, k, v, segments, _ = case(heads=2)
    out = attention(q, k, v, segments)
    for b, s in [(0, 0), (0, 5), (0, 9), (1, 0), (1, 7)]:
        np.testing.assert_allclose(out[b, s], v[b, s], rtol=1e-6)


@pytest.mark.parametrize("backend", FUNCTIONS)
def test_blocks_of_later_keys_are_not_computed(backend):
    """NaN times a probability of zero is NaN: what was computed would show."""
    q, k, v, segments, g = case(np.ones((1, 384)), heads=1, groups=1, size=16)
    last = jnp.arange(384)[None, :, None, None] >= 256
    k, v = (jnp.where(last, jnp.nan, x) for x in (k, v))
    out, dq, _, _ = value_and_gradients(FUNCTIONS[backend], q, k, v, segments, g)
    for part in (out, dq):
        assert np.isfinite(part[:, :256]).all()
        assert np.isnan(part[:, 256:]).all()


def test_blocks_of_other_segments_are_not_computed(monkeypatch):
    monkeypatch.setattr(chunked_attention, "BLOCK", 4)
    q, k, v, segments, g = case(np.array([[1] * 3 + [2] * 5 + [3] * 4]))
    k = k[:1].at[:, :4].set(jnp.nan)
    alone = value_and_gradients(chunked, q[:1], k, v[:1], segments[:1], g[:1])
    assert np.isfinite(alone[0][:, 8:]).all()
    assert np.isfinite(alone[1][:, 8:]).all()
    assert np.isnan(alone[0][:, 4:8]).all()


@pytest.mark.parametrize("block", [128, 4])
def test_other_segments_do_not_matter(monkeypatch, block):
    """Not even in the last bit: what is masked has probability zero, exactly."""
    monkeypatch.setattr(chunked_attention, "BLOCK", block)
    q, k, v, segments, _ = case()
    out = attention(q, k, v, segments)
    mine = SHORT[0] == 2
    others = np.flatnonzero(~mine)
    k2, v2 = k.at[0, others].set(100.0), v.at[0, others].set(-100.0)
    changed = attention(q, k2, v2, segments)
    np.testing.assert_array_equal(changed[0, mine], out[0, mine])
    assert np.any(changed[0, others] != out[0, others])


def test_gradients_equal_those_of_separate_rows():
    inputs = case()
    packed = value_and_gradients(attention, *inputs)
    where = np.flatnonzero(SHORT[0] == 2)
    alone = value_and_gradients(attention, *(part[:1, where] for part in inputs))
    assert_close(tuple(part[:1, where] for part in packed), alone, 1e-5)


def test_bfloat16_scores_are_float32():
    """Scores near 256 differ by less than bfloat16 can tell; the softmax must still see it."""
    q = jnp.full((1, 2, 1, 4), 16.0, jnp.bfloat16)
    k = jnp.stack([jnp.full((4,), 8.0), jnp.array([8.0, 8.0, 8.0, 8.0625])])
    k = k.reshape(1, 2, 1, 4).astype(jnp.bfloat16)
    v = jnp.array([0.0, 1.0], jnp.bfloat16).reshape(1, 2, 1, 1) * jnp.ones((4,), jnp.bfloat16)
    ones = jnp.ones((1, 2), jnp.int32)
    cache = k.swapaxes(1, 2), v.swapaxes(1, 2)
    decoded = cached_attention(q[:, 1:], *cache, ones > 0)
    for out in (attention(q, k, v, ones)[:, 1:], decoded):
        assert out.dtype == jnp.bfloat16
        # Scores 256 and 256.5: in bfloat16 both are 256 and the probability were 0.5.
        expected = 1 / (1 + np.exp(-0.5))
        np.testing.assert_allclose(out[0, 0, 0].astype(np.float32), expected, rtol=2**-8)


def largest_array(function, *shapes) -> int:
    """Elements of the largest array in the program that XLA compiles for this machine."""
    text = jax.jit(function).lower(*shapes).compile().as_text()
    dimensions = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text)
    return max(int(np.prod([int(size) for size in found.split(",")])) for found in dimensions)


@pytest.mark.slow
@pytest.mark.parametrize("length", [2048, 2047])
def test_no_array_of_scores(length):
    q, segments = (
        jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32),
        jax.ShapeDtypeStruct((1, length), jnp.int32),
    )
    gradients = functools.partial(value_and_gradients, attention)
    assert largest_array(gradients, q, q, q, segments, q) < length**2 / 8


def test_cached_attention_is_attention():
    """Of each query alone to the keys up to it of its segment; no key: zeros."""
    inputs = case()
    q, k, v, segments, _ = inputs
    segments = np.asarray(segments)
    keys, values = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    index = np.arange(q.shape[1])
    outputs = [
        cached_attention(
            q[:, i : i + 1], keys, values, (segments == segments[:, i : i + 1]) & (index <= i)
        )
        for i in index
    ]
    assert relative_error(jnp.concatenate(outputs, axis=1), oracle(*inputs)[0]) < 2e-6
    assert not cached_attention(q[:, :1], keys, values, np.zeros_like(segments, bool)).any()


def test_the_configuration_offers_every_backend():
    assert set(get_args(get_args(get_type_hints(ModelOptions)["attention"])[0])) == set(BACKENDS)
    platforms = ("cpu", "gpu", "tpu")
    assert [default_backend(platform) for platform in platforms] == [*FUNCTIONS]
    for platform in platforms:
        assert check_backend(None, platform, 128, jnp.bfloat16) == default_backend(platform)
        assert check_backend("chunked", platform, 8, jnp.float32) == "chunked"
    assert check_backend("cudnn", "gpu", 128, jnp.bfloat16) == "cudnn"


@pytest.mark.parametrize(
    ("backend", "platform", "head_size", "dtype", "expected"),
    [
        (
            "splash",
            "cpu",
            128,
            jnp.bfloat16,
            "model.attention=splash: runs on tpu; this is cpu",
        ),
        ("cudnn", "tpu", 128, jnp.bfloat16, "model.attention=cudnn: runs on gpu; this is tpu"),
        (None, "gpu", 8, jnp.bfloat16, "model.attention=pallas_triton: needs heads of at least 16"),
        ("cudnn", "gpu", 60, jnp.bfloat16, "model.attention=cudnn: needs heads of a multiple of 8"),
        ("cudnn", "gpu", 256, jnp.bfloat16, "model.attention=cudnn: needs heads of a multiple of"),
        (
            "cudnn",
            "gpu",
            64,
            jnp.float32,
            "model.attention=cudnn: needs model.compute_dtype=bfloat",
        ),
    ],
)
def test_a_backend_that_cannot_run_is_an_error(backend, platform, head_size, dtype, expected):
    with pytest.raises(UserError, match=r"; write chunked, which always runs$") as caught:
        check_backend(backend, platform, head_size, dtype)
    assert str(caught.value).startswith(expected)


def test_unknown_backend():
    q, k, v, segments, _ = case()
    with pytest.raises(ValueError, match="'flash' is none of chunked, pallas_triton"):
        attention(q, k, v, segments, "flash")
