"""Matmuls of a decode step: of few rows, and of the experts in use."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

from olmoe_jax.ops import decoding
from olmoe_jax.ops.decoding import (
    experts_by_gather,
    experts_by_loop,
    matmul_by_rows,
    transposed_matmul_in_parts,
)
from olmoe_jax.ops.linear import Linear


@pytest.mark.parametrize("width", [512, 510, 509, 16])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_matmuls_of_few_rows(width, dtype):
    """Four rows of the matrix at a time, or as many as divide the width; parts, or only one."""
    random = np.random.default_rng(width)
    x = jnp.asarray(random.normal(size=(3, 1, width)), dtype)
    matrices = jnp.asarray(random.normal(size=(2, 3, width, 200)), dtype)
    exact = np.asarray(x, np.float64) @ np.asarray(matrices[1, 2], np.float64)
    out = jax.jit(matmul_by_rows)(x, matrices, 1, 2)
    assert out.dtype == dtype
    tolerance = 1e-6 if dtype == jnp.float32 else 5e-3  # bfloat16 in the last rounding only
    assert_close(out, exact, tolerance)
    transposed = jax.jit(transposed_matmul_in_parts)(x[:, 0], jnp.swapaxes(matrices[1, 2], 0, 1))
    assert_close(transposed, exact[:, 0], 1e-6)


def test_the_head_takes_as_many_turns_as_its_bytes_need():
    """Chat tokens may make the vocabulary a prime: 4,099 rows, not one of them a turn."""
    matrix = jax.ShapeDtypeStruct((4099, 512), jnp.float32)
    x = jax.ShapeDtypeStruct((1, 512), jnp.float32)
    program = jax.make_jaxpr(transposed_matmul_in_parts)(x, matrix)
    turns = [equation.params["length"] for equation in program.eqns if "length" in equation.params]
    assert turns == [64]  # of 64 rows each; a rest of 3 follows
    random = np.random.default_rng(0)
    x, matrix = (jnp.asarray(random.normal(size=s.shape), s.dtype) for s in (x, matrix))
    assert_close(jax.jit(transposed_matmul_in_parts)(x, matrix), x @ matrix.T, 1e-5)


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("part_bytes", [decoding._PART_BYTES, 100])
def test_experts_in_use(monkeypatch, part_bytes, tokens, lora):
    """Loop and gather against every expert on every token; one token has no expert."""
    monkeypatch.setattr(decoding, "_PART_BYTES", part_bytes)  # several a turn, or one by rows
    layers, experts, width, hidden, per_token = 2, 5, 12, 7, 2
    random = np.random.default_rng(tokens)

    def normal(*shape):
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    def part(width, out):
        low = (normal(layers, experts, width, 3), normal(layers, experts, 3, out)) if lora else ()
        return Linear(normal(layers, experts, width, out), *low, scale=0.5)

    parts = part(width, hidden), part(width, hidden), part(hidden, width)
    x, weights = normal(tokens, width), jnp.abs(normal(tokens, per_token))
    chosen = np.stack([random.permutation(experts)[:per_token] for _ in range(tokens)])
    chosen[tokens // 2] = experts if tokens > 1 else chosen[0]
    gate, up, down = (p.weight[1] + (0.5 * p.a[1] @ p.b[1] if lora else 0) for p in parts)
    outputs = jnp.einsum(
        "tef,efd->ted",
        jax.nn.silu(jnp.einsum("td,edf->tef", x, gate)) * jnp.einsum("td,edf->tef", x, up),
        down,
    )
    one_hot = jax.nn.one_hot(chosen, experts)  # of `experts`: zeros
    expected = jnp.einsum("tk,tke,ted->td", weights, one_hot, outputs)
    for run in (experts_by_loop, experts_by_gather):
        out = jax.jit(run)(x, weights, jnp.asarray(chosen), parts, jnp.int32(1))
        assert_close(out, expected, 1e-5)


@pytest.mark.slow
def test_the_loop_reads_only_experts_in_use():
    """Weights of the others may be anything: no number of theirs reaches a result."""
    parts = [Linear(jnp.full((1, 4, 3, 3), jnp.nan).at[0, 2].set(1.0)) for _ in range(3)]
    chosen = jnp.array([[2], [2], [4]])
    out = experts_by_loop(jnp.ones((3, 3)), jnp.ones((3, 1)), chosen, parts, 0)
    assert np.isfinite(out).all()
    assert out[0].all()
    assert not out[2].any()


def test_how_experts_run():
    assert decoding.backend("cpu", 16, 8, 64) == "loop"
    assert decoding.backend("gpu", 4, 8, 64) == "gather"
    assert decoding.backend("gpu", 5, 8, 64) is None
