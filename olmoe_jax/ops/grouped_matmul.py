"""Grouped matrix multiplication: each group of rows by its own weight matrix.

Shapes: N rows, D in, F out, E groups. Rows are sorted by group; rows past sum(group_sizes) belong
to no group and give zeros. Groups may be empty, sizes need not be multiples of anything.
"""

import functools
import math

import jax
import jax.numpy as jnp

BACKENDS = ("blocked", "ragged_dot")


def default_backend(platform: str) -> str:
    """The backend for a platform ("cpu", "gpu", "tpu").

    `lax.ragged_dot` is native on TPUs; on CPUs and GPUs it becomes a matmul over all experts.
    """
    return "ragged_dot" if platform == "tpu" else "blocked"


def grouped_matmul(
    x: jax.Array, w: jax.Array, group_sizes: jax.Array, backend: str | None = None
) -> jax.Array:
    """y[i] = x[i] @ w[group of row i].

    Args:
      x: [N, D], rows sorted by group.
      w: [E, D, F], dtype of x.
      group_sizes: [E] int32, with a sum of at most N.
      backend: one of BACKENDS; None is the default backend's choice for this process's platform.

    Returns:
      [N, F] in x's dtype; products are accumulated in float32.
    """
    backend = backend or default_backend(jax.default_backend())
    if backend == "ragged_dot":
        y = jax.lax.ragged_dot(x, w, group_sizes, preferred_element_type=jnp.float32)
        return y.astype(x.dtype)
    if backend != "blocked":
        raise ValueError(f"grouped matmul backend {backend!r} is none of {BACKENDS}")
    return _blocked(x, w, group_sizes)


@jax.custom_vjp
def _blocked(x, w, group_sizes):
    return _rows_by_weights(x, w, group_sizes, contract_last=False)


def _blocked_forward(x, w, group_sizes):
    return _blocked(x, w, group_sizes), (x, w, group_sizes)


def _blocked_backward(residuals, g):
    x, w, group_sizes = residuals
    dx = _rows_by_weights(g, w, group_sizes, contract_last=True)
    dw = _rows_by_rows(x, g, group_sizes, jnp.cumsum(group_sizes), w.dtype)
    return dx, dw, None


_blocked.defvjp(_blocked_forward, _blocked_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def grouped_matmul_selected(
    x: jax.Array,
    w: jax.Array,
    selected: jax.Array,
    indices: jax.Array,
    group_sizes: jax.Array,
    backend: str | None = None,
) -> jax.Array:
    """`grouped_matmul` with some of the matrices replaced; only these get a gradient.

    The weight gradients of the other groups are not computed.

    Args:
      x, w, group_sizes, backend: as there.
      selected: [n, D, F], the replacements.
      indices: [n] int32, the groups that they replace; E or more: none (padding).
    """
    return grouped_matmul(x, replace(w, selected, indices), group_sizes, backend)


def replace(w: jax.Array, selected: jax.Array, indices: jax.Array) -> jax.Array:
    """w [E, D, F] with w[indices[i]] = selected[i]; indices of E or more are ignored."""
    return w.at[indices].set(selected, mode="drop")


def _selected_forward(x, w, selected, indices, group_sizes, backend):
    y = grouped_matmul_selected(x, w, selected, indices, group_sizes, backend)
    return y, (x, w, selected, indices, group_sizes)


def _selected_backward(backend, residuals, g):
    x, w, selected, indices, group_sizes = residuals
    whole = replace(w, selected, indices)
    (dx,) = jax.vjp(lambda x: grouped_matmul(x, whole, group_sizes, backend), x)[1](g)
    sizes = jnp.append(group_sizes, 0)
    ends = jnp.append(jnp.cumsum(group_sizes), 0)
    indices = jnp.minimum(indices, group_sizes.shape[0])
    dselected = _rows_by_rows(x, g, sizes[indices], ends[indices], selected.dtype)
    return dx, None, dselected, None, None


grouped_matmul_selected.defvjp(_selected_forward, _selected_backward)


def _block_rows(rows: int, groups: int) -> int:
    """Rows per block: the mean group as a power of two in 16…256 (larger wastes more tails)."""
    mean = max(1, rows // groups)
    return min(256, max(16, 1 << math.ceil(math.log2(mean))))


def _for_each_block(sizes, ends, weights, block, carry, body, finish=lambda carry: (carry, None)):
    """Scans over groups and, inside, over blocks of a group's rows, in row order.

    A group's rows are ends - sizes … ends. `body(carry, weight, first_row, valid)` sees a block
    that starts at `first_row`; `valid` [block] marks the rows of this group (its last block also
    covers rows of later groups).
    """

    def group(carry, inputs):
        weight, size, end = inputs

        def one_block(index, carry):
            first = end - size + index * block
            return body(carry, weight, first, first + jnp.arange(block) < end)

        blocks = (size + block - 1) // block
        return finish(jax.lax.fori_loop(0, blocks, one_block, carry))

    return jax.lax.scan(group, carry, (weights, sizes, ends))


def _padded(x, block):
    """Room for the last block, which may start on the last row."""
    return jnp.pad(x, ((0, block), (0, 0)))


def _rows_by_weights(x, w, group_sizes, contract_last: bool):
    """x [N, D] by w [E, D, F], or with `contract_last` x [N, F] by w transposed."""
    rows, block = x.shape[0], _block_rows(x.shape[0], w.shape[0])
    padded = _padded(x, block)
    dimensions = (((1,), (1 if contract_last else 0,)), ((), ()))

    def body(out, weight, first, valid):
        block_rows = jax.lax.dynamic_slice_in_dim(padded, first, block)
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
    return _for_each_block(group_sizes, ends, w, block, out, body)[0][:rows]


def _rows_by_rows(x, g, sizes, ends, dtype):
    """For each group, x^T g over its rows, summed in float32: [groups, D, F] of `dtype`."""
    block = _block_rows(x.shape[0], sizes.shape[0])
    x_padded, g_padded = _padded(x, block), _padded(g, block)
    slice_rows = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=block)

    def body(total, _, first, valid):
        x_rows = jnp.where(valid[:, None], slice_rows(x_padded, first), 0)
        return total + jax.lax.dot_general(
            x_rows,
            slice_rows(g_padded, first),
            (((0,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )

    zero = jnp.zeros((x.shape[1], g.shape[1]), jnp.float32)
    # Rounded group by group, so that one matrix is in float32 and not all of them.
    return _for_each_block(
        sizes, ends, None, block, zero, body, finish=lambda total: (zero, total.astype(dtype))
    )[1]
