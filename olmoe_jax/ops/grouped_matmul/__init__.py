"""Grouped matrix multiplication: each group of rows by its own weight matrix.

Shapes: N rows, D in, F out, E groups. Rows are sorted by group; rows past sum(group_sizes) belong
to no group and give zeros. Groups may be empty, sizes need not be multiples of anything.

A backend is a module with two functions, of which the product and its gradients are made:
`rows_by_weights`, which can also multiply by the transposed weights, and `rows_by_rows`.
"""

import functools
from types import ModuleType

import jax
import jax.numpy as jnp

from olmoe_jax.errors import UserError
from olmoe_jax.ops.grouped_matmul import blocked, ragged, tokamax, triton

BACKENDS: dict[str, ModuleType] = {
    "blocked": blocked,
    "ragged_dot": ragged,
    "tokamax": tokamax,
    "pallas_triton": triton,
}
_PLATFORM = {"tokamax": "gpu", "pallas_triton": "gpu", "ragged_dot": "tpu"}
_IN_ONE_PIECE = ("ragged_dot", "tokamax")
"""Backends whose `rows_by_rows` needs groups that follow each other."""


def default_backend(platform: str) -> str:
    """The backend for a platform ("cpu", "gpu", "tpu").

    On GPUs a library's kernels, which its makers test there; `pallas_triton` has never run on one.
    """
    return {"gpu": "tokamax", "tpu": "ragged_dot"}.get(platform, "blocked")


def check_backend(backend: str | None, platform: str) -> str:
    """The backend of grouped matmuls: `backend`, or where it is None the platform's.

    Raises:
      UserError: it does not run on the platform, or is not installed.
    """
    backend = backend or default_backend(platform)
    wrong = None
    if _PLATFORM.get(backend, platform) != platform:
        wrong = f"is for a {_PLATFORM[backend]}, and this is a {platform}; write blocked"
    elif backend == "tokamax" and (missing := tokamax.missing()):
        wrong = f"{missing}, or write pallas_triton or blocked, which need no other package"
    if wrong:
        raise UserError(f"model.grouped_matmul={backend}: {wrong}")
    return backend


def grouped_matmul(
    x: jax.Array, w: jax.Array, group_sizes: jax.Array, backend: str | None = None
) -> jax.Array:
    """y[i] = x[i] @ w[group of row i].

    The kernels (`tokamax`, `pallas_triton`) cannot be partitioned: under a mesh, call this inside
    `jax.shard_map`.

    Args:
      x: [N, D], rows sorted by group.
      w: [E, D, F], dtype of x.
      group_sizes: [E] int32, with a sum of at most N.
      backend: one of BACKENDS; None is `check_backend`'s choice for this process's platform.

    Returns:
      [N, F] in x's dtype; products are accumulated in float32.
    """
    backend = backend or check_backend(None, jax.default_backend())
    if backend not in BACKENDS:
        names = ", ".join(BACKENDS)
        raise ValueError(f"grouped matmul backend {backend!r} is none of {names}")
    return _grouped_matmul(backend, x, w, group_sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(backend, x, w, group_sizes):
    return BACKENDS[backend].rows_by_weights(x, w, group_sizes, contract_last=False)


def _forward(backend, x, w, group_sizes):
    return _grouped_matmul(backend, x, w, group_sizes), (x, w, group_sizes)


def _backward(backend, residuals, g):
    x, w, group_sizes = residuals
    dx = BACKENDS[backend].rows_by_weights(g, w, group_sizes, contract_last=True)
    ends = jnp.cumsum(group_sizes)
    return dx, BACKENDS[backend].rows_by_rows(x, g, group_sizes, ends, w.dtype), None


_grouped_matmul.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def grouped_matmul_tuned(
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
    y = grouped_matmul_tuned(x, w, selected, indices, group_sizes, backend)
    return y, (x, w, selected, indices, group_sizes)


def _selected_backward(backend, residuals, g):
    x, w, selected, indices, group_sizes = residuals
    backend = backend or check_backend(None, jax.default_backend())
    whole = replace(w, selected, indices)
    dx = BACKENDS[backend].rows_by_weights(g, whole, group_sizes, contract_last=True)
    indices = jnp.minimum(indices, group_sizes.shape[0])
    sizes = jnp.append(group_sizes, 0)[indices]
    ends = jnp.append(jnp.cumsum(group_sizes), 0)[indices]
    if backend in _IN_ONE_PIECE:
        x, g, ends = _in_one_piece(x, g, sizes, ends)
    dselected = BACKENDS[backend].rows_by_rows(x, g, sizes, ends, selected.dtype)
    return dx, None, dselected, None, None


grouped_matmul_tuned.defvjp(_selected_forward, _selected_backward)


def _in_one_piece(x, g, sizes, ends):
    """x and g with the groups' rows moved to the front, group after group, and where they end."""
    new_ends = jnp.cumsum(sizes)
    row = jnp.arange(x.shape[0])
    group = jnp.searchsorted(new_ends, row, side="right", method="compare_all")
    # Rows past the groups are some row's copy, which nobody reads.
    source = jnp.clip(row + (ends - new_ends)[jnp.minimum(group, len(sizes) - 1)], 0, len(x) - 1)
    return x[source], g[source], new_ends
