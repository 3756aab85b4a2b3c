"""Frozen weights in 8 or 4 bits; each block of 64 numbers has its own scale.

The storage is that of QLoRA (https://arxiv.org/abs/2305.14314). A block is divided by its largest
magnitude, and each number becomes the nearest of 16 values. The values of "nf4" are zero and
quantiles of a normal distribution, which trained weights nearly follow. "int8" has 255 equidistant
values. Blocks lie along a matrix's input, as those of bitsandbytes do, whose matrices are
[out, in]. Scales are bfloat16, a quarter of a bit per number; bitsandbytes has float32 scales, or
quantizes them a second time. The codes are chosen for the rounded scale.

Shapes: matrices [..., D, F] in n blocks [..., n, 64, F]; zeros fill the last block up.
"""

import dataclasses
import functools
import itertools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

Scheme = Literal["nf4", "int8"]
BLOCK = 64
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The 16 values of QLoRA's appendix E."""
_MIDDLES = np.array([(low + high) / 2 for low, high in itertools.pairwise(NF4)], np.float32)
_LARGEST = {"int8": 127, "nf4": 1}


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["codes", "scales"], meta_fields=["width"]
)
@dataclasses.dataclass(frozen=True)
class Quantized:
    """Quantized matrices: arrays of numpy or jax, or their shapes."""

    codes: (
        Any  # int8 [..., 64 n, F]; "nf4": uint8 [..., 32 n, F], a byte's first code in 4 low bits
    )
    scales: Any  # bfloat16 [..., n, F]
    width: int  # D

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrices, [..., D, F]."""
        *outer, _, columns = self.codes.shape
        return (*outer, self.width, columns)


def quantized_shapes(shape: tuple[int, ...], scheme: Scheme) -> Quantized:
    """Returns the shapes and dtypes of what `quantize` makes of matrices of this shape."""
    *outer, width, columns = shape
    blocks = -(-width // BLOCK)
    rows, dtype = {"int8": (BLOCK, jnp.int8), "nf4": (BLOCK // 2, jnp.uint8)}[scheme]
    return Quantized(
        jax.ShapeDtypeStruct((*outer, blocks * rows, columns), dtype),
        jax.ShapeDtypeStruct((*outer, blocks, columns), jnp.bfloat16),
        width,
    )


def quantize(weight: np.ndarray, scheme: Scheme) -> Quantized:
    """Quantizes matrices [..., D, F] of any float dtype on the host."""
    if weight.ndim > 2:
        # One matrix at a time: the float32 copies stay as small as one matrix.
        parts = [quantize(matrix, scheme) for matrix in weight]
        return jax.tree.map(lambda *same: np.stack(same), *parts)
    width, columns = weight.shape
    blocks = -(-width // BLOCK)
    values = np.zeros((blocks * BLOCK, columns), np.float32)
    values[:width] = weight
    values = values.reshape(blocks, BLOCK, columns)
    scales = (np.abs(values).max(axis=1) / _LARGEST[scheme]).astype(jnp.bfloat16)
    values /= np.where(scales == 0, 1, scales).astype(np.float32)[:, None]
    if scheme == "int8":
        codes = np.rint(values).clip(-127, 127).astype(np.int8)
    else:
        nearest = np.zeros(values.shape, np.uint8)
        for middle in _MIDDLES:
            nearest += values > middle
        codes = nearest[:, 0::2] | nearest[:, 1::2] << 4
    return Quantized(codes.reshape(-1, columns), scales, width)


def dequantize(weight: Quantized, dtype: DTypeLike) -> jax.Array:
    """Returns the matrices [..., D, F] in `dtype`, computed in float32."""
    *outer, blocks, columns = weight.scales.shape
    values = weight.codes
    if values.dtype == jnp.uint8:
        shifts = jnp.array([[0], [4]], jnp.uint8)
        values = _nf4((values[..., None, :] >> shifts) & 15)
    values = values.reshape(*outer, blocks, BLOCK, columns).astype(jnp.float32)
    values *= weight.scales[..., None, :].astype(jnp.float32)
    return values.reshape(*outer, -1, columns)[..., : weight.width, :].astype(dtype)


def dequantized(tree: Any, dtype: DTypeLike) -> Any:
    """Returns the tree with every `Quantized` replaced by its matrices in `dtype`."""

    def in_full(leaf: Any) -> Any:
        return dequantize(leaf, dtype) if _is_leaf(leaf) else leaf

    return jax.tree.map(in_full, tree, is_leaf=_is_leaf)


def is_quantized(tree: Any) -> bool:
    """Says if the tree contains a `Quantized`."""
    return any(map(_is_leaf, jax.tree.leaves(tree, is_leaf=_is_leaf)))


def _is_leaf(value: Any) -> bool:
    return isinstance(value, Quantized)


def _nf4(codes: jax.Array) -> jax.Array:
    """Returns NF4[codes], float32.

    The sum is elementwise because TPUs gather slowly. A chain of `jnp.where` would store each of
    the 16 constants as a whole array.
    """
    return sum(jnp.float32(value) * (codes == code) for code, value in enumerate(NF4))
