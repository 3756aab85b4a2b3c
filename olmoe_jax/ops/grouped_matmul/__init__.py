"""Grouped matrix multiplication: each group of rows is multiplied by its own weight matrix.

Shapes: N rows, D in, F out, E groups. Rows are sorted by group. Rows past sum(group_sizes) belong
to no group and give zeros. Groups may be empty, and a size may be any number.

A backend is a module with two functions, which the product and its gradients are made of:

    rows_by_weights(x, w, group_sizes, contract_last)
      Returns x [N, D] times w [E, D, F], or with `contract_last` x [N, F] times w transposed, in
      x's dtype.
    rows_by_rows(x, g, sizes, ends, dtype)
      Returns x^T g of each group's rows, [groups, D, F] in `dtype`, summed in float32. x is [N, D],
      g [N, F], sizes and ends [groups] int32: a group's rows are ends - sizes to ends.

The backend `blocked` also takes `InStack` for w, and has `add_rows_by_rows`, which adds a layer's
gradients to those of all layers.
"""

import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from olmoe_jax.errors import UserError
from olmoe_jax.ops.grouped_matmul import blocked, mosaic, ragged, tokamax, triton
from olmoe_jax.ops.grouped_matmul.stack import InStack

BACKENDS: dict[str, ModuleType] = {
    "blocked": blocked,
    "ragged_dot": ragged,
    "mosaic": mosaic,
    "pallas_triton": triton,
    "tokamax": tokamax,
}
_PLATFORM = {"mosaic": "gpu", "pallas_triton": "gpu", "tokamax": "gpu", "ragged_dot": "tpu"}
_IN_ONE_PIECE = ("ragged_dot", "mosaic", "tokamax")
"""Backends whose `rows_by_rows` needs groups without a gap: ends is the cumulated sum of sizes."""


def default_backend(platform: str) -> str:
    """Returns the backend for a platform ("cpu", "gpu" or "tpu").

    Hopper GPUs get jax's own kernels, which their makers test there; other GPUs ours.
    """
    gpu = "mosaic" if platform == "gpu" and mosaic.is_hopper() else "pallas_triton"
    return {"gpu": gpu, "tpu": "ragged_dot"}.get(platform, "blocked")


def check_backend(backend: str | None, platform: str) -> str:
    """Checks that a backend can run. None and "auto" stand for the platform's default.

    Returns the backend.

    Raises:
      UserError: the backend does not run on the platform, or is not installed.
    """
    backend = default_backend(platform) if backend in (None, "auto") else backend
    wrong = None
    if _PLATFORM.get(backend, platform) != platform:
        wrong = f"runs on {_PLATFORM[backend]}; this is {platform}; write blocked"
    elif backend == "mosaic" and not mosaic.is_hopper():
        wrong = "runs on NVIDIA Hopper GPUs, and this is another; write pallas_triton"
    elif backend == "tokamax" and (missing := tokamax.missing()):
        wrong = f"{missing}, or write pallas_triton or blocked, which need no other package"
    if wrong:
        raise UserError(f"model.grouped_matmul={backend}: {wrong}")
    return backend


def grouped_matmul(
    x: jax.Array, w: jax.Array, group_sizes: jax.Array, backend: str | None = None
) -> jax.Array:
    """Returns y with y[i] = x[i] @ w[group of row i]. Differentiable in x and w.

    The kernels (`mosaic`, `pallas_triton`, `tokamax`) cannot be partitioned: under a mesh, call
    this inside `jax.shard_map`.

    Args:
      x: [N, D], rows sorted by group.
      w: [E, D, F] in x's dtype.
      group_sizes: [E] int32, with a sum of at most N.
      backend: one of BACKENDS; None takes the default of this process's platform.

    Returns:
      [N, F] in x's dtype; the products add up in float32.

    Raises:
      ValueError: there is no such backend.
    """
    return _grouped_matmul(_known(backend), x, w, group_sizes)


def grouped_matmul_transposed(
    x: jax.Array, w: jax.Array | InStack, group_sizes: jax.Array, backend: str | None = None
) -> jax.Array:
    """Returns y with y[i] = x[i] @ w[group of row i]^T, without a transposed copy of w.

    Not differentiable.

    Args:
      x: [N, F], rows sorted by group.
      w: [E, D, F] in x's dtype; or in a stack, if `reads_in_stack` says so.
      group_sizes, backend: those of `grouped_matmul`.

    Returns:
      [N, D] in x's dtype; the products add up in float32.

    Raises:
      ValueError: there is no such backend.
    """
    return BACKENDS[_known(backend)].rows_by_weights(x, w, group_sizes, contract_last=True)


def _known(backend: str | None) -> str:
    """Returns the backend; None stands for the platform's default."""
    backend = backend or check_backend(None, jax.default_backend())
    if backend not in BACKENDS:
        names = ", ".join(BACKENDS)
        raise ValueError(f"grouped matmul backend {backend!r} is none of {names}")
    return backend


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(backend: str, x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
    return BACKENDS[backend].rows_by_weights(x, w, group_sizes, contract_last=False)


def _forward(
    backend: str, x: jax.Array, w: jax.Array, group_sizes: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return _grouped_matmul(backend, x, w, group_sizes), (x, w, group_sizes)


def _backward(
    backend: str, residuals: tuple[jax.Array, jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x, w, group_sizes = residuals
    dx = BACKENDS[backend].rows_by_weights(g, w, group_sizes, contract_last=True)
    ends = jnp.cumsum(group_sizes)
    return dx, BACKENDS[backend].rows_by_rows(x, g, group_sizes, ends, w.dtype), None


_grouped_matmul.defvjp(_forward, _backward)


def reads_in_stack(backend: str | None) -> bool:
    """Returns whether a backend reads a layer's matrices in the stack of all layers."""
    return _known(backend) == "blocked"


@jax.custom_vjp
def grouped_matmul_in_stack(
    x: jax.Array, w: jax.Array, stack: InStack, sums: Any, group_sizes: jax.Array
) -> jax.Array:
    """Computes `grouped_matmul` with the backend `blocked`, which reads the matrices in place.

    Args:
      x, group_sizes: those of `grouped_matmul`.
      w: [E, D, F] in x's dtype, equal to the stack's matrices: is not read, and gets the gradient
        unless `sums` does.
      stack: a layer's matrices.
      sums: a ref like `stack.matrices`, to which the backward adds the gradient; or None.
    """
    return blocked.rows_by_weights(x, stack, group_sizes, contract_last=False)


def _in_stack_forward(
    x: jax.Array, w: jax.Array, stack: InStack, sums: Any, group_sizes: jax.Array
) -> tuple[jax.Array, tuple]:
    y = grouped_matmul_in_stack(x, w, stack, sums, group_sizes)
    return y, (x, stack, sums, group_sizes)


def _in_stack_backward(residuals: tuple, g: jax.Array) -> tuple:
    x, stack, sums, group_sizes = residuals
    dx, dw = blocked.rows_by_weights(g, stack, group_sizes, contract_last=True), None
    if sums is None:
        dw = blocked.rows_by_rows(x, g, group_sizes, jnp.cumsum(group_sizes), x.dtype)
    else:
        blocked.add_rows_by_rows(x, g, group_sizes, InStack(sums, stack.layer))
    return dx, dw, None, None, None


grouped_matmul_in_stack.defvjp(_in_stack_forward, _in_stack_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def grouped_matmul_tuned(
    x: jax.Array,
    w: jax.Array,
    tuned: jax.Array,
    indices: jax.Array,
    group_sizes: jax.Array,
    backend: str | None = None,
) -> jax.Array:
    """Computes `grouped_matmul`; some of the matrices get a gradient, in an array of their own.

    The weight gradients of the other groups are not computed.

    Args:
      x, w, group_sizes, backend: those of `grouped_matmul`.
      tuned: [u, D, F] in w's dtype, equal to w[indices]: gets the gradient, and is not read.
      indices: [u] int32, the groups of these matrices. E or more stands for none (padding).
    """
    return grouped_matmul(x, w, group_sizes, backend)


def _tuned_forward(
    x: jax.Array,
    w: jax.Array,
    tuned: jax.Array,
    indices: jax.Array,
    group_sizes: jax.Array,
    backend: str | None,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    y = grouped_matmul_tuned(x, w, tuned, indices, group_sizes, backend)
    return y, (x, w, indices, group_sizes)


def _tuned_backward(
    backend: str | None, residuals: tuple[jax.Array, ...], g: jax.Array
) -> tuple[jax.Array, None, jax.Array, None, None]:
    x, w, indices, group_sizes = residuals
    backend = backend or check_backend(None, jax.default_backend())
    dx = BACKENDS[backend].rows_by_weights(g, w, group_sizes, contract_last=True)
    # A padding index points at an appended empty group.
    indices = jnp.minimum(indices, group_sizes.shape[0])
    sizes = jnp.append(group_sizes, 0)[indices]
    ends = jnp.append(jnp.cumsum(group_sizes), 0)[indices]
    if backend in _IN_ONE_PIECE:
        x, g, ends = _in_one_piece(x, g, sizes, ends)
    d_tuned = BACKENDS[backend].rows_by_rows(x, g, sizes, ends, w.dtype)
    return dx, None, d_tuned, None, None


grouped_matmul_tuned.defvjp(_tuned_forward, _tuned_backward)


def _in_one_piece(
    x: jax.Array, g: jax.Array, sizes: jax.Array, ends: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Moves the groups' rows to the front, without gaps. Returns x, g and the groups' new ends."""
    new_ends = jnp.cumsum(sizes)
    row = jnp.arange(x.shape[0])
    group = jnp.searchsorted(new_ends, row, side="right", method="compare_all")
    # Rows past the last group repeat some row; no backend reads them.
    source = jnp.clip(row + (ends - new_ends)[jnp.minimum(group, len(sizes) - 1)], 0, len(x) - 1)
    return x[source], g[source], new_ends
