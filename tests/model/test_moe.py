"""The mixture-of-experts block against the oracle, the published formula and numbers by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import (
    ROUTER_SETTINGS,
    array_sizes,
    assert_close,
    count_matmuls,
    moe_oracle,
    relative_error,
)
from tiny import tiny_config

from olmoe_jax.model.config import ModelSettings
from olmoe_jax.model.moe import MoE
from olmoe_jax.model.parameters import merge

METHODS = ("conventional", "frozen", "densemixer")
# Distinct primes, so that the size of an array tells its dimensions; K = 2.
B, S, D, F, E = 2, 6, 11, 7, 5
IS_TOKEN = np.array([[True] * 6, [True] * 4 + [False] * 2])


def block_config(norm_topk=False, **changes):
    return tiny_config(
        hidden_size=D, intermediate_size=F, num_experts=E, norm_topk_prob=norm_topk, **changes
    )


def block_function(config, method, limit=None):
    """f(x [B, S, D], router, (gate, up, down), is_token) -> (y, statistics) of one layer."""
    settings = ModelSettings(**ROUTER_SETTINGS[method], router_gradient_experts=limit)
    graph = nnx.split(nnx.eval_shape(lambda: MoE(config, settings, rngs=nnx.Rngs(0))))[0]

    def block(x, router, experts, is_token=IS_TOKEN):
        names = ("experts.gate", "experts.up", "experts.down")
        weights = {"router": router, **dict(zip(names, experts, strict=True))}
        return merge(graph, weights)(x, jnp.asarray(is_token))

    return block


def case(seed=0, rows=B, length=S):
    """(x, router, experts) and the gradient of the output."""
    random = np.random.default_rng(seed)
    shapes = {"x": (rows, length, D), "router": (D, E), "g": (rows, length, D)}
    shapes |= {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
    a = {name: jnp.asarray(random.normal(size=s), jnp.float32) for name, s in shapes.items()}
    return (a["x"], a["router"], (a["gate"], a["up"], a["down"])), a["g"]


def pull(function, inputs, g):
    """(y, (dx, drouter, dexperts)), compiled."""

    @jax.jit
    def run(g, *inputs):
        y, pullback = jax.vjp(function, *inputs)
        return y, pullback(g)

    return run(g, *inputs)


@functools.cache
def results(method, norm_topk, limit=None):
    block = block_function(block_config(norm_topk), method, limit)
    return pull(lambda *inputs: block(*inputs)[0], *case())


@functools.cache
def oracle_results(method, norm_topk):
    def function(x, router, experts):
        y = moe_oracle(
            x.reshape(-1, D),
            jnp.asarray(IS_TOKEN).reshape(-1),
            router,
            experts,
            block_config(norm_topk),
            method,
        )
        return y.reshape(x.shape)

    # Not compiled as a whole: its operations are the same for every method.
    inputs, g = case()
    y, pullback = jax.vjp(function, *inputs)
    return y, pullback(g)


@pytest.mark.parametrize("norm_topk", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_equals_the_oracle(method, norm_topk):
    """Values, and the gradients of x, the router and the experts."""
    actual, expected = results(method, norm_topk), oracle_results(method, norm_topk)
    assert np.any(actual[1][1]) == (method != "frozen")
    assert_close(actual, expected, 2e-6)


def router_gradient_by_formula(norm_topk, limit=E):
    """dL/dW by the formulas of docs/reading.md, token by token in float64."""
    (x, router, experts), g = jax.tree.map(lambda a: np.asarray(a, np.float64), case())
    gate, up, down = experts
    total = np.zeros((D, E))
    for b, s in np.argwhere(IS_TOKEN):
        z = x[b, s] @ router
        p = np.exp(z - z.max())
        p /= p.sum()
        ranked = np.argsort(-p)
        selected, counted = np.zeros(E, bool), np.zeros(E, bool)
        selected[ranked[:2]], counted[ranked[:limit]] = True, True
        scores = np.zeros(E)
        for e in range(E):
            h = x[b, s] @ gate[e]
            scores[e] = g[b, s] @ ((h / (1 + np.exp(-h)) * (x[b, s] @ up[e])) @ down[e])
        dp = np.where(counted, scores, 0)
        if norm_topk:
            chosen_sum = p[selected].sum()
            dp = dp / chosen_sum - selected * (scores * p)[selected].sum() / chosen_sum**2
        total += np.outer(x[b, s], p * (dp - p @ dp))
    return total


@pytest.mark.parametrize("norm_topk", [False, True])
def test_router_gradient_is_the_published_formula(norm_topk):
    drouter = results("densemixer", norm_topk)[1][1]
    assert relative_error(drouter, router_gradient_by_formula(norm_topk)) < 1e-6


@pytest.mark.slow
def test_router_gradient_experts_is_a_dial():
    """m=K: conventional; m=E: exact; between: the m most probable experts count."""
    norm_topk = True
    exact = results("densemixer", norm_topk)
    assert_close(results("densemixer", norm_topk, E), exact, 0)
    assert_close(results("densemixer", norm_topk, 2), results("conventional", norm_topk), 1e-6)
    between = results("densemixer", norm_topk, 4)[1][1]
    assert relative_error(between, router_gradient_by_formula(norm_topk, 4)) < 1e-6
    assert relative_error(between, exact[1][1]) > 1e-3


def test_methods_share_value_and_expert_gradients():
    conventional, frozen, densemixer = (results(method, False) for method in METHODS)
    np.testing.assert_array_equal(densemixer[0], conventional[0])
    np.testing.assert_array_equal(frozen[0], conventional[0])
    assert_close(densemixer[1][2], conventional[1][2], 0)
    # A frozen router still passes gradient to x.
    assert_close(frozen[1][0], conventional[1][0], 0)
    assert_close(frozen[1][2], conventional[1][2], 0)
    assert relative_error(densemixer[1][0], conventional[1][0]) > 1e-2


@pytest.mark.parametrize(
    ("method", "norm_topk", "limit"),
    [("conventional", True, None), ("densemixer", True, None), ("densemixer", False, 4)],
)
def test_padding_changes_nothing(method, norm_topk, limit):
    """Whatever is in padding tokens, and whatever gradient their outputs get."""
    block = block_function(block_config(norm_topk), method, limit)
    inputs, g = case()

    @jax.jit
    def run(inputs, g):
        y, pullback, statistics = jax.vjp(block, *inputs, has_aux=True)
        return y, pullback(g), statistics

    y, (dx, *dweights), statistics = run(inputs, g)
    padding = ~IS_TOKEN
    garbage = (np.where(padding[..., None], 50, inputs[0]), *inputs[1:])
    y2, (dx2, *dweights2), statistics2 = run(garbage, np.where(padding[..., None], -1e4, g))
    np.testing.assert_array_equal(y2, y)
    assert not np.any(y[padding])
    np.testing.assert_array_equal(dx2, dx)
    assert not np.any(dx[padding])
    assert np.all(np.any(dx[IS_TOKEN], axis=-1))
    assert_close(dweights2, dweights, 0)
    assert_close(statistics2, statistics, 0)


def test_statistics_are_sums_over_real_tokens():
    block = block_function(block_config(), "conventional")
    inputs, _ = case()
    statistics = jax.jit(block)(*inputs)[1]
    logits = np.asarray(inputs[0], np.float64)[IS_TOKEN] @ np.asarray(inputs[1], np.float64)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    selected = np.argsort(-p)[:, :2]
    assert statistics.load.sum() == IS_TOKEN.sum() * 2
    np.testing.assert_array_equal(statistics.load, np.bincount(selected.ravel(), minlength=E))
    np.testing.assert_allclose(statistics.probability, p.sum(0), rtol=1e-5)
    np.testing.assert_allclose(statistics.entropy, -(p * np.log(p)).sum(), rtol=1e-5)
    assert statistics.logits is None


def test_a_batch_of_padding_gives_zeros():
    block = block_function(block_config(norm_topk=True), "densemixer")
    inputs, g = case()
    nothing = np.zeros_like(IS_TOKEN)
    y, gradients = pull(lambda *inputs: block(*inputs, nothing)[0], inputs, g)
    assert not np.any(y)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients))


def test_by_hand():
    """One token, two experts, one selected: everything can be followed with a calculator.

    Logits (log 3, 0) make p = (3/4, 1/4). With unit gate and down, expert 0's up doubles and
    expert 1's up negates: E_0(x) = 2 silu(1) x, E_1(x) = -silu(1) x at x = (1, 0).
    """
    config = tiny_config(hidden_size=2, intermediate_size=2, num_experts=2, num_experts_per_token=1)
    one, silu = jnp.eye(2), 1 / (1 + np.exp(-1))
    x = jnp.array([[[1.0, 0.0]]])
    router = jnp.array([[np.log(3), 0.0], [0.0, 0.0]], jnp.float32)
    experts = (jnp.stack([one, one]), jnp.stack([2 * one, -one]), jnp.stack([one, one]))
    is_token = np.array([[True]])
    expected = {
        "conventional": 3 / 16 * (2 * silu),  # p_0 (1 - p_0) s_0
        "densemixer": 3 / 16 * (2 * silu + silu),  # p_0 (1 - p_0) (s_0 - s_1)
        "frozen": 0.0,
    }
    for method, dz in expected.items():
        block = block_function(config, method)

        @jax.jit
        def run(g, *inputs, block=block):
            y, pullback, statistics = jax.vjp(
                lambda *inputs: block(*inputs, is_token), *inputs, has_aux=True
            )
            return y, statistics, pullback(g)

        g = jnp.array([[[1.0, 0.0]]])
        y, statistics, (_, drouter, dexperts) = run(g, x, router, experts)
        np.testing.assert_allclose(y[0, 0], [3 / 4 * 2 * silu, 0], rtol=1e-6)
        np.testing.assert_array_equal(statistics.load, [1, 0])
        np.testing.assert_allclose(statistics.probability, [3 / 4, 1 / 4], rtol=1e-6)
        np.testing.assert_allclose(statistics.entropy, np.log(4) - 3 / 4 * np.log(3), rtol=1e-6)
        np.testing.assert_allclose(drouter, [[dz, -dz], [0, 0]], rtol=1e-5, atol=1e-7)
        assert not np.any(dexperts[0][1]), "the expert that was not selected learns nothing"
        np.testing.assert_allclose(dexperts[2][0], [[3 / 4 * 2 * silu, 0], [0, 0]], rtol=1e-6)


@pytest.mark.parametrize("limit", [None, 4])
def test_densemixer_costs_nothing_in_the_forward(limit):
    """The forward has the conventional matmuls, the backward three more (in a loop or grouped)."""
    inputs, g = case(rows=1, length=13)
    is_token = np.ones((1, 13), bool)

    def forward(method):
        block = block_function(block_config(), method, limit)
        return lambda *inputs: block(*inputs, is_token)[0]

    def step(method):
        return lambda g, *inputs: jax.vjp(forward(method), *inputs)[1](g)

    conventional, densemixer = forward("conventional"), forward("densemixer")
    assert count_matmuls(densemixer, *inputs) == count_matmuls(conventional, *inputs) > 0
    dense, sparse = step("densemixer"), step("conventional")
    assert count_matmuls(dense, g, *inputs) == count_matmuls(sparse, g, *inputs) + 3
    # Nothing has tokens, experts and a width at once: 13 tokens, 5 experts, widths 11 and 7.
    for size in array_sizes(dense, g, *inputs):
        assert size == 0 or size % (13 * E * D)
        assert size == 0 or size % (13 * E * F)


def test_router_is_float32_under_bfloat16():
    """Two logits that bfloat16 cannot tell apart must still choose the larger."""
    config = tiny_config(hidden_size=2, intermediate_size=2, num_experts=2, num_experts_per_token=1)
    settings = ModelSettings(compute_dtype=jnp.bfloat16)
    graph = nnx.split(nnx.eval_shape(lambda: MoE(config, settings, rngs=nnx.Rngs(0))))[0]
    ones = jnp.ones((2, 2, 2))
    weights = {"experts.gate": ones, "experts.up": ones, "experts.down": ones}
    for winner in (0, 1):
        router = jnp.ones((2, 2)).at[0, winner].add(2**-12)
        block = merge(graph, weights | {"router": router})
        x = jnp.ones((1, 1, 2), jnp.bfloat16)
        y, statistics = jax.jit(
            lambda x, block=block: block(x, jnp.array([[True]]), with_logits=True)
        )(x)
        assert y.dtype == jnp.bfloat16
        assert statistics.logits.dtype == jnp.float32
        assert statistics.load[winner] == 1
