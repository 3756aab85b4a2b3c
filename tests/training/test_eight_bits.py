"""Moments in 8 bits: what a number becomes, and that AdamW moves as with float32 moments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error
from training.test_training_storage import SHAPES, make, updates

from olmoe_jax.training.eight_bits import BLOCK, EightBits, decode, encode, scales_of, zeros

INT8 = jnp.dtype("int8")
KEYS = np.random.default_rng(0).integers(0, 2**32, (1024, 2), dtype=np.uint32)
STEPS = {"int8": (np.arange(128) / 127) ** 4, "uint8": (np.arange(256) / 255) ** 8}
"""What a code stands for, as a share of its block's largest magnitude."""
decoded = jax.jit(decode)
both = pytest.mark.parametrize("dtype", STEPS)


def numbers(shape, dtype):
    """Of eight decades, and both signs where there are signs."""
    random = np.random.default_rng(1)
    sizes = 10.0 ** random.uniform(-8, 0, shape)
    signs = random.choice([-1, 1], shape) if dtype == "int8" else 1
    return (sizes * signs).astype(np.float32)


@functools.partial(jax.jit, static_argnums=1)
def encoded(x, dtype, key):
    return encode(x, scales_of(x), dtype, key)


def largest(x):
    """Each number's block's largest magnitude."""
    size = x.shape[-1]
    length = -(-size // -(-size // BLOCK))
    parts = [
        np.broadcast_to(np.abs(part).max(-1, keepdims=True), part.shape)
        for part in (x[..., at : at + length] for at in range(0, size, length))
    ]
    return np.concatenate(parts, axis=-1)


@both
@pytest.mark.parametrize("shape", [(1,), (7,), (257,), (3, 2048), (2, 5, 300), (0, 4)])
def test_one_of_the_two_neighbours(shape, dtype):
    x, steps = numbers(shape, dtype), STEPS[dtype]
    stored = encoded(x, dtype, KEYS[0])
    assert (stored.codes.shape, stored.codes.dtype) == (shape, dtype)
    assert stored.scales.shape == (*shape[:-1], -(-shape[-1] // BLOCK))
    codes, shares = np.asarray(stored.codes, int), np.abs(x) / largest(x)
    assert (np.sign(codes) == np.sign(x)).all()
    lower, upper = (steps[np.clip(np.abs(codes) + by, 0, len(steps) - 1)] for by in (-1, 1))
    assert (lower <= shares * (1 + 1e-5)).all()
    assert (shares <= upper * (1 + 1e-5)).all()
    ours = np.asarray(decoded(stored), np.float64)
    np.testing.assert_allclose(ours, np.sign(codes) * steps[np.abs(codes)] * largest(x), rtol=2e-6)
    again = encoded(np.asarray(decoded(stored)), dtype, KEYS[1])
    np.testing.assert_array_equal(again.codes, stored.codes)


@both
def test_the_mean_is_exact(dtype):
    """Over many draws, of every number that is not rounded up from below the smallest."""
    x = np.float32([1.0, 0.7, -0.31, 0.02, -1e-3, 4e-5, 1e-7])
    x = np.abs(x) if dtype == "uint8" else x
    draws = jax.jit(jax.vmap(lambda key: decode(encoded(x, dtype, key))))(KEYS)
    draws = np.asarray(draws, np.float64)
    assert (draws.std(axis=0)[1:] > 0).all()
    assert (np.abs(draws.mean(axis=0) - x) <= 5 * draws.std(axis=0) / np.sqrt(len(KEYS))).all()


@both
def test_nothing_becomes_zero_but_zero(dtype):
    x = np.float32([1.0, 1e-25, -1e-12 if dtype == "int8" else 1e-12, 0.0, -0.0])
    ours = np.asarray(decoded(encoded(x, dtype, KEYS[0])))
    assert (np.sign(ours) == np.sign(x)).all()
    nothing = encoded(np.zeros((2, 300), np.float32), dtype, KEYS[0])
    for stored, expected in zip(nothing, zeros((2, 300), dtype), strict=True):
        np.testing.assert_array_equal(stored, expected)
    assert not np.asarray(decoded(nothing)).any()


@pytest.mark.slow
def test_the_update_follows_that_of_float32_moments():
    (parameters, state), (expected, expected_state) = updates(INT8), updates()
    for name, dtype in (("mu", "int8"), ("nu", "uint8")):
        ours, theirs = getattr(state[0], name), getattr(expected_state[0], name)
        for key, shape in SHAPES.items():
            assert isinstance(ours[key], EightBits)
            assert ours[key].codes.dtype == dtype
            ratio = np.asarray(decode(ours[key]), float) / theirs[key]
            assert ratio.shape == shape
            assert abs(np.median(ratio) - 1) < 0.03
    start, _ = updates(rate=0.0)
    moved, should = (p["a"] - start["a"] for p in (parameters, expected))
    # Each element's gradients have a size of their own, over four decades in a block.
    assert relative_error(moved.mean(), should.mean()) < 0.02
    assert np.corrcoef(moved.ravel(), should.ravel())[0, 1] > 0.85


def test_bytes():
    parameters = {"a": jax.ShapeDtypeStruct((16, 64, 2048), jnp.float32)}
    state = jax.eval_shape(make(INT8).init, parameters)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert size / parameters["a"].size == pytest.approx(2 * (1 + 4 / BLOCK), rel=1e-5)
