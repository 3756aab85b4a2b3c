"""Grouped matrix multiplication in plain XLA: blocks of one group's rows, group after group.

This backend runs anywhere and is the default on CPUs. Shapes: N rows, D in, F out, E groups.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

_SMALL_MATRIX = 1 << 14
"""Elements of a matrix below which computing unused rows costs less than compiling more loops."""


class InStack(NamedTuple):
    """The matrices [E, D, F] of one layer in the stack of all layers.

    XLA's loops over groups take whole arrays: a loop over a layer's matrices, sliced from a stack,
    would begin with a copy of the slice.
    """

    matrices: Any  # [L, E, D, F]: an array, or a ref
    layer: jax.Array  # [] int32

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the layer's matrices: E, D, F."""
        return self.matrices.shape[1:]

    def matrix(self, group: jax.Array) -> jax.Array:
        """Returns one matrix [D, F], as it is stored. The group must exist: the index is cut."""
        return self.matrices.at[self.layer, group].get(mode="clip")


def rows_by_weights(
    x: jax.Array, w: jax.Array | InStack, group_sizes: jax.Array, contract_last: bool
) -> jax.Array:
    """Returns each group's rows times its matrix, which is read where it lies."""
    groups, *matrix = w.shape
    rows, block = x.shape[0], _block_rows(x.shape[0], groups)
    parts = _parts(block, math.prod(matrix))
    x = _at_least(block, x)
    dimensions = (((1,), (1 if contract_last else 0,)), ((), ()))

    def body(out: jax.Array, weight: jax.Array, start: jax.Array, valid: jax.Array) -> jax.Array:
        block_rows, others = (jax.lax.dynamic_slice_in_dim(a, start, len(valid)) for a in (x, out))
        y = jax.lax.dot_general(
            block_rows, weight, dimensions, preferred_element_type=jnp.float32
        ).astype(x.dtype)
        y = jnp.where(valid[:, None], y, others)
        return jax.lax.dynamic_update_slice_in_dim(out, y, start, axis=0)

    def matrix_of(group: jax.Array) -> jax.Array:
        if isinstance(w, InStack):
            return w.matrix(group).astype(x.dtype)
        return jax.lax.dynamic_index_in_dim(w, group, keepdims=False)

    width = matrix[0] if contract_last else matrix[1]
    out = jnp.zeros((len(x), width), x.dtype)
    ends = jnp.cumsum(group_sizes)
    return _for_each_block(group_sizes, ends, matrix_of, parts, out, body)[:rows]


def rows_by_rows(
    x: jax.Array, g: jax.Array, sizes: jax.Array, ends: jax.Array, dtype: DTypeLike
) -> jax.Array:
    """Returns x^T g of each group's rows."""
    product = _group_product(x, g, len(sizes))

    def group(_: None, inputs: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        # Rounding group by group keeps one matrix in float32 instead of all of them.
        return None, product(*inputs).astype(dtype)

    return jax.lax.scan(group, None, (sizes, ends))[1]


def add_rows_by_rows(x: jax.Array, g: jax.Array, sizes: jax.Array, sums: InStack) -> None:
    """Adds x^T g of each group's rows, rounded to x's dtype, to a ref's matrices in place."""
    product = _group_product(x, g, len(sizes))

    def group(_: None, inputs: tuple[jax.Array, ...]) -> tuple[None, None]:
        number, *rows = inputs
        matrix = product(*rows).astype(x.dtype)
        sums.matrices[sums.layer, number] += matrix.astype(sums.matrices.dtype)
        return None, None

    jax.lax.scan(group, None, (jnp.arange(len(sizes)), sizes, jnp.cumsum(sizes)))


def _group_product(
    x: jax.Array, g: jax.Array, groups: int
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns a function from a group's size and end to x^T g of its rows, [D, F] float32."""
    block = _block_rows(len(x), groups)
    x, g = _at_least(block, x), _at_least(block, g)

    def block_product(rows: int, first: jax.Array, end: jax.Array) -> jax.Array:
        start, valid = _window(first, end, rows, len(x))
        x_rows, g_rows = (jax.lax.dynamic_slice_in_dim(a, start, rows) for a in (x, g))
        # The barrier makes XLA transpose the few rows first: its product of two matrices as they
        # lie is faster than one that contracts their rows.
        x_columns = jax.lax.optimization_barrier(jnp.where(valid[:, None], x_rows, 0).T)
        return jnp.dot(x_columns, g_rows, preferred_element_type=jnp.float32)

    def nothing(first: jax.Array, end: jax.Array) -> jax.Array:
        return jnp.zeros((x.shape[1], g.shape[1]), jnp.float32)

    parts = _parts(block, x.shape[1] * g.shape[1])
    last_blocks: list[Callable] = [
        nothing,
        *(functools.partial(block_product, rows) for rows in parts),
    ]

    def product(size: jax.Array, end: jax.Array) -> jax.Array:
        whole = jnp.maximum(0, size - 1) // block
        rest = size - whole * block
        # The last block comes first: most groups have only one, which so needs no zeros to add to.
        total = jax.lax.switch(-(-rest // parts[0]), last_blocks, end - rest, end)

        def add_block(index: jax.Array, total: jax.Array) -> jax.Array:
            return total + block_product(block, end - size + index * block, end)

        return jax.lax.fori_loop(0, whole, add_block, total)

    return product


def _block_rows(rows: int, groups: int) -> int:
    """Returns the rows per block: twice the mean group, as a power of two from 16 to 256.

    So most groups need one block.
    """
    mean = max(1, rows // groups)
    return min(256, max(16, 2 << math.ceil(math.log2(mean))))


def _parts(block: int, matrix: int) -> range:
    """Returns the numbers of rows that a group's last block may have: eighths of a block.

    A part has at least 16 rows. Each number is a loop to compile, so that for a small matrix (of
    `matrix` elements) the only one is the whole block.
    """
    part = block if matrix < _SMALL_MATRIX else max(16, block // 8)
    return range(part, block + 1, part)


def _for_each_block(
    sizes: jax.Array,
    ends: jax.Array,
    matrix_of: Callable[[jax.Array], jax.Array],
    parts: Sequence[int],
    carry: jax.Array,
    body: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """Scans over the groups and, inside, over the blocks of a group's rows, in row order.

    Args:
      sizes, ends: [E] int32; the rows of a group are ends - sizes to ends.
      matrix_of: returns the matrix [D, F] of a group.
      parts: the numbers of rows that a group's last block may have; its other blocks have
        `parts[-1]`. A block may also cover rows of other groups.
      carry: an array with one row for each of all groups' rows; the first block's carry.
      body: called as body(carry, weight, start, valid) for the block of rows that begins at
        `start`; `valid` [rows of the block] marks the rows of the group.

    Returns:
      The last block's carry.
    """
    part, block = parts[0], parts[-1]

    def group(
        carry: jax.Array, inputs: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, None]:
        number, size, end = inputs
        weight = matrix_of(number)

        def blocks(rows: int, first: jax.Array, count: jax.Array, carry: jax.Array) -> jax.Array:
            def one_block(index: jax.Array, carry: jax.Array) -> jax.Array:
                start, valid = _window(first + index * rows, end, rows, len(carry))
                return body(carry, weight, start, valid)

            return jax.lax.fori_loop(0, count, one_block, carry)

        whole = (size + part - 1) // block
        carry = blocks(block, end - size, whole, carry)
        rest = size - whole * block
        for rows in parts[:-1]:
            # A loop of at most one iteration, since `lax.switch` would copy the carry.
            count = ((rest > rows - part) & (rest <= rows)).astype(jnp.int32)
            carry = blocks(rows, end - rest, count, carry)
        return carry, None

    return jax.lax.scan(group, carry, (jnp.arange(len(sizes)), sizes, ends))[0]


def _window(first: jax.Array, end: jax.Array, rows: int, total: int) -> tuple[jax.Array, jax.Array]:
    """Returns where to read `rows` of `total` rows to see those from `first` to `end`, and a mask.

    The window begins before `first` where it would leave the array; `valid` [rows] marks the rows
    from `first` to `end` in it.
    """
    start = jnp.minimum(first, total - rows)
    row = start + jnp.arange(rows)
    return start, (row >= first) & (row < end)


def _at_least(rows: int, x: jax.Array) -> jax.Array:
    """Appends rows of zeros to an array that has fewer than `rows`."""
    return jnp.pad(x, ((0, max(0, rows - len(x))), (0, 0)))
