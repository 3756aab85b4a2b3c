"""Sorting tokens by expert and back, on numbers small enough to follow by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmoe_jax.ops.routing import combine, dispatch, permute, sort_by_expert

NONE = 3  # "no expert", with E = 3
EXPERTS = jnp.array([[2, 0], [NONE, NONE], [0, 1], [2, 1]], jnp.int32)


def test_sort_by_expert_by_hand():
    order, inverse, group_sizes = sort_by_expert(EXPERTS, 3)
    # Assignment 2t+k: expert 0 has 1, 4; expert 1 has 5, 7; expert 2 has 0, 6; padding 2, 3.
    np.testing.assert_array_equal(order, [1, 4, 5, 7, 0, 6, 2, 3])
    np.testing.assert_array_equal(group_sizes, [2, 2, 2])
    np.testing.assert_array_equal(order[inverse], np.arange(8))
    assert group_sizes.dtype == jnp.int32


def test_only_padding_gives_empty_groups():
    order, _, group_sizes = sort_by_expert(jnp.full((4, 2), NONE), 3)
    np.testing.assert_array_equal(group_sizes, [0, 0, 0])
    np.testing.assert_array_equal(order, np.arange(8))


def test_to_experts_and_back():
    x = jnp.arange(1.0, 9.0).reshape(4, 2)
    order, inverse, _ = sort_by_expert(EXPERTS, 3)
    rows = dispatch(x, order, inverse, 2)
    np.testing.assert_array_equal(rows, np.asarray(x)[[0, 2, 2, 3, 0, 3, 1, 1]])
    y = combine(rows * jnp.arange(8.0)[:, None], order, inverse, 2)
    np.testing.assert_array_equal(y, x * np.array([[0 + 4], [6 + 7], [1 + 2], [3 + 5]]))


def test_sums_are_rounded_once():
    """1 + 2^-8 + 2^-8 is representable in bfloat16, 1 + 2^-8 is not."""
    order, inverse, _ = sort_by_expert(jnp.array([[2, 0, 1]]), 3)
    rows = jnp.array([[2**-8], [2**-8], [1]], jnp.bfloat16)
    y = combine(rows, order, inverse, 3)
    assert (y.dtype, float(y[0, 0])) == (jnp.bfloat16, 1 + 2**-7)


def test_to_and_from_experts_are_transposes():
    random = np.random.default_rng(0)
    order, inverse, _ = sort_by_expert(EXPERTS, 3)
    x, y = (jnp.asarray(random.normal(size=(n, 3)), jnp.float32) for n in (4, 8))
    (gradient,) = jax.vjp(lambda x: dispatch(x, order, inverse, 2), x)[1](y)
    (expected,) = jax.vjp(lambda x: jnp.repeat(x, 2, axis=0)[order], x)[1](y)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)
    (gradient,) = jax.vjp(lambda y: combine(y, order, inverse, 2), y)[1](x)
    np.testing.assert_array_equal(gradient, jnp.repeat(x, 2, axis=0)[order])


@pytest.mark.parametrize("seed", range(3))
def test_permute_round_trip_and_gradient(seed):
    random = np.random.default_rng(seed)
    experts = jnp.asarray(random.integers(0, 6, (13, 3)))
    order, inverse, group_sizes = sort_by_expert(experts, 5)
    assert group_sizes.sum() == np.sum(np.asarray(experts) < 5)
    x = jnp.asarray(random.normal(size=(39, 4)), jnp.float32)
    np.testing.assert_array_equal(permute(permute(x, order, inverse), inverse, order), x)
    g = jnp.asarray(random.normal(size=(39, 4)), jnp.float32)
    (gradient,) = jax.vjp(lambda x: permute(x, order, inverse), x)[1](g)
    (expected,) = jax.vjp(lambda x: x[order], x)[1](g)
    np.testing.assert_array_equal(gradient, expected)
