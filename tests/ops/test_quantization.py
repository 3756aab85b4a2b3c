"""Block-wise quantization against its definition: the nearest of the values, times a scale."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import assert_same_bits
from scipy.stats import norm

from olmoe_jax.ops.quantization import (
    BLOCK,
    NF4,
    Quantized,
    dequantize,
    dequantized,
    quantize,
    quantized_shapes,
)

VALUES = {"int8": np.arange(-127, 128) / 1.0, "nf4": np.array(NF4)}
SHAPES = [(64, 3), (128, 8), (1, 1), (63, 2), (65, 5), (130, 7), (2, 3, 70, 4)]
on_devices = jax.jit(dequantize, static_argnums=1)


def weights(shape, dtype=np.float32):
    """Normal numbers, of another size in each column, one of them far out."""
    random = np.random.default_rng(0)
    values = random.normal(size=shape) * 10.0 ** random.uniform(-3, 1, shape[-1])
    values[..., 0, 0] *= 20
    return values.astype(dtype)


def whole(scales, width):
    """Each number's scale, from its block's."""
    return np.repeat(scales.astype(np.float64), BLOCK, axis=-2)[..., :width, :]


def test_nf4_are_quantiles_of_the_normal_distribution():
    """As bitsandbytes' create_normal_map makes them: 8 above zero, 7 below, the outermost is 1."""
    above = norm.ppf(np.linspace(0.9677083, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(0.9677083, 0.5, 8)[:-1])
    expected = np.sort([*above, 0.0, *below])
    np.testing.assert_allclose(NF4, expected / expected.max(), atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scheme", VALUES)
def test_every_number_becomes_the_nearest_value(scheme, shape, dtype):
    weight = weights(shape, dtype)
    quantized = quantize(weight, scheme)
    assert quantized.shape == shape
    ours = np.asarray(on_devices(quantized, jnp.float32), np.float64)
    scales, exact = whole(quantized.scales, shape[-2]), weight.astype(np.float64)
    assert ours.shape == shape
    # A scale is the block's largest magnitude (or 1/127 of it), rounded to bfloat16.
    largest = scales * VALUES[scheme].max()
    assert (np.abs(exact) <= largest * (1 + 2**-8)).all()
    candidates = scales[..., None] * VALUES[scheme]
    nearest = np.abs(candidates - exact[..., None]).min(-1)
    np.testing.assert_allclose(np.abs(ours - exact), nearest, atol=1e-6 * largest.max())
    # So the error has a bound: half the widest gap.
    widest = np.diff(VALUES[scheme]).max() / 2
    assert (np.abs(ours - exact) <= widest * scales * (1 + 1e-5)).all()


@pytest.mark.parametrize("scheme", VALUES)
def test_what_it_can_hold_stays(scheme):
    """The values themselves, with scales of powers of two, and zeros."""
    steps = np.random.default_rng(1).choice(VALUES[scheme], (192, 4)).astype(np.float32)
    steps[::BLOCK] = VALUES[scheme].max()
    steps *= np.repeat(2.0 ** np.arange(-3, 9).reshape(3, 4), BLOCK, axis=0).astype(np.float32)
    steps[64:128, 1] = 0
    assert_same_bits(
        {"": np.asarray(on_devices(quantize(steps, scheme), jnp.float32))}, {"": steps}
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("scheme", "bits"), [("int8", 8), ("nf4", 4)])
def test_shapes_and_sizes(scheme, bits, shape):
    quantized, shapes = quantize(weights(shape), scheme), quantized_shapes(shape, scheme)
    assert jax.tree.structure(quantized) == jax.tree.structure(shapes)
    for array, declared in zip(jax.tree.leaves(quantized), jax.tree.leaves(shapes), strict=True):
        assert (array.shape, array.dtype) == (declared.shape, declared.dtype)
    if shape[-2] % BLOCK == 0:
        size = sum(array.nbytes for array in jax.tree.leaves(quantized))
        assert 8 * size == np.prod(shape) * (bits + 16 / BLOCK)


def test_a_tree_with_quantized_parts():
    weight, other = weights((70, 4)), jnp.arange(3.0)
    tree = {"a": quantize(weight, "nf4"), "b": {"c": other}}
    result = dequantized(tree, jnp.bfloat16)
    assert result["b"]["c"] is other
    assert result["a"].dtype == jnp.bfloat16
    rounded = dequantize(tree["a"], jnp.float32).astype(jnp.bfloat16)
    np.testing.assert_array_equal(result["a"], rounded)
    assert isinstance(tree["a"], Quantized)
