"""Grouped matrix multiplication as Pallas-Triton kernels, for NVIDIA GPUs.

Shapes: N rows, D in, F out, E groups. Whatever a kernel needs transposed it transposes in its own
tiles, so that no second copy of the weights is made.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pallas_triton

_BLOCK, _INNER, _WARPS, _STAGES = 128, 32, 4, 4
"""Side of a tile of the output, and how far a step goes along the summed dimension.

The values that tokamax ships for most grouped matmuls of OLMoE's size on an H100, where its makers
measured kernels of the same form.
"""


def rows_by_weights(x, w, group_sizes, contract_last: bool):
    """x [N, D] by w [E, D, F], or with `contract_last` x [N, F] by w transposed."""
    (rows, inner), groups = x.shape, w.shape[0]
    width = w.shape[1] if contract_last else w.shape[2]
    block_rows, block_width = _block(rows // groups), _block(width)
    tiles = _row_tiles(group_sizes, rows, block_rows)

    def kernel(group_ref, first_ref, end_ref, x_ref, w_ref, out_ref):
        tile = pl.program_id(1)
        group, row = group_ref[tile], first_ref[tile] + jnp.arange(block_rows)
        column = pl.program_id(0) * block_width + jnp.arange(block_width)
        is_row, is_column = row < end_ref[tile], column < width

        def add(step, total):
            index = step * _INNER + jnp.arange(_INNER)
            is_inner = index < inner
            x_tile = _load(x_ref, (), (row, is_row), (index, is_inner))
            if contract_last:
                w_tile = _load(w_ref, (group,), (column, is_column), (index, is_inner))
            else:
                w_tile = _load(w_ref, (group,), (index, is_inner), (column, is_column))
            return total + _dot(x_tile, w_tile, 1, 1 if contract_last else 0)

        # Rows of no group multiply nothing, and zeros are written. Triton's loop wants bounds of
        # one type, which literals would not have.
        steps = jnp.where(group < groups, jnp.int32(pl.cdiv(inner, _INNER)), jnp.int32(0))
        total = jnp.zeros((block_rows, block_width), jnp.float32)
        total = jax.lax.fori_loop(0, steps, add, total)
        _store(out_ref, (), (row, is_row), (column, is_column), total)

    # Columns first: the tiles of a group follow each other and find its weights in the cache.
    return pl.pallas_call(
        kernel,
        jax.ShapeDtypeStruct((rows, width), x.dtype),
        grid=(pl.cdiv(width, block_width), tiles[0].shape[0]),
        **_options("rows_by_weights"),
    )(*tiles, x, w)


def rows_by_rows(x, g, sizes, ends, dtype):
    """For each group, x^T g over its rows, summed in float32: [groups, D, F] of `dtype`."""
    height, width = x.shape[1], g.shape[1]
    block_height, block_width = _block(height), _block(width)

    def kernel(size_ref, end_ref, x_ref, g_ref, out_ref):
        group = pl.program_id(2)
        size, end = size_ref[group], end_ref[group]
        line = pl.program_id(1) * block_height + jnp.arange(block_height)
        column = pl.program_id(0) * block_width + jnp.arange(block_width)
        is_line, is_column = line < height, column < width

        def add(step, total):
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


def _row_tiles(group_sizes, rows: int, block: int):
    """Cuts the rows into tiles of one group each: group, first row and end of the group, per tile.

    The rows past the sum are group E's. There are as many tiles as any sizes can need; those that
    these sizes do not need have no rows.
    """
    sizes = jnp.append(group_sizes, rows - jnp.sum(group_sizes))
    ends, counts = jnp.cumsum(sizes), (sizes + block - 1) // block
    after = jnp.cumsum(counts)  # the first tile behind each group's
    tile = jnp.arange(rows // block + sizes.shape[0])
    group = jnp.searchsorted(after, tile, side="right", method="compare_all")
    group = jnp.minimum(group, sizes.shape[0] - 1).astype(jnp.int32)
    first = (ends - sizes)[group] + (tile - (after - counts)[group]) * block
    return group, first.astype(jnp.int32), ends[group].astype(jnp.int32)


def _block(size: int) -> int:
    """The side of a tile: a power of two, as Triton needs, of at least a tensor core's 16."""
    return min(_BLOCK, max(16, pl.next_power_of_2(size)))


def _dot(a, b, a_dimension: int, b_dimension: int):
    dimensions = (((a_dimension,), (b_dimension,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _load(ref, group, rows, columns):
    """A tile of ref[*group]; rows and columns are (indices, which of them count), the rest 0."""
    (row, is_row), (column, is_column) = rows, columns
    return pallas_triton.load(
        ref.at[(*group, row[:, None], column[None, :])],
        mask=is_row[:, None] & is_column[None, :],
        other=0,
    )


def _store(ref, group, rows, columns, value):
    (row, is_row), (column, is_column) = rows, columns
    pallas_triton.store(
        ref.at[(*group, row[:, None], column[None, :])],
        value.astype(ref.dtype),
        mask=is_row[:, None] & is_column[None, :],
    )


def _options(name: str):
    parameters = pallas_triton.CompilerParams(num_warps=_WARPS, num_stages=_STAGES)
    return {"name": name, "compiler_params": parameters}
