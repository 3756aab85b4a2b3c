"""Grouped matrix multiplication: each group of rows by its own weight matrix.

Shapes: N rows, D in, F out, E groups. Rows are sorted by group; rows past sum(group_sizes) belong
to no group and give zeros. Groups may be empty, sizes need not be multiples of anything.
"""

import functools

import jax
import jax.numpy as jnp

from olmoe_jax.ops.blocked_matmul import rows_by_rows, rows_by_weights

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
    return rows_by_weights(x, w, group_sizes, contract_last=False)


def _blocked_forward(x, w, group_sizes):
    return _blocked(x, w, group_sizes), (x, w, group_sizes)


def _blocked_backward(residuals, g):
    x, w, group_sizes = residuals
    dx = rows_by_weights(g, w, group_sizes, contract_last=True)
    dw = rows_by_rows(x, g, group_sizes, jnp.cumsum(group_sizes), w.dtype)
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
    dselected = rows_by_rows(x, g, sizes[indices], ends[indices], selected.dtype)
    return dx, None, dselected, None, None


grouped_matmul_selected.defvjp(_selected_forward, _selected_backward)
