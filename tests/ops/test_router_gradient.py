"""DenseMixer's router gradient: nothing in the forward, exact and small in the backward."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import array_sizes, count_matmuls, relative_error

from olmoe_jax.ops.grouped_matmul import InStack
from olmoe_jax.ops.linear import (
    ExpertWeights,
    Linear,
    grouped_linear_transposed,
    merged_weight,
)
from olmoe_jax.ops.router_gradient import all_expert_scores, router_gradient

# Distinct primes: the size of an array tells which dimensions it has, however it is arranged.
T, E, D, F, K = 11, 5, 7, 13, 2


def case(seed=0, dtype=np.float32):
    random = np.random.default_rng(seed)
    shapes = {"x": (T, D), "gate": (E, D, F), "up": (E, D, F), "down": (E, F, D), "g": (T, D)}
    arrays = {name: jnp.asarray(random.normal(size=s), dtype) for name, s in shapes.items()}
    probabilities = jax.nn.softmax(jnp.asarray(random.normal(size=(T, E)), jnp.float32))
    return probabilities, arrays


def candidates_of(probabilities, m):
    """The experts ranked K…m-1, as the block passes them, with one padding token."""
    ranked = np.argsort(-np.asarray(probabilities), axis=1)[:, K:m].astype(np.int32)
    ranked[3] = E
    return jnp.asarray(ranked)


def run(m, probabilities, arrays, backend=None, dtype=None):
    """Value and all gradients of the term; m=None: all experts."""
    candidates = m and candidates_of(probabilities, m)

    def term(probabilities, x, gate, up, down):
        experts = ExpertWeights(Linear(gate), Linear(up), Linear(down))
        return router_gradient(x, probabilities, experts, candidates, dtype, backend)

    @jax.jit
    def value_and_gradients(g, *inputs):
        value, pullback = jax.vjp(term, *inputs)
        return value, pullback(g)

    inputs = [arrays[name] for name in ("x", "gate", "up", "down")]
    return *value_and_gradients(arrays["g"], probabilities, *inputs), candidates


def score_oracle(arrays):
    """<g_t, E_e(x_t)>, one pair at a time in float64."""
    x, gate, up, down, g = (
        np.asarray(arrays[n], np.float64) for n in ("x", "gate", "up", "down", "g")
    )
    scores = np.zeros((T, E))
    for t, e in np.ndindex(T, E):
        z = x[t] @ gate[e]
        scores[t, e] = g[t] @ ((z / (1 + np.exp(-z)) * (x[t] @ up[e])) @ down[e])
    return scores


def test_forward_is_zero_and_only_probabilities_get_gradient():
    for m in (None, 3):
        value, (_, *others), _ = run(m, *case())
        assert value.shape == (T, D)
        assert not np.any(value)
        assert not any(np.any(other) for other in others)


def test_all_experts():
    probabilities, arrays = case()
    scores = run(None, probabilities, arrays)[1][0]
    assert scores.dtype == jnp.float32
    assert relative_error(scores, score_oracle(arrays)) < 1e-6


@pytest.mark.parametrize(
    ("m", "backend"), [*((m, "blocked") for m in range(K, E + 1)), (4, "ragged_dot")]
)
def test_candidates_only(m, backend):
    probabilities, arrays = case(seed=m)
    if m == K:
        assert candidates_of(probabilities, m).shape == (T, 0)
    _, (scores, *_), candidates = run(m, probabilities, arrays, backend)
    expected, wanted = score_oracle(arrays), np.zeros((T, E + 1), bool)
    wanted[np.arange(T)[:, None], candidates] = True
    wanted = wanted[:, :E]
    assert wanted.sum() == (T - 1) * (m - K)
    np.testing.assert_array_equal(np.asarray(scores)[~wanted], 0)
    assert relative_error(scores, np.where(wanted, expected, 0)) < 1e-6


@pytest.mark.parametrize("float8", [False, True])
def test_the_stack_of_all_layers_is_read_in_place(float8):
    """The bits are those of one layer's matrices, which are not read."""
    random, (_, arrays), (_, others) = np.random.default_rng(1), case(), case(seed=1)
    plain, in_place = [], []
    for name in ExpertWeights._fields:
        weight = arrays[name]
        sizes = (E, weight.shape[1], 2), (E, 2, weight.shape[2])
        map_ = Linear(weight, *(jnp.asarray(random.normal(size=size)) for size in sizes))
        plain.append(map_)
        stack = InStack(jnp.stack([others[name], weight]), jnp.int32(1))
        nothing = jnp.full_like(weight, jnp.nan)
        in_place.append(dataclasses.replace(map_, weight=nothing, stack=stack))
    scores = jax.jit(all_expert_scores, static_argnums=3)
    results = [
        scores(arrays["x"], arrays["g"], ExpertWeights(*maps), float8) for maps in (plain, in_place)
    ]
    assert np.all(np.isfinite(results[0]))
    np.testing.assert_array_equal(*results)


def test_bfloat16_scores_are_float32():
    probabilities, arrays = case(dtype=jnp.bfloat16)
    value, (scores, dx, *_), _ = run(None, probabilities, arrays)
    assert (value.dtype, scores.dtype, dx.dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16)
    assert relative_error(scores, score_oracle(arrays)) < 2e-2


@pytest.mark.parametrize(
    ("m", "dtype", "least", "most"),
    [
        (None, "bfloat16", 1e-4, 2e-2),
        (4, "bfloat16", 1e-4, 2e-2),
        (None, "float8_e4m3fn", 5e-3, 0.1),
    ],
)
def test_lower_precision(m, dtype, least, most):
    """Other dtypes round, and no more than that; a row's or column's size does not matter."""
    probabilities, arrays = case()
    arrays["x"] = arrays["x"].at[2].multiply(2.0**-20).at[4].set(0)
    arrays["gate"] = arrays["gate"].at[1, :, 3].multiply(2.0**12)
    exact = run(m, probabilities, arrays)[1][0]
    scores = run(m, probabilities, arrays, "blocked", dtype)[1][0]
    assert scores.dtype == jnp.float32
    assert least < relative_error(scores, exact) < most
    assert not np.any(scores[4])
    if m is None:
        assert relative_error(scores[2], exact[2]) < most


@pytest.mark.parametrize("m", [None, 4])
def test_memory_and_work(m):
    """No [T, E, D] or [T, E, F], no matmul in the forward, three (in a loop) in the backward."""
    probabilities, arrays = case()
    candidates = m and candidates_of(probabilities, m)
    inputs = (probabilities, *(arrays[name] for name in ("x", "gate", "up", "down")))

    def term(*inputs):
        probabilities, x, *weights = inputs
        experts = ExpertWeights(*map(Linear, weights))
        return router_gradient(x, probabilities, experts, candidates, None, "blocked")

    def backward(g, *inputs):
        return jax.vjp(term, *inputs)[1](g)

    assert count_matmuls(term, *inputs) == 0
    assert count_matmuls(backward, arrays["g"], *inputs) == 3
    for size in array_sizes(backward, arrays["g"], *inputs):
        assert size == 0 or size % (T * E * D)
        assert size == 0 or size % (T * E * F)


@pytest.mark.parametrize("backend", ["blocked", "ragged_dot"])
def test_a_transposed_map_keeps_every_part(backend):
    """Checks x times the transpose against the whole matrix, the adapter's included."""
    random = np.random.default_rng(0)
    parts = {"weight": (E, D, F), "a": (E, D, 2), "b": (E, 2, F)}
    arrays = {
        name: jnp.asarray(random.normal(size=shape), jnp.float32) for name, shape in parts.items()
    }
    map_ = Linear(**arrays, scale=0.5)
    sizes, matrices = np.array([3, 0, 4, 1, 2]), np.asarray(merged_weight(map_))
    rows = random.normal(size=(T, F)).astype(np.float32)
    expert = np.repeat(np.arange(E), sizes)
    expected = np.zeros((T, D))
    expected[: len(expert)] = np.einsum("nf,ndf->nd", rows[: len(expert)], matrices[expert])
    y = grouped_linear_transposed(jnp.asarray(rows), map_, jnp.asarray(sizes, jnp.int32), backend)
    assert relative_error(y, expected) < 1e-6
