"""float32 numbers in 16 bits: rounded stochastically, or in two halves that lose nothing.

Every function is elementwise. XLA therefore fuses it into the update, no float32 copy is ever
stored, and the sharding of an array changes no value.
"""

import jax
import jax.numpy as jnp

_LOW = 0xFFFF


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    """Rounds float32 to bfloat16, up or down with the probabilities that make the mean exact.

    A number that bfloat16 holds stays as it is. Rounding to nearest would drop every change below
    half a unit in the last place (2^-9 to 2^-8 of the number), however often it comes.

    Args:
      x: finite numbers of any shape.
      key: [2] uint32; the key and an element's index alone determine the element's draw.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return _upper(bits + (random_bits(x.shape, key) & _LOW))


def split_float32(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Splits float32 into the nearest bfloat16 (halves away from zero) and 16 low bits (uint16)."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return _upper(bits + 0x8000), (bits & _LOW).astype(jnp.uint16)


def join_float32(upper: jax.Array, lower: jax.Array) -> jax.Array:
    """Returns the float32 that `split_float32` took apart, bit by bit.

    Args:
      upper: bfloat16, any shape.
      lower: uint16 of the same shape.
    """
    high = jax.lax.bitcast_convert_type(upper, jnp.uint16).astype(jnp.uint32)
    low = lower.astype(jnp.uint32)
    # If the lower half is at least 0x8000, the upper half was rounded up.
    bits = ((high - (low >> 15)) << 16) | low
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def random_bits(shape: tuple[int, ...], key: jax.Array) -> jax.Array:
    """Returns a uniform uint32 for each element, from `key` [2] uint32 and the element's index.

    Hashes the index with lowbias32 (https://github.com/skeeto/hash-prospector), once for each word
    of the key. jax's generator, which is cryptographic, would cost more than the update; on GPUs it
    is a kernel of its own, whose results would be stored.
    """
    x = _indices(shape)
    for word in key:
        x = x ^ word
        x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
        x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
        x = x ^ (x >> 16)
    return x


def _upper(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def _indices(shape: tuple[int, ...]) -> jax.Array:
    """Returns each element's place in the flat array, uint32 (modulo 2^32)."""
    place = jnp.zeros(shape, jnp.uint32)
    for dimension, size in enumerate(shape):
        place = place * size + jax.lax.broadcasted_iota(jnp.uint32, shape, dimension)
    return place
