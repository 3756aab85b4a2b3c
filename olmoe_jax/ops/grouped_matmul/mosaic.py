"""Grouped matrix multiplication by jax's Mosaic kernels, for NVIDIA Hopper GPUs in 16 bits.

The kernels (jax.experimental.pallas.ops.gpu) read the weights transposed where they must, so that
no copy of them exists. XLA folds the slice of a layer's weights out of a scan's stack into them.
A dimension that no tile divides is padded with zeros.
"""

import contextlib
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

import olmoe_jax.ops.grouped_matmul.triton as triton

_TILE: dict[str, Any] = {"block_m": 128, "max_concurrent_steps": 4, "grid_block_n": 4}
_INNER, _OUTER = 64, 128
"""Lengths of a tile along the summed dimension and along the output's columns, at most."""
_NARROWEST = 64
"""The shortest side of a tile that all three kernels compile for: 128 bytes of shared memory."""
_HOPPER_CORES = 132


def is_hopper() -> bool:
    """Returns whether this process's GPUs are Hoppers.

    Without a GPU the answer is yes: programs are compiled ahead of time for H100s alone.
    """
    return getattr(jax.devices()[0], "compute_capability", "9.0") == "9.0"


def suits(dtype: DTypeLike) -> bool:
    """Returns whether the kernels take a dtype: their instruction multiplies 16-bit numbers."""
    return jnp.dtype(dtype).itemsize == 2


def rows_by_weights(
    x: jax.Array, w: jax.Array, group_sizes: jax.Array, contract_last: bool
) -> jax.Array:
    """Returns each group's rows times its matrix."""
    if not suits(x.dtype):
        return triton.rows_by_weights(x, w, group_sizes, contract_last)
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot

    width = w.shape[1] if contract_last else w.shape[2]
    (x, block_k), (w, _) = _padded(x, 1, _INNER), _padded(w, 2 if contract_last else 1, _INNER)
    w, block_n = _padded(w, 1 if contract_last else 2, _OUTER)
    y = ragged_dot(
        x,
        w,
        group_sizes=group_sizes,
        block_n=block_n,
        block_k=block_k,
        transpose_rhs=contract_last,
        **_TILE,
    )
    # The kernel does not write the rows of no group.
    is_row = jnp.arange(len(x)) < jnp.sum(group_sizes)
    return jnp.where(is_row[:, None], y[:, :width], 0)


def rows_by_rows(
    x: jax.Array, g: jax.Array, sizes: jax.Array, ends: jax.Array, dtype: DTypeLike
) -> jax.Array:
    """Returns x^T g of each group's rows; the groups have no gap between them.

    Rows of no group must be finite: the last tile of a group multiplies them by zero.
    """
    if not (suits(x.dtype) and suits(dtype)):
        return triton.rows_by_rows(x, g, sizes, ends, dtype)
    from jax.experimental.pallas.ops.gpu import transposed_ragged_dot_mgpu as kernels

    height, width = x.shape[1], g.shape[1]
    (x, block_m), (g, block_n) = _padded(x, 1, _OUTER), _padded(g, 1, _OUTER)
    tile = _TILE | {"block_m": block_m, "block_n": block_n, "block_k": _INNER}
    with _known_cores(kernels):
        out = kernels.transposed_ragged_dot(x, g, group_sizes=sizes, **tile)
    return out[:, :height, :width].astype(dtype)


def _padded(array: jax.Array, axis: int, longest: int) -> tuple[jax.Array, int]:
    """Pads a dimension until a tile divides it. Returns the array and the tile's length."""
    size = array.shape[axis]
    length = min(longest, max(_NARROWEST, 1 << (size - 1).bit_length()))
    padding = [(0, 0)] * array.ndim
    padding[axis] = (0, -size % length)
    return (jnp.pad(array, padding) if padding[axis][1] else array), length


@contextlib.contextmanager
def _known_cores(kernels: types.ModuleType) -> Iterator[None]:
    """Tells the kernel the number of cores where the first device does not.

    The kernel asks `jax.devices()[0]`, which is the CPU when a program is compiled ahead of time.
    """
    if hasattr(jax.devices()[0], "core_count"):
        yield
        return
    hopper = types.SimpleNamespace(core_count=_HOPPER_CORES)
    stand_in = mock.MagicMock(wraps=jax, devices=lambda: [hopper])
    with mock.patch.object(kernels, "jax", stand_in):
        yield
