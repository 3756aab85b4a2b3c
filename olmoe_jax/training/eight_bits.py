"""Moments in 8 bits, each block of up to 256 numbers with a scale of its own.

As in 8-bit Adam (Dettmers et al., https://arxiv.org/abs/2110.02861), a number is its block's
largest magnitude times one of the values of a map, which lie the denser the nearer to zero. There
the maps are tables; here they are (c / 127)^4, with signs, for first moments, and (c / 255)^8 for
second ones, whose sizes differ by the square. Being computed, XLA fuses them into the update.

Rounding is stochastic, see `olmoe_jax.training.rounding`, and never makes a number zero: a second
moment of zero would blow its update up. Blocks lie along the last dimension, so that codes and
scales are sharded as the moments are.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from olmoe_jax.training.rounding import random_bits

BLOCK = 256
"""Numbers with one scale, at most; bitsandbytes' and torchao's."""
_MAPS: dict[Any, tuple[int, int]] = {jnp.dtype("int8"): (127, 2), jnp.dtype("uint8"): (255, 3)}
"""Of each dtype of codes: the largest, and how many times c / largest is squared."""


class EightBits(NamedTuple):
    """An array [..., N] in 8 bits. n: as many blocks as N numbers need."""

    codes: jax.Array  # [..., N] int8, or uint8 of numbers that are not negative
    scales: jax.Array  # [..., n] float32


def is_eight_bits(leaf: Any) -> bool:
    """For `jax.tree.map`'s is_leaf."""
    return isinstance(leaf, EightBits)


def zeros(shape: tuple[int, ...], dtype: DTypeLike) -> EightBits:
    """Zeros [..., N] with codes of this dtype."""
    *outer, size = shape
    return EightBits(jnp.zeros(shape, dtype), jnp.zeros((*outer, -(-size // BLOCK))))


def scales_of(x: jax.Array) -> jax.Array:
    """The largest magnitude in each block of x [..., N], N > 0: [..., n]."""
    return _in_blocks(jnp.abs(x), -(-x.shape[-1] // BLOCK)).max(axis=-1)


def encode(x: jax.Array, scales: jax.Array, dtype: DTypeLike, key: jax.Array) -> EightBits:
    """float32 -> 8 bits, up or down with the probabilities that make the mean exact.

    Args:
      x: finite numbers [..., N]; for uint8 none is negative.
      scales: `scales_of(x)`.
      dtype: of the codes, int8 or uint8.
      key: [2] uint32, as for `stochastic_round`.
    """
    largest, squarings = _MAPS[jnp.dtype(dtype)]
    divisors = jnp.where(scales > 0, scales, 1)[..., None]
    shares = root = _in_blocks(jnp.abs(x), scales.shape[-1]) / divisors
    for _ in range(squarings):
        root = jnp.sqrt(root)
    lower = jnp.minimum(jnp.floor(largest * root), largest - 1)
    below, above = _share(lower, dtype), _share(lower + 1, dtype)
    draws = (random_bits(shares.shape, key) >> 8).astype(jnp.float32) * 2**-24
    codes = lower + (draws < (shares - below) / (above - below))
    codes = jnp.maximum(codes, shares > 0)
    return EightBits((jnp.sign(x) * _joined(codes, x.shape[-1])).astype(dtype), scales)


def decode(x: EightBits) -> jax.Array:
    """The float32 numbers [..., N] that the codes stand for."""
    codes = _in_blocks(x.codes.astype(jnp.float32), x.scales.shape[-1])
    shares = jnp.sign(codes) * _share(codes, x.codes.dtype)
    return _joined(shares * x.scales[..., None], x.codes.shape[-1])


def _share(codes: jax.Array, dtype: DTypeLike) -> jax.Array:
    """How much of its block's largest magnitude a code stands for, but for the sign."""
    largest, squarings = _MAPS[jnp.dtype(dtype)]
    share = codes / largest
    for _ in range(squarings):
        share = jnp.square(share)
    return share


def _in_blocks(x: jax.Array, blocks: int) -> jax.Array:
    """[..., N] -> [..., n, N / n], filled up with zeros."""
    *outer, size = x.shape
    length = -(-size // blocks)
    filled = jnp.pad(x, [(0, 0)] * len(outer) + [(0, blocks * length - size)])
    return filled.reshape(*outer, blocks, length)


def _joined(x: jax.Array, size: int) -> jax.Array:
    """The inverse of `_in_blocks`."""
    *outer, blocks, length = x.shape
    return x.reshape(*outer, blocks * length)[..., :size]
