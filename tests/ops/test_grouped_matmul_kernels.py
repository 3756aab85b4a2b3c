"""Our GPU kernels in Pallas' interpreter, which runs them on a CPU, against a loop over rows."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, message_of
from jax.experimental import pallas
from ops.grouped_oracle import loop_oracle, make_inputs, run

from olmoe_jax.ops.grouped_matmul import check_backend, grouped_matmul
from olmoe_jax.ops.grouped_matmul import tokamax as tokamax_matmul
from olmoe_jax.ops.grouped_matmul import triton as triton_matmul

# Nothing divides anything: tiles have 16 rows and columns here, steps 32.
SHAPE = ROWS, D, F, GROUPS = 150, 40, 17, 5
SIZES = {
    "odd": [1, 17, 0, 19, 8],
    "even": [30] * 5,
    "empty first and last": [0, 0, 80, 70, 0],
    "one takes all": [0, 150, 0, 0, 0],
    "nobody takes any": [0] * 5,
}


@pytest.fixture(scope="module")
def interpreted():
    """Pallas kernels are interpreted, and ours use small tiles."""
    with pytest.MonkeyPatch.context() as patch:
        interpreter = functools.partial(pallas.pallas_call, interpret=True)
        patch.setattr(pallas, "pallas_call", interpreter)
        patch.setattr(triton_matmul, "_BLOCK", 16)
        yield


def check(sizes, dtype):
    inputs, sizes = make_inputs(*SHAPE, dtype), np.array(sizes, np.int32)
    for actual, expected in zip(
        run(*inputs, sizes, "pallas_triton"), loop_oracle(*inputs, sizes), strict=True
    ):
        assert actual.dtype == dtype
        if dtype == jnp.float32:
            assert_close(actual, expected, 1e-6)
        else:
            # Summed in float32, then one rounding: half a unit of bfloat16's 8 bits.
            exact = np.asarray(actual, np.float64)
            np.testing.assert_allclose(exact, expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_values_and_gradients(interpreted, sizes):
    check(sizes, jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_bfloat16(interpreted, sizes):
    check(sizes, jnp.bfloat16)


def poisoned(inputs, used):
    x, w, g = inputs
    return x.at[used:].set(jnp.nan), w, g.at[used:].set(jnp.nan)


def test_rows_of_no_group_do_not_matter(interpreted):
    inputs, sizes = make_inputs(*SHAPE), np.array(SIZES["odd"], np.int32)
    used = sizes.sum()
    out = run(*poisoned(inputs, used), sizes, "pallas_triton")
    for actual, expected in zip(out, loop_oracle(*inputs, sizes), strict=True):
        assert_close(actual, expected, 1e-6)
    assert not np.any(out[0][used:])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pallas_triton", "ragged_dot"])
def test_only_selected_groups(interpreted, backend):
    """In any order, an empty one and padding among them."""
    (x, w, g), sizes = make_inputs(*SHAPE), jnp.array(SIZES["odd"], jnp.int32)
    indices = np.array([3, 5, 2, 0])

    @jax.jit
    def gradients(x, selected):
        def product(x, selected):
            return grouped_matmul(x, w, sizes, backend, tuned=selected, indices=jnp.array(indices))

        return jax.vjp(product, x, selected)[1](g)

    selected = w[np.minimum(indices, 4)]
    dx, dselected = gradients(x, selected)
    _, expected_dx, dw = loop_oracle(x, w, g, np.asarray(sizes))
    assert_close(dx, expected_dx, 1e-6)
    assert_close(dselected, np.append(dw, np.zeros((1, D, F)), axis=0)[indices], 1e-6)


def test_a_backend_that_cannot_run_says_what_can(monkeypatch):
    assert check_backend(None, "gpu") == "mosaic"
    assert check_backend("pallas_triton", "gpu") == "pallas_triton"
    assert check_backend(None, "tpu") == "ragged_dot"
    assert check_backend(None, "cpu") == "blocked"
    for backend, platform in [("tokamax", "cpu"), ("pallas_triton", "tpu"), ("ragged_dot", "gpu")]:
        said = message_of(check_backend, backend, platform)
        assert said.startswith(f"model.grouped_matmul={backend}: runs on ")
        assert said.endswith(f"this is {platform}; write blocked")


def test_a_gpu_before_hopper(monkeypatch):
    ampere = types.SimpleNamespace(compute_capability="8.0")
    monkeypatch.setattr(jax, "devices", lambda: [ampere])
    assert check_backend(None, "gpu") == "pallas_triton"
    said = message_of(check_backend, "mosaic", "gpu")
    assert said == (
        "model.grouped_matmul=mosaic: runs on NVIDIA Hopper GPUs, and this is another; "
        "write pallas_triton"
    )


def test_tokamax_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(tokamax_matmul.importlib.util, "find_spec", lambda name: None)
    said = message_of(check_backend, "tokamax", "gpu")
    assert said.startswith("model.grouped_matmul=tokamax: is not installed; run pip install ")
    assert "or write pallas_triton or blocked" in said
