"""A backend that is wrong on this device is caught by its proof, and a right one passes."""

import types

import jax.numpy as jnp
import pytest
from helpers import RUN_ON_CPU

from olmoe_jax.ops import attention, grouped_matmul
from olmoe_jax.ops.grouped_matmul import ragged
from olmoe_jax.ops.proof import prove_attention, prove_grouped_matmul, tolerance

ROWS, TEXTS = (100, 16, 24, 5), (2, 40, 4, 2, 16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", RUN_ON_CPU)
def test_right_grouped_matmul_passes(backend, dtype):
    assert prove_grouped_matmul(backend, ROWS, dtype) < tolerance(dtype) / 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_right_attention_passes(dtype):
    assert prove_attention("chunked", TEXTS, dtype) < tolerance(dtype) / 3


def rows_of_no_group(x, w, group_sizes, contract_last):
    """Rows of no group keep what lay in memory."""
    y = ragged.rows_by_weights(x, w, group_sizes, contract_last)
    return jnp.where((jnp.arange(len(x)) < group_sizes.sum())[:, None], y, jnp.nan)


def one_row(x, w, group_sizes, contract_last):
    """The second non-empty group begins a row late."""
    late = group_sizes.at[1].add(1).at[3].add(-1)
    return ragged.rows_by_weights(x, w, late, contract_last)


def gradient_of_rows(x, w, group_sizes, contract_last):
    """The product is right, and its gradient is not."""
    scale = 1.05 if contract_last else 1
    return scale * ragged.rows_by_weights(x, w, group_sizes, contract_last)


def empty_group(x, g, sizes, ends, dtype):
    """An empty group's gradient is another group's."""
    out = ragged.rows_by_rows(x, g, sizes, ends, dtype)
    return jnp.where((sizes == 0)[:, None, None], out.sum(0), out)


def no_sums(x, g, sizes, ends, dtype):
    """The sums are those of 8 bits."""
    return ragged.rows_by_rows(x, g, sizes, ends, dtype).astype(jnp.float8_e4m3fn).astype(dtype)


@pytest.mark.parametrize("wrong", [rows_of_no_group, one_row, gradient_of_rows])
def test_wrong_product_of_weights_is_caught(monkeypatch, wrong):
    fake = types.SimpleNamespace(rows_by_weights=wrong, rows_by_rows=ragged.rows_by_rows)
    monkeypatch.setitem(grouped_matmul.BACKENDS, "wrong", fake)
    assert not prove_grouped_matmul("wrong", ROWS, "float32") <= 5 * tolerance("float32")


@pytest.mark.parametrize("wrong", [empty_group, no_sums])
def test_wrong_product_of_rows_is_caught(monkeypatch, wrong):
    fake = types.SimpleNamespace(rows_by_weights=ragged.rows_by_weights, rows_by_rows=wrong)
    monkeypatch.setitem(grouped_matmul.BACKENDS, "wrong", fake)
    assert not prove_grouped_matmul("wrong", ROWS, "float32") <= 5 * tolerance("float32")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda q, k, v, segments: attention.chunked(q, k, v, jnp.zeros_like(segments)),
        lambda q, k, v, segments: attention.chunked(q, k[:, :, ::-1], v, segments),
        lambda q, k, v, segments: attention.chunked(q[:, ::-1], k, v, segments),
        lambda q, k, v, segments: attention.chunked(q, k, v, segments) * jnp.nan,
    ],
    ids=["texts", "heads", "positions", "nan"],
)
def test_wrong_attention_is_caught(monkeypatch, wrong):
    monkeypatch.setitem(attention.BACKENDS, "wrong", wrong)
    assert not prove_attention("wrong", TEXTS, "float32") <= 5 * tolerance("float32")
