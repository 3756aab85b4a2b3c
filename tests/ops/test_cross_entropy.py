"""The weighted, chunked cross-entropy against log_softmax, on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import array_sizes, assert_close, count_matmuls

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
    def loss(hidden, head, weights):
        return function(hidden, head, targets, weights)

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(hidden, head, weights)


def expected():
    """In float64."""
    with jax.enable_x64(True):
        hidden, head, targets, weights = (np.asarray(a) for a in case())
        hidden, head, weights = (a.astype(np.float64) for a in (hidden, head, weights))
        value, (*gradients, d_weights) = both(oracle, hidden, head, targets, weights)
        # What weight 0 hides is hidden from the gradient in the weight, too.
        return jax.device_get((value, (*gradients, np.where(weights != 0, d_weights, 0))))


@pytest.mark.parametrize("chunk", [512, 12, 4, 5, 1])
def test_value_and_gradients(monkeypatch, chunk):
    """24 positions in chunks that divide them and that do not."""
    monkeypatch.setattr(module, "CHUNK", chunk)
    assert_close(both(weighted_cross_entropy, *case()), expected(), 1e-6)


def test_cotangent_scales_the_gradients():
    hidden, head, targets, weights = case()

    def loss(hidden, head):
        return jnp.square(weighted_cross_entropy(hidden, head, targets, weights))

    value, (d_hidden, d_head, _) = expected()
    scaled = 2 * value * d_hidden, 2 * value * d_head
    assert_close(jax.grad(loss, (0, 1))(hidden, head), scaled, 1e-6)


def test_chunks_keep_the_logits_small(monkeypatch):
    """Not even one row's logits exist, also where the chunks do not divide the positions."""
    for chunk in (4, 5):
        monkeypatch.setattr(module, "CHUNK", chunk)
        sizes = array_sizes(jax.value_and_grad(weighted_cross_entropy, (0, 1)), *case())
        assert max(sizes) < 12 * 11
        assert chunk * 11 in sizes


def test_only_wanted_matmuls():
    """The loss alone computes logits; a frozen head gets no gradient."""
    assert count_matmuls(weighted_cross_entropy, *case()) == 1
    assert count_matmuls(jax.grad(weighted_cross_entropy, (0, 1)), *case()) == 3
    assert count_matmuls(jax.grad(weighted_cross_entropy), *case()) == 2
    assert_close(jax.grad(weighted_cross_entropy)(*case()), expected()[1][0], 1e-6)


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
    expected = both(weighted_cross_entropy, hidden, head, targets, weights)
    skipped = np.argwhere(np.asarray(weights) == 0)[0]
    broken = hidden.at[tuple(skipped)].set(jnp.inf)
    assert_close(both(weighted_cross_entropy, broken, head, targets, weights), expected, 0)
    assert not np.isfinite(weighted_cross_entropy(broken, head, targets, weights + 1))


def test_bfloat16_logits_are_float32():
    hidden = jnp.full((1, 1, 1), 256.0, jnp.bfloat16)
    head = jnp.array([[1.0], [1.0078125]], jnp.bfloat16)  # logits 256 and 258
    loss = weighted_cross_entropy(hidden, head, jnp.array([[0]]), jnp.ones((1, 1)))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, np.log1p(np.exp(2.0)), rtol=1e-5)


def test_bfloat16_is_near_float32():
    """The head's gradient adds up in its own dtype, whatever the compute dtype."""
    hidden, head, targets, weights = case()
    loss, gradients = both(
        weighted_cross_entropy, hidden.astype(jnp.bfloat16), head, targets, weights
    )
    assert loss.dtype == jnp.float32
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32, jnp.float32]
    assert_close((loss, gradients), expected(), 2e-2)


def test_the_heads_gradient_adds_up_in_float32(monkeypatch):
    """4,096 equal contributions, which a bfloat16 sum would stop taking at 256."""
    monkeypatch.setattr(module, "CHUNK", 1)
    hidden = jnp.ones((1, 4096, 1), jnp.bfloat16)
    arguments = hidden, jnp.zeros((2, 1)), jnp.zeros((1, 4096), int), jnp.ones((1, 4096))
    np.testing.assert_array_equal(both(weighted_cross_entropy, *arguments)[1][1], [[-2048], [2048]])
