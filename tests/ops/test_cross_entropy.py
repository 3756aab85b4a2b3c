"""The weighted, chunked cross-entropy against log_softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import array_sizes, assert_close

from olmoe_jax.ops import cross_entropy as module
from olmoe_jax.ops.cross_entropy import weighted_cross_entropy


def case(seed=0):
    random = np.random.default_rng(seed)
    hidden = jnp.asarray(random.normal(size=(2, 12, 5)), jnp.float32)
    head = jnp.asarray(random.normal(size=(11, 5)), jnp.float32)
    targets = jnp.asarray(random.integers(0, 11, (2, 12)))
    weights = jnp.asarray(random.random((2, 12)) * (random.random((2, 12)) < 0.7), jnp.float32)
    return hidden, head, targets, weights


def oracle(hidden, head, targets, weights):
    log_probabilities = jax.nn.log_softmax(hidden @ head.T)
    return -jnp.sum(weights * jnp.take_along_axis(log_probabilities, targets[..., None], 2)[..., 0])


def both(function, hidden, head, targets, weights):
    # A function of its own each time: a cached trace would not see a changed CHUNK.
    def loss(hidden, head):
        return function(hidden, head, targets, weights)

    return jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, head)


@pytest.mark.parametrize("chunk", [512, 4, 5])
def test_value_and_gradients(monkeypatch, chunk):
    monkeypatch.setattr(module, "CHUNK", chunk)
    assert_close(both(weighted_cross_entropy, *case()), both(oracle, *case()), 1e-6)


def test_chunks_keep_the_logits_small(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 4)
    sizes = array_sizes(jax.value_and_grad(weighted_cross_entropy, (0, 1)), *case())
    assert max(sizes) < 2 * 12 * 11
    assert 2 * 4 * 11 in sizes


def test_by_hand():
    """Equal logits over 4 tokens: each position costs log 4."""
    loss = weighted_cross_entropy(
        jnp.ones((1, 3, 2)), jnp.ones((4, 2)), jnp.array([[0, 1, 3]]), jnp.array([[1.0, 0.5, 0.0]])
    )
    np.testing.assert_allclose(loss, 1.5 * np.log(4), rtol=1e-6)


@pytest.mark.parametrize("chunk", [512, 4])
def test_zero_weight_hides_an_infinite_loss(monkeypatch, chunk):
    monkeypatch.setattr(module, "CHUNK", chunk)
    hidden, head, targets, weights = case()
    expected = weighted_cross_entropy(hidden, head, targets, weights)
    skipped = np.argwhere(np.asarray(weights) == 0)[0]
    broken = hidden.at[tuple(skipped)].set(jnp.inf)
    loss = weighted_cross_entropy(broken, head, targets, weights)
    assert loss == expected
    assert not np.isfinite(weighted_cross_entropy(broken, head, targets, weights + 1))


def test_bfloat16_logits_are_float32():
    hidden = jnp.full((1, 1, 1), 256.0, jnp.bfloat16)
    head = jnp.array([[1.0], [1.0078125]], jnp.bfloat16)  # logits 256 and 258
    loss = weighted_cross_entropy(hidden, head, jnp.array([[0]]), jnp.ones((1, 1)))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, np.log1p(np.exp(2.0)), rtol=1e-5)
