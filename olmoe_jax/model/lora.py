"""LoRA adapters beside frozen weights, and their dropout; initialised as PEFT initialises them.

Shapes: B rows, D in, F out, R rank.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from olmoe_jax.model.config import TARGETS, LoraSettings, ModelSettings
from olmoe_jax.ops.linear import Linear


def is_target(name: str) -> bool:
    """Returns whether the base's parameter `name` is a matrix that can have an adapter."""
    return name.startswith("layers.") and name.rpartition(".")[2] in TARGETS


def is_adapter(name: str) -> bool:
    """Returns whether a parameter belongs to a LoRA adapter."""
    return ".lora." in name


class Adapters(nnx.Module):
    """The factors A and B of each adapted matrix of a module, as parameters NAME_a and NAME_b."""

    def __init__(self, settings: LoraSettings, matrices: dict[str, dict[str, int]], rngs: nnx.Rngs):
        """Declares the parameters.

        Args:
          settings: which matrices have an adapter, and its rank.
          matrices: name -> the weight's logical axes and sizes, the last two being in and out.
          rngs: its "params" stream draws A; B is zero.
        """
        for name, axes in matrices.items():
            if name not in settings.targets:
                continue
            *outer, (in_axis, width), (out_axis, out) = axes.items()
            # torch's kaiming_uniform with a = sqrt(5): uniform within 1 / sqrt(fan in).
            limit = 1 / math.sqrt(width)
            a_axes = {**dict(outer), in_axis: width, "rank": settings.rank}
            b_axes = {**dict(outer), "rank": settings.rank, out_axis: out}
            a = jax.random.uniform(
                rngs.params(), tuple(a_axes.values()), jnp.float32, -limit, limit
            )
            b = jnp.zeros(tuple(b_axes.values()), jnp.float32)
            setattr(self, f"{name}_a", nnx.Param(a, axes=tuple(a_axes)))
            setattr(self, f"{name}_b", nnx.Param(b, axes=tuple(b_axes)))


def adapted(
    weight: jax.Array, adapters: Adapters | None, name: str, settings: ModelSettings
) -> Linear:
    """Returns the matrix `name` in the compute dtype, with its adapter if it has one."""
    dtype, lora = settings.compute_dtype, settings.lora
    if lora is None or name not in lora.targets:
        return Linear(weight.astype(dtype))
    a, b = (getattr(adapters, f"{name}_{part}")[...].astype(dtype) for part in "ab")
    return Linear(weight.astype(dtype), a, b, scale=lora.scale)


def dropout(
    x: jax.Array, keys: jax.Array | None, settings: LoraSettings | None, target: str
) -> jax.Array:
    """Sets a share of an adapter's input to zero and scales the rest up.

    Args:
      x: [B, ...], the input of the matrix `target`.
      keys: [B] random keys, one for each row, so that the result depends on neither the mesh nor
        how rows are split over devices; None: no dropout.
      settings: holds the share; None: no adapters, hence no dropout.
      target: one of TARGETS; each draws numbers of its own.

    Returns:
      x's shape and dtype.
    """
    if keys is None or settings is None or settings.dropout == 0.0:
        return x
    rate, site = settings.dropout, TARGETS.index(target)

    def draw(key: jax.Array) -> jax.Array:
        seed = jax.random.bits(jax.random.fold_in(key, site), (), jnp.uint32)
        return _hash(seed, x.shape[1:]) >= jnp.uint32(rate * 2**32)

    return jnp.where(jax.vmap(draw)(keys), x / (1 - rate), 0).astype(x.dtype)


def _hash(seed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns uniform uint32 numbers: MurmurHash3's finaliser of seed and position.

    With jax.random.bits instead, the full-size step took 20 times as long to compile on GPUs: XLA
    inlines the generator wherever a mask is used again.
    """
    position = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
    bits = seed + position * jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return bits ^ (bits >> 16)
