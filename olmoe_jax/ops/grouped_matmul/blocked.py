"""Grouped matrix multiplication in plain XLA: blocks of one group's rows, group after group.

Shapes: N rows, D in, F out, E groups. Runs anywhere; the backend of CPUs.
"""

import functools
import math

import jax
import jax.numpy as jnp

_SMALL_MATRIX = 1 << 14
"""Elements of a matrix for which rows computed in vain cost less than a program with more loops."""


def rows_by_weights(x, w, group_sizes, contract_last: bool):
    """x [N, D] by w [E, D, F], or with `contract_last` x [N, F] by w transposed."""
    rows, block = x.shape[0], _block_rows(x.shape[0], w.shape[0])
    parts = _parts(block, w.shape[1] * w.shape[2])
    padded = _padded(x, block)
    dimensions = (((1,), (1 if contract_last else 0,)), ((), ()))

    def body(out, weight, first, valid):
        block_rows = jax.lax.dynamic_slice_in_dim(padded, first, valid.size)
        y = jax.lax.dot_general(
            block_rows, weight, dimensions, preferred_element_type=jnp.float32
        ).astype(x.dtype)
        # Rows of later groups are zeroed here and written when their group comes.
        return jax.lax.dynamic_update_slice_in_dim(
            out, jnp.where(valid[:, None], y, 0), first, axis=0
        )

    width = w.shape[1] if contract_last else w.shape[2]
    out = jnp.zeros((rows + block, width), x.dtype)
    ends = jnp.cumsum(group_sizes)
    return _for_each_block(group_sizes, ends, w, parts, out, body)[:rows]


def rows_by_rows(x, g, sizes, ends, dtype):
    """For each group, x^T g over its rows, summed in float32: [groups, D, F] of `dtype`."""
    block = _block_rows(x.shape[0], sizes.shape[0])
    x_padded, g_padded = _padded(x, block), _padded(g, block)

    def product(rows, first, end):
        x_rows, g_rows = (
            jax.lax.dynamic_slice_in_dim(padded, first, rows) for padded in (x_padded, g_padded)
        )
        return jax.lax.dot_general(
            jnp.where((first + jnp.arange(rows) < end)[:, None], x_rows, 0),
            g_rows,
            (((0,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )

    def nothing(first, end):
        return jnp.zeros((x.shape[1], g.shape[1]), jnp.float32)

    parts = _parts(block, x.shape[1] * g.shape[1])
    last_blocks = [nothing, *(functools.partial(product, rows) for rows in parts)]

    def group(_, inputs):
        size, end = inputs
        whole = jnp.maximum(0, size - 1) // block
        rest = size - whole * block
        # The last block first: most groups have no other, and need no zeros to add to.
        total = jax.lax.switch(-(-rest // parts[0]), last_blocks, end - rest, end)

        def add_block(index, total):
            return total + product(block, end - size + index * block, end)

        # Rounded group by group, so that one matrix is in float32 and not all of them.
        return None, jax.lax.fori_loop(0, whole, add_block, total).astype(dtype)

    return jax.lax.scan(group, None, (sizes, ends))[1]


def _block_rows(rows: int, groups: int) -> int:
    """Rows per block: twice the mean group as a power of two in 16…256, so that most need one."""
    mean = max(1, rows // groups)
    return min(256, max(16, 2 << math.ceil(math.log2(mean))))


def _parts(block: int, matrix: int) -> range:
    """How many rows a group's last block may have: eighths of a block, or 16, 32, ...

    Each is a loop to compile, so for a small matrix (of `matrix` elements) there is but the block.
    """
    part = block if matrix < _SMALL_MATRIX else max(16, block // 8)
    return range(part, block + 1, part)


def _for_each_block(sizes, ends, weights, parts, carry, body):
    """Scans over groups and, inside, over blocks of a group's rows, in row order.

    A group's rows are ends - sizes … ends. `body(carry, weight, first_row, valid)` sees a block
    that starts at `first_row`; `valid` [rows of the block] marks the rows of this group. Blocks
    have `parts[-1]` rows, but the last one of `parts`; it may also cover rows of later groups.
    """
    part, block = parts[0], parts[-1]

    def group(carry, inputs):
        weight, size, end = inputs

        def blocks(rows, first, count, carry):
            def one_block(index, carry):
                start = first + index * rows
                return body(carry, weight, start, start + jnp.arange(rows) < end)

            return jax.lax.fori_loop(0, count, one_block, carry)

        whole = (size + part - 1) // block
        carry = blocks(block, end - size, whole, carry)
        rest = size - whole * block
        for rows in parts[:-1]:
            # A loop of at most one turn: `lax.switch` would copy the carry.
            count = ((rest > rows - part) & (rest <= rows)).astype(jnp.int32)
            carry = blocks(rows, end - rest, count, carry)
        return carry, None

    return jax.lax.scan(group, carry, (weights, sizes, ends))[0]


def _padded(x, block):
    """Room for the last block, which may start on the last row."""
    return jnp.pad(x, ((0, block), (0, 0)))
