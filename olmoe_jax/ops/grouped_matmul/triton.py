"""Grouped matrix multiplication as Pallas-Triton kernels, for NVIDIA GPUs.

A kernel transposes the weights in its own tiles, so that no second copy of them exists.

Shapes: N rows, D in, F out, E groups.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pallas_triton
from jax.typing import DTypeLike

_Ref = Any
"""A reference to an array in a kernel; jax names no public type for one."""
_Masked = tuple[jax.Array, jax.Array]
"""Indices along a dimension, and a mask of those that lie inside the array."""

_BLOCK, _INNER, _WARPS, _STAGES = 128, 32, 4, 4
"""Side of a tile of the output, length of a step along the summed dimension, warps, stages.

tokamax ships these values for most grouped matmuls of OLMoE's size on an H100: its makers measured
kernels of the same form there.
"""


def rows_by_weights(
    x: jax.Array, w: jax.Array, group_sizes: jax.Array, contract_last: bool
) -> jax.Array:
    """Returns each group's rows times its matrix."""
    (rows, inner), groups = x.shape, w.shape[0]
    width = w.shape[1] if contract_last else w.shape[2]
    block_rows, block_width = _block(rows // groups), _block(width)
    tiles = _row_tiles(group_sizes, rows, block_rows)

    def kernel(
        group_ref: _Ref, first_ref: _Ref, end_ref: _Ref, x_ref: _Ref, w_ref: _Ref, out_ref: _Ref
    ) -> None:
        tile = pl.program_id(1)
        group, row = group_ref[tile], first_ref[tile] + jnp.arange(block_rows)
        column = pl.program_id(0) * block_width + jnp.arange(block_width)
        is_row, is_column = row < end_ref[tile], column < width

        def add(step: jax.Array, total: jax.Array) -> jax.Array:
            index = step * _INNER + jnp.arange(_INNER)
            is_inner = index < inner
            x_tile = _load(x_ref, (), (row, is_row), (index, is_inner))
            if contract_last:
                w_tile = _load(w_ref, (group,), (column, is_column), (index, is_inner))
            else:
                w_tile = _load(w_ref, (group,), (index, is_inner), (column, is_column))
            return total + _dot(x_tile, w_tile, 1, 1 if contract_last else 0)

        # Rows of no group take no step, so that their zeros are stored. Triton's loop needs
        # bounds of one type, hence no literals.
        steps = jnp.where(group < groups, jnp.int32(pl.cdiv(inner, _INNER)), jnp.int32(0))
        total = jnp.zeros((block_rows, block_width), jnp.float32)
        total = jax.lax.fori_loop(0, steps, add, total)
        _store(out_ref, (), (row, is_row), (column, is_column), total)

    # The grid runs over the columns first: the tiles of a group follow each other, and the second
    # one finds the group's weights in the cache.
    return pl.pallas_call(
        kernel,
        jax.ShapeDtypeStruct((rows, width), x.dtype),
        grid=(pl.cdiv(width, block_width), tiles[0].shape[0]),
        **_options("rows_by_weights"),
    )(*tiles, x, w)


def rows_by_rows(
    x: jax.Array, g: jax.Array, sizes: jax.Array, ends: jax.Array, dtype: DTypeLike
) -> jax.Array:
    """Returns x^T g of each group's rows."""
    height, width = x.shape[1], g.shape[1]
    block_height, block_width = _block(height), _block(width)

    def kernel(size_ref: _Ref, end_ref: _Ref, x_ref: _Ref, g_ref: _Ref, out_ref: _Ref) -> None:
        group = pl.program_id(2)
        size, end = size_ref[group], end_ref[group]
        line = pl.program_id(1) * block_height + jnp.arange(block_height)
        column = pl.program_id(0) * block_width + jnp.arange(block_width)
        is_line, is_column = line < height, column < width

        def add(step: jax.Array, total: jax.Array) -> jax.Array:
            row = end - size + step * _INNER + jnp.arange(_INNER)
            is_row = row < end
            x_tile = _load(x_ref, (), (row, is_row), (line, is_line))
            g_tile = _load(g_ref, (), (row, is_row), (column, is_column))
            return total + _dot(x_tile, g_tile, 0, 0)

        total = jnp.zeros((block_height, block_width), jnp.float32)
        total = jax.lax.fori_loop(0, pl.cdiv(size, _INNER), add, total)
        _store(out_ref, (group,), (line, is_line), (column, is_column), total)

    groups = sizes.shape[0]
    return pl.pallas_call(
        kernel,
        jax.ShapeDtypeStruct((groups, height, width), dtype),
        grid=(pl.cdiv(width, block_width), pl.cdiv(height, block_height), groups),
        **_options("rows_by_rows"),
    )(sizes, ends, x, g)


def _row_tiles(
    group_sizes: jax.Array, rows: int, block: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cuts the rows into tiles of one group each.

    The rows past sum(group_sizes) form group E. The number of tiles is the most that any sizes can
    need; the tiles that these sizes do not need have no rows.

    Returns:
      group, first row and end of the group of each tile, int32.
    """
    sizes = jnp.append(group_sizes, rows - jnp.sum(group_sizes))
    ends, counts = jnp.cumsum(sizes), (sizes + block - 1) // block
    after = jnp.cumsum(counts)  # the first tile after each group's tiles
    tile = jnp.arange(rows // block + sizes.shape[0])
    group = jnp.searchsorted(after, tile, side="right", method="compare_all")
    group = jnp.minimum(group, sizes.shape[0] - 1).astype(jnp.int32)
    first = (ends - sizes)[group] + (tile - (after - counts)[group]) * block
    return group, first.astype(jnp.int32), ends[group].astype(jnp.int32)


def _block(size: int) -> int:
    """Returns the side of a tile: a power of two, as Triton requires, and at least 16.

    A tensor core multiplies tiles of 16.
    """
    return min(_BLOCK, max(16, pl.next_power_of_2(size)))


def _dot(a: jax.Array, b: jax.Array, a_dimension: int, b_dimension: int) -> jax.Array:
    dimensions = (((a_dimension,), (b_dimension,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _load(ref: _Ref, group: tuple[Any, ...], rows: _Masked, columns: _Masked) -> jax.Array:
    """Loads a tile of ref[*group], with zeros where a mask is False."""
    (row, is_row), (column, is_column) = rows, columns
    return pallas_triton.load(
        ref.at[(*group, row[:, None], column[None, :])],
        mask=is_row[:, None] & is_column[None, :],
        other=0,
    )


def _store(
    ref: _Ref, group: tuple[Any, ...], rows: _Masked, columns: _Masked, value: jax.Array
) -> None:
    """Stores a tile into ref[*group] where both masks are True."""
    (row, is_row), (column, is_column) = rows, columns
    pallas_triton.store(
        ref.at[(*group, row[:, None], column[None, :])],
        value.astype(ref.dtype),
        mask=is_row[:, None] & is_column[None, :],
    )


def _options(name: str) -> dict[str, Any]:
    parameters = pallas_triton.CompilerParams(num_warps=_WARPS, num_stages=_STAGES)
    return {"name": name, "compiler_params": parameters}
