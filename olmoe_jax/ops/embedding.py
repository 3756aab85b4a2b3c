"""Embedding lookup in a table that stays split over its rows."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from olmoe_jax.parallel import sharding


def embedding_lookup(table: jax.Array, tokens: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Returns the table's rows at the tokens; a token outside the table gives zeros.

    Under a mesh every device looks all tokens up in its own rows, and the results are scattered to
    the tokens' devices, as in Megatron-LM's vocabulary-parallel embedding
    (https://arxiv.org/abs/1909.08053). Backward, the gradients are gathered in `dtype` and added up
    in the table's dtype. Both directions move one row per token instead of the table. A table whose
    V no mesh axis divides is gathered.

    Args:
      table: [V, D] as the parameter is stored and sharded.
      tokens: [B, S] int.
      dtype: the compute dtype.

    Returns:
      [B, S, D] in `dtype`.
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


def _on_device(
    table: jax.Array, tokens: jax.Array, dtype: DTypeLike, axes: tuple[str, ...]
) -> jax.Array:
    if not axes:
        return embedding_rows(table, tokens).astype(dtype)
    tokens = jax.lax.all_gather(tokens, axes, tiled=True)
    rows = embedding_rows(table, tokens - jax.lax.axis_index(axes) * len(table)).astype(dtype)
    # Exact in any dtype: all summands but one are zero.
    return jax.lax.psum_scatter(rows, axes, tiled=True)


def embedding_rows(table: jax.Array, indices: jax.Array) -> jax.Array:
    """Returns the rows [..., D] of a whole table [V, D]; an index outside gives zeros."""
    # A negative index would count from the end.
    indices = jnp.where(indices < 0, len(table), indices)
    return jnp.take(table, indices, axis=0, mode="fill", fill_value=0)
