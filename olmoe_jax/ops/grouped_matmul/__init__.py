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
from olmoe_jax.ops.grouped_matmul.blocked import InStack

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
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    backend: str | None = None,
    *,
    stack: InStack | None = None,
    sums: Any = None,
    tuned: jax.Array | None = None,
    indices: jax.Array | None = None,
) -> jax.Array:
    """Returns y with y[i] = x[i] @ w[group of row i]. Differentiable in x and w.

    The kernels (`mosaic`, `pallas_triton`, `tokamax`) cannot be partitioned: under a mesh, call
    this inside `jax.shard_map`.

    Args:
      x: [N, D], rows sorted by group.
      w: [E, D, F] in x's dtype.
      group_sizes: [E] int32, with a sum of at most N.
      backend: one of BACKENDS; None takes the default of this process's platform.
      stack: the same matrices as w; a backend that `reads_in_stack` reads these instead.
      sums: a ref like `stack.matrices`, to which the backward adds the gradient; w gets none. Needs
        a backend that `reads_in_stack`.
      tuned: [u, D, F] in w's dtype, equal to w[indices]: gets the gradient, and is not read. w
        gets none, and the weight gradients of the other groups are not computed.
      indices: [u] int32, the groups of `tuned`. E or more stands for none (padding).

    Returns:
      [N, F] in x's dtype; the products add up in float32.

    Raises:
      ValueError: there is no such backend.
    """
    backend = _known(backend)
    stack = stack if reads_in_stack(backend) else None
    return _product(backend, x, w, stack, sums, tuned, indices, group_sizes)


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


def reads_in_stack(backend: str | None) -> bool:
    """Returns whether a backend reads a layer's matrices in the stack of all layers."""
    return _known(backend) == "blocked"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(
    backend: str,
    x: jax.Array,
    w: jax.Array,
    stack: InStack | None,
    sums: Any,
    tuned: jax.Array | None,
    indices: jax.Array | None,
    group_sizes: jax.Array,
) -> jax.Array:
    matrices = w if stack is None else stack
    return BACKENDS[backend].rows_by_weights(x, matrices, group_sizes, contract_last=False)


def _forward(
    backend: str,
    x: jax.Array,
    w: jax.Array,
    stack: InStack | None,
    sums: Any,
    tuned: jax.Array | None,
    indices: jax.Array | None,
    group_sizes: jax.Array,
) -> tuple[jax.Array, tuple]:
    y = _product(backend, x, w, stack, sums, tuned, indices, group_sizes)
    # Not w beside a stack: XLA would copy the layer's matrices to keep them.
    return y, (x, w if stack is None else stack, sums, indices, group_sizes)


def _backward(backend: str, residuals: tuple, g: jax.Array) -> tuple:
    x, matrices, sums, indices, group_sizes = residuals
    products = BACKENDS[backend]
    dx = products.rows_by_weights(g, matrices, group_sizes, contract_last=True)
    dw = d_tuned = None
    ends = jnp.cumsum(group_sizes)
    if indices is not None:
        # A padding index points at an appended empty group.
        indices = jnp.minimum(indices, len(group_sizes))
        sizes, ends = (jnp.append(a, 0)[indices] for a in (group_sizes, ends))
        if backend in _IN_ONE_PIECE:
            x, g, ends = _in_one_piece(x, g, sizes, ends)
        d_tuned = products.rows_by_rows(x, g, sizes, ends, x.dtype)
    elif sums is not None:
        products.add_rows_by_rows(x, g, group_sizes, InStack(sums, matrices.layer))
    else:
        dw = products.rows_by_rows(x, g, group_sizes, ends, x.dtype)
    return dx, dw, None, None, d_tuned, None, None


_product.defvjp(_forward, _backward)


def _in_one_piece(
    x: jax.Array, g: jax.Array, sizes: jax.Array, ends: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Moves the groups' rows to the front, without gaps. Returns x, g and the groups' new ends."""
    new_ends = jnp.cumsum(sizes)
    row = jnp.arange(x.shape[0])
    group = jnp.searchsorted(new_ends, row, side="right", method="compare_all")
    # Rows past the last group repeat some row; in a tile that reaches there, zeros multiply them.
    source = jnp.clip(row + (ends - new_ends)[jnp.minimum(group, len(sizes) - 1)], 0, len(x) - 1)
    return x[source], g[source], new_ends
