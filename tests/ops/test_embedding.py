"""Embedding lookup on one device; test_vocabulary_mesh.py has the meshes."""

import jax
import jax.numpy as jnp
import numpy as np

from olmoe_jax.ops.embedding import embedding_lookup

TABLE = jnp.asarray(np.random.default_rng(0).normal(size=(7, 3)), jnp.float32)
TOKENS = np.array([[0, 6, 2], [2, 2, 5]])


def test_rows():
    np.testing.assert_array_equal(embedding_lookup(TABLE, TOKENS, jnp.float32), TABLE[TOKENS])
    rows = embedding_lookup(TABLE, TOKENS, jnp.bfloat16)
    assert rows.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rows, TABLE[TOKENS].astype(jnp.bfloat16))


def test_gradient_adds_up_in_the_tables_dtype():
    """1 + 1/1024 is no bfloat16 number, but a sum of two."""
    cotangent = np.array([1.0, 2.0**-10], np.float32)[[[1, 1, 0], [1, 1, 1]]]

    def weighted(table):
        rows = embedding_lookup(table, TOKENS, jnp.bfloat16)
        return jnp.sum(rows * cotangent[..., None].astype(jnp.bfloat16), dtype=jnp.float32)

    gradient = jax.grad(weighted)(TABLE)
    expected = np.zeros(TABLE.shape, np.float32)
    np.add.at(expected, TOKENS, cotangent[..., None])
    np.testing.assert_array_equal(gradient, expected)
