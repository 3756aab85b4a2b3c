"""float32 in 16 bits: stochastic rounding and the two halves."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from olmoe_jax.training.rounding import join_float32, split_float32, stochastic_round

KEYS = np.random.default_rng(0).integers(0, 2**32, (4096, 2), dtype=np.uint32)
rounded = jax.jit(stochastic_round)
RATIO = 2.0**-7
"""Distance of the bfloat16 numbers from 1 to 2."""


def any_float32(count: int) -> np.ndarray:
    """Every sign and exponent, without those that are no numbers."""
    bits = np.random.default_rng(1).integers(0, 2**32, count, dtype=np.uint32)
    values = bits.view(np.float32)
    return values[np.isfinite(values) & (np.abs(values) < 3e38)]


def test_what_bfloat16_holds_stays():
    values = np.array([*any_float32(1000).astype(ml_dtypes.bfloat16), 0.0, -0.0, 1.0, -2.0])
    values = values.astype(ml_dtypes.bfloat16)
    for key in KEYS[:5]:
        ours = np.asarray(rounded(values.astype(np.float32), key))
        assert ours.tobytes() == values.tobytes()


def test_one_of_the_two_neighbours():
    values = any_float32(1000)
    low = (values.view(np.uint32) >> 16).astype(np.uint16)
    ours = np.asarray(rounded(values, KEYS[0])).view(np.uint16)
    assert set(ours - low) == {0, 1}


@pytest.mark.parametrize("share", [0.001, 0.3, 0.5, 0.9])
def test_the_mean_is_exact(share):
    """Over the elements of one draw, and of one element over many draws."""
    value = np.float32(1 + share * RATIO)
    sigma = np.sqrt(share * (1 - share))
    elements = np.full((64, 4096), value)
    up = (np.asarray(rounded(elements, KEYS[0]), np.float64) - 1) / RATIO
    assert abs(up.mean() - share) < 4 * sigma / np.sqrt(up.size)
    draws = jax.jit(jax.vmap(stochastic_round, (None, 0)))(elements[0, :16], KEYS)
    up = (np.asarray(draws, np.float64) - 1) / RATIO
    assert (np.abs(up.mean(axis=0) - share) < 5 * sigma / np.sqrt(len(KEYS))).all()


def test_draws_are_independent():
    """Of neighbours, of rows, of the same element with other keys."""
    half = np.full((512, 512), np.float32(1 + RATIO / 2))

    def signs(key):
        return 2 * (np.asarray(rounded(half, key), np.float64) - 1) / RATIO - 1

    one, close = signs(KEYS[0]), [KEYS[0] ^ np.uint32([1, 0]), KEYS[0] ^ np.uint32([0, 1])]
    pairs = [(one[1:], one[:-1]), (one[:, 1:], one[:, :-1])]
    pairs += [(one, signs(key)) for key in (KEYS[1], *close)]
    for a, b in pairs:
        assert abs((a * b).mean()) < 4 / np.sqrt(a.size)


def test_an_average_moves_where_rounding_to_nearest_stands_still():
    """A second moment's: 0.999 of itself and 0.001 of what comes."""

    def after(steps, store):
        def step(i, average):
            return store(0.999 * average.astype(jnp.float32) + 0.001, i)

        start = jnp.full(4096, 0.5, jnp.bfloat16)
        return np.asarray(jax.jit(lambda x: jax.lax.fori_loop(0, steps, step, x))(start), float)

    keys = jnp.asarray(KEYS)
    exact = 1 - 0.5 * 0.999**1000
    ours = after(1000, lambda x, i: stochastic_round(x, keys[i]))
    assert ours.mean() == pytest.approx(exact, rel=3e-3)
    nearest = after(1000, lambda x, i: x.astype(jnp.bfloat16))
    assert (nearest == 0.5).all()


def test_halves_lose_nothing():
    bits = np.random.default_rng(2).integers(0, 2**32, 10000, dtype=np.uint32)
    bits = np.concatenate([bits, bits & 0xFFFF0000 | 0x8000, bits | 0xFFFF, [0, 0x80000000]])
    values = bits.astype(np.uint32).view(np.float32)
    upper, lower = jax.jit(split_float32)(values)
    assert (upper.dtype, lower.dtype) == (jnp.bfloat16, jnp.uint16)
    assert np.asarray(jax.jit(join_float32)(upper, lower)).tobytes() == values.tobytes()
    # The upper half is the nearest, which the model computes with.
    numbers = any_float32(10000)
    numbers = numbers[numbers.view(np.uint32) & 0xFFFF != 0x8000]
    upper = np.asarray(jax.jit(split_float32)(numbers)[0])
    assert upper.tobytes() == numbers.astype(ml_dtypes.bfloat16).tobytes()
