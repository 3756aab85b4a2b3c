"""The grouped matmul against a loop over its groups: values, both gradients, every odd case."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import RUN_ON_CPU, array_sizes, assert_close, relative_error
from ops.grouped_oracle import loop_oracle, make_inputs, run

from olmoe_jax.ops.grouped_matmul import InStack, grouped_matmul

# Names say what is odd; (rows, D, F, group sizes).
CASES = {
    "even": (64, 32, 16, [16, 16, 16, 16]),
    "odd_sizes": (45, 7, 5, [1, 17, 0, 19, 8]),
    "empty_first_and_last": (20, 8, 4, [0, 0, 13, 7, 0]),
    "one_takes_all": (100, 8, 8, [0, 100, 0, 0]),
    "nobody_takes_any": (9, 4, 3, [0, 0, 0]),
    "rows_past_the_sum": (70, 6, 10, [20, 0, 33]),
    "more_groups_than_rows": (3, 4, 5, [0, 1, 0, 0, 1, 0, 0, 1]),
    "larger_than_a_block": (700, 3, 4, [400, 1, 299]),
    # Matrices large enough for last blocks of fewer rows: of 16, 32, ..., 128 here.
    "every_last_block": (512, 128, 128, [7, 128, 17, 110, 0, 33, 50, 65, 90, 12]),
    "last_blocks_after_whole_ones": (700, 160, 110, [300, 1, 399]),
}


def case(name, dtype=np.float32):
    rows, d, f, sizes = CASES[name]
    return *make_inputs(rows, d, f, len(sizes), dtype), np.array(sizes, np.int32)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    inputs = case(name)
    out = run(*inputs, "blocked")
    for actual, expected, what in zip(out, loop_oracle(*inputs), ("y", "dx", "dw"), strict=True):
        assert actual.dtype == jnp.float32
        assert relative_error(actual, expected) < 1e-6, what


@pytest.mark.parametrize("backend", RUN_ON_CPU)
def test_rows_past_the_sum_give_exact_zeros_and_get_no_gradient(backend):
    x, w, g, sizes = case("rows_past_the_sum")
    used = sizes.sum()
    y, dx, dw = run(x, w, g, sizes, backend)
    assert not np.any(y[used:])
    assert not np.any(dx[used:])
    # What lies in those rows must not matter either.
    garbage = run(x.at[used:].set(1e6), w, g.at[used:].set(-1e6), sizes, backend)
    np.testing.assert_array_equal(garbage[0][:used], y[:used])
    np.testing.assert_array_equal(garbage[2], dw)


def test_an_empty_group_has_a_zero_gradient():
    x, w, g, sizes = case("empty_first_and_last")
    dw = run(x, w, g, sizes, "blocked")[2]
    assert not np.any(dw[sizes == 0])
    assert all(np.any(part) for part in dw[sizes > 0])


@pytest.mark.parametrize("backend", RUN_ON_CPU)
def test_bfloat16_accumulates_in_float32(backend):
    # 4096 ones: a bfloat16 sum would stop at 256, where 1 is below half a unit of the last place.
    x, w = jnp.ones((4, 4096), jnp.bfloat16), jnp.ones((1, 4096, 2), jnp.bfloat16)
    y = grouped_matmul(x, w, jnp.array([4], jnp.int32), backend)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y.astype(np.float32), 4096.0)
    # The weight's gradient sums over rows, here over many blocks of 256.
    x, w = jnp.ones((4096, 2), jnp.bfloat16), jnp.ones((1, 2, 3), jnp.bfloat16)
    g = jnp.ones((4096, 3), jnp.bfloat16)
    dw = run(x, w, g, np.array([4096], np.int32), backend)[2]
    assert dw.dtype == jnp.bfloat16
    np.testing.assert_array_equal(dw.astype(np.float32), 4096.0)


def test_bfloat16_is_as_exact_as_its_output_allows():
    inputs = case("odd_sizes", jnp.bfloat16)
    for actual, expected in zip(run(*inputs, "blocked"), loop_oracle(*inputs), strict=True):
        # One rounding of the result: half a unit of bfloat16's 8 bits.
        np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("name", ["odd_sizes", "one_takes_all", "rows_past_the_sum"])
def test_backends_agree(name):
    inputs = case(name)
    assert_close(run(*inputs, "blocked"), run(*inputs, "ragged_dot"), 1e-6)


@pytest.mark.parametrize("with_sums", [False, True], ids=["differentiated", "added to sums"])
def test_matrices_in_a_stack(with_sums):
    """The bits are those of a layer's matrices, which are not read. Other layers get nothing."""
    x, w, g, sizes = case("last_blocks_after_whole_ones")
    stack = jnp.stack([w + 1, w])
    before = jnp.ones_like(stack)

    @jax.jit
    def in_stack(x, nothing, stack, before):
        sums = jax.new_ref(before) if with_sums else None

        def function(x, nothing):
            layer = InStack(stack, jnp.int32(1))
            return grouped_matmul(x, nothing, jnp.asarray(sizes), stack=layer, sums=sums)

        y, pullback = jax.vjp(function, x, nothing)
        return y, *pullback(g), None if sums is None else jax.freeze(sums)

    y, dx, dw, after = in_stack(x, jnp.full_like(w, jnp.nan), stack, before)
    expected = run(x, w, g, sizes, "blocked")
    np.testing.assert_array_equal(y, expected[0])
    np.testing.assert_array_equal(dx, expected[1])
    np.testing.assert_array_equal(dw, 0 if with_sums else expected[2])
    if with_sums:
        np.testing.assert_array_equal(after[0], before[0])
        np.testing.assert_array_equal(after[1], before[1] + expected[2])


def test_blocks_do_not_compute_all_groups_for_all_rows():
    """The trap of `lax.ragged_dot` off TPUs: masking x to [E, N, D]."""
    x, w, g, sizes = case("odd_sizes")
    rows, d, f = 45, 7, 5
    made = array_sizes(lambda x, w, g: run(x, w, g, sizes, "blocked"), x, w, g)
    assert max(made) < min(rows * len(sizes) * d, rows * len(sizes) * f)


def test_an_unknown_backend():
    x, w, _, sizes = case("even")
    with pytest.raises(ValueError, match="'dense' is none of"):
        grouped_matmul(x, w, jnp.asarray(sizes), "dense")
