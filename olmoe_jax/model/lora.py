"""LoRA adapters beside frozen weights, and their dropout. Initialised as PEFT does.

Shapes: B rows, S positions, D in, F out, R rank.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from olmoe_jax.ops.projection import Projection

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


def is_target(name: str) -> bool:
    """Whether a parameter of the base is a matrix that can have an adapter."""
    return name.startswith("layers.") and name.rpartition(".")[2] in TARGETS


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """Which matrices have an adapter, and its size.

    Attributes:
      rank: R.
      alpha: the adapter's product counts alpha / R times (alpha / sqrt(R) with `rslora`).
      dropout: share of the adapters' inputs that is set to zero in training.
      targets: some of TARGETS.
      rslora: rank-stabilised scaling (https://arxiv.org/abs/2312.03732).
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS
    rslora: bool = False

    @classmethod
    def of_method(cls, method: Mapping[str, Any]) -> "LoraSettings | None":
        """The adapters that a run's `method` section (its fields as a mapping) asks for."""
        if method.get("lora_rank") is None:
            return None
        return cls(
            method["lora_rank"],
            method["lora_alpha"],
            method["lora_dropout"],
            tuple(target for target in TARGETS if target in method["lora_targets"].split(",")),
            method.get("lora_rslora", False),  # runs of earlier versions have it
        )

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class Adapters(nnx.Module):
    """A and B of each adapted matrix of a module, as parameters NAME_a and NAME_b."""

    def __init__(self, settings: LoraSettings, matrices: dict[str, dict[str, int]], rngs: nnx.Rngs):
        """`matrices`: name -> the weight's logical axes and sizes, the last two being in, out."""
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


def projection(
    weight: jax.Array, adapters: Adapters | None, name: str, settings: LoraSettings | None, dtype
) -> Projection:
    """The named matrix with its adapter, where it has one."""
    if settings is None or name not in settings.targets:
        return Projection(weight.astype(dtype))
    a, b = (getattr(adapters, f"{name}_{part}")[...].astype(dtype) for part in "ab")
    return Projection(weight.astype(dtype), a, b, scale=settings.scale)


def dropout(x: jax.Array, keys: jax.Array | None, rate: float, site: int) -> jax.Array:
    """Sets a share `rate` of x [B, ...] to zero and scales the rest up; None for keys: x itself.

    `keys` [B] has a random key for each row, so that the result depends on neither the mesh nor
    how rows are split over devices; `site` tells apart the places of a layer.
    """
    if keys is None or rate == 0.0:
        return x

    def draw(key):
        seed = jax.random.bits(jax.random.fold_in(key, site), (), jnp.uint32)
        return _hash(seed, x.shape[1:]) >= jnp.uint32(rate * 2**32)

    return jnp.where(jax.vmap(draw)(keys), x / (1 - rate), 0).astype(x.dtype)


def _hash(seed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform uint32 numbers of this shape: MurmurHash3's finaliser of seed and position.

    jax.random.bits in its place made the full-size step compile 20 times as long on GPUs: it is
    inlined wherever a mask is used again.
    """
    position = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
    bits = seed + position * jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return bits ^ (bits >> 16)
