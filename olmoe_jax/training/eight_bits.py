"""Moments in 8 bits; each block of up to 256 numbers has its own scale.

The idea is that of 8-bit Adam (Dettmers et al., https://arxiv.org/abs/2110.02861): a number is the
largest magnitude of its block times a value that its code stands for, and these values are densest
near zero. 8-bit Adam looks the values up in tables. This module computes them, so that XLA fuses
them into the update: (c / 127)^4, with a sign, for first moments, and (c / 255)^8 for second
moments, which are squares and span twice the decades.

Rounding is stochastic (see `olmoe_jax.training.rounding`) and makes no number zero: an update with
a second moment of zero would be huge. Blocks lie along the last dimension, so that codes and scales
are sharded as the moments are.

Shapes: arrays [..., N] in n blocks.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from olmoe_jax.training.rounding import random_bits

BLOCK = 256
"""The most numbers that share a scale, as in bitsandbytes and torchao."""
_MAPS: dict[Any, tuple[int, int]] = {jnp.dtype("int8"): (127, 2), jnp.dtype("uint8"): (255, 3)}
"""For each dtype of codes: the largest code, and how many times c / largest is squared."""


class EightBits(NamedTuple):
    """An array [..., N] in 8 bits."""

    codes: jax.Array  # [..., N] int8; uint8 for numbers that are never negative
    scales: jax.Array  # [..., n] float32


def is_eight_bits(leaf: Any) -> bool:
    """Returns whether a node of a tree is an `EightBits`: an is_leaf for `jax.tree.map`."""
    return isinstance(leaf, EightBits)


def zeros(shape: tuple[int, ...], dtype: DTypeLike) -> EightBits:
    """Returns zeros [..., N] with codes of this dtype."""
    *outer, size = shape
    return EightBits(jnp.zeros(shape, dtype), jnp.zeros((*outer, -(-size // BLOCK))))


def scales_of(x: jax.Array) -> jax.Array:
    """Returns the largest magnitude in each block of x [..., N], N > 0: [..., n]."""
    return _in_blocks(jnp.abs(x), -(-x.shape[-1] // BLOCK)).max(axis=-1)


def encode(x: jax.Array, scales: jax.Array, dtype: DTypeLike, key: jax.Array) -> EightBits:
    """Rounds float32 to 8 bits, up or down with the probabilities that make the mean exact.

    Args:
      x: [..., N] finite numbers, with uint8 none negative.
      scales: `scales_of(x)`.
      dtype: the codes' dtype, int8 or uint8.
      key: [2] uint32, as for `stochastic_round`.
    """
    largest, squarings = _MAPS[jnp.dtype(dtype)]
    divisors = jnp.where(scales > 0, scales, 1)[..., None]
    shares = root = _in_blocks(jnp.abs(x), scales.shape[-1]) / divisors
    for _ in range(squarings):
        root = jnp.sqrt(root)
    # The codes on both sides of a number, and the shares that they stand for.
    lower = jnp.minimum(jnp.floor(largest * root), largest - 1)
    below, above = _share(lower, dtype), _share(lower + 1, dtype)
    draws = (random_bits(shares.shape, key) >> 8).astype(jnp.float32) * 2**-24
    codes = lower + (draws < (shares - below) / (above - below))
    # Only zero becomes zero.
    codes = jnp.maximum(codes, shares > 0)
    return EightBits((jnp.sign(x) * _joined(codes, x.shape[-1])).astype(dtype), scales)


def decode(x: EightBits) -> jax.Array:
    """Returns the numbers that the codes stand for, [..., N] float32."""
    codes = _in_blocks(x.codes.astype(jnp.float32), x.scales.shape[-1])
    shares = jnp.sign(codes) * _share(codes, x.codes.dtype)
    return _joined(shares * x.scales[..., None], x.codes.shape[-1])


def _share(codes: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Returns the share of its block's largest magnitude that a code stands for, without sign."""
    largest, squarings = _MAPS[jnp.dtype(dtype)]
    share = codes / largest
    for _ in range(squarings):
        share = jnp.square(share)
    return share


def _in_blocks(x: jax.Array, blocks: int) -> jax.Array:
    """Cuts x into blocks, the last one filled up with zeros: [..., N] -> [..., n, N / n]."""
    *outer, size = x.shape
    length = -(-size // blocks)
    filled = jnp.pad(x, [(0, 0)] * len(outer) + [(0, blocks * length - size)])
    return filled.reshape(*outer, blocks, length)


def _joined(x: jax.Array, size: int) -> jax.Array:
    """Returns x [..., N] from its blocks: the inverse of `_in_blocks`."""
    *outer, blocks, length = x.shape
    return x.reshape(*outer, blocks * length)[..., :size]
