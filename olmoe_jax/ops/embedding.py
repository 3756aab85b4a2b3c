"""Embedding lookup in a table that stays split over its rows."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from olmoe_jax.parallel import sharding


def embedding_lookup(table: jax.Array, tokens: jax.Array, dtype) -> jax.Array:
    """Rows of the table [V, D] at tokens [B, S] int, [B, S, D] in `dtype`; no row outside: zeros.

    Under a mesh every device looks all tokens up in its own rows and the results are scattered to
    the tokens' devices, as in Megatron-LM's vocabulary-parallel embedding
    (https://arxiv.org/abs/1909.08053); backward, the gradients in `dtype` are gathered and added up
    in the table's dtype. Each way that moves a row per token instead of the table. A table whose V
    no mesh axis divides is gathered.
    """
    mesh = sharding.active_mesh()
    if mesh is None:
        return embedding_rows(table, tokens).astype(dtype)
    axes = sharding.vocabulary_axes(table.shape, mesh)
    return jax.shard_map(
        functools.partial(_on_device, dtype=dtype, axes=axes),
        mesh=mesh,
        in_specs=(P(axes), sharding.BATCH),
        out_specs=sharding.BATCH,
        check_vma=False,
    )(sharding.by_value(jnp.asarray(table)), tokens)


def _on_device(table, tokens, dtype, axes):
    if not axes:
        return embedding_rows(table, tokens).astype(dtype)
    tokens = jax.lax.all_gather(tokens, axes, tiled=True)
    rows = embedding_rows(table, tokens - jax.lax.axis_index(axes) * len(table)).astype(dtype)
    # Exact in any dtype: all but one of the summands are zero.
    return jax.lax.psum_scatter(rows, axes, tiled=True)


def embedding_rows(table: jax.Array, indices: jax.Array) -> jax.Array:
    """Rows of a whole table; no row outside: zeros."""
    # A negative index would count from the end.
    indices = jnp.where(indices < 0, len(table), indices)
    return jnp.take(table, indices, axis=0, mode="fill", fill_value=0)
