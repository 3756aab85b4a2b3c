"""OLMoE's attention: projections, whole-width q/k norms, clip, rotary embedding, softmax.

Shapes: B rows, S positions, D model width, H heads, G key/value heads, d head size.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from olmoe_jax.model.config import ModelConfig, ModelSettings
from olmoe_jax.model.lora import Adapters, adapted, dropout
from olmoe_jax.model.parameters import norm_scale, weight
from olmoe_jax.ops import decoding
from olmoe_jax.ops.attention import attention, cached_attention
from olmoe_jax.ops.linear import linear
from olmoe_jax.ops.remat import keep
from olmoe_jax.parallel.sharding import gathered, on_own_rows


class Rotation(NamedTuple):
    """The rotary embedding's angles, both [B, S, 1, d/2] float32."""

    cos: jax.Array
    sin: jax.Array


class CachePlace(NamedTuple):
    """A decoded token's place in the cache."""

    column: jax.Array  # [] int32: where the token's keys and values go
    visible: jax.Array  # [B, C] bool: the columns that the token attends to


class Context(NamedTuple):
    """The inputs that all layers share, for whole rows [B, S] or one decoded token [B, 1]."""

    rotation: Rotation
    segments: jax.Array  # [B, S] int32: each token's example in its row, 0 is padding
    place: CachePlace | None = None  # where a decoded token stands; None: whole rows
    dropout_keys: jax.Array | None = None  # [B] random keys; None: no dropout

    def of_layer(self, layer: jax.Array) -> "Context":
        """Returns the context with the dropout keys of one layer."""
        if self.dropout_keys is None:
            return self
        keys = jax.vmap(jax.random.fold_in, (0, None))(self.dropout_keys, layer)
        return self._replace(dropout_keys=keys)


class LayerCache(NamedTuple):
    """A layer's keys and values, both [B, G, C, d] for C columns."""

    keys: jax.Array
    values: jax.Array


def rms_norm(x: jax.Array, weight: jax.Array, epsilon: float) -> jax.Array:
    """Returns x / rms(x) * weight over the last dimension, computed in float32, in x's dtype."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + epsilon)
    return weight.astype(x.dtype) * x32.astype(x.dtype)


def rotation(positions: jax.Array, config: ModelConfig) -> Rotation:
    """Returns cos and sin of the angles position * theta^(-2i/d), for positions [B, S]."""
    half = config.head_dim // 2
    frequencies = 1.0 / config.rope_theta ** (jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotary(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotates the pairs (i, i + d/2) of x [B, S, H, d], in float32; returns x's dtype."""
    cos, sin = rotation
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention; q and k are normalised over their whole width before the split."""

    def __init__(self, config: ModelConfig, settings: ModelSettings, *, rngs: nnx.Rngs):
        self.config = config
        self.settings = settings
        layers, std = {"layer": config.num_layers}, config.initializer_range
        width = {"embed": config.hidden_size}
        heads = config.num_heads * config.head_dim
        kv_heads = config.num_kv_heads * config.head_dim
        matrices = {
            "q": {**layers, **width, "heads": heads},
            "k": {**layers, **width, "kv_heads": kv_heads},
            "v": {**layers, **width, "kv_heads": kv_heads},
            "o": {**layers, "heads": heads, **width},
        }
        for name, axes in matrices.items():
            setattr(self, name, weight(rngs, axes, std))
        self.lora = Adapters(settings.lora, matrices, rngs) if settings.lora else None
        self.q_norm = norm_scale({**layers, "norm": heads})
        self.k_norm = norm_scale({**layers, "norm": kv_heads})

    def __call__(
        self, x: jax.Array, context: Context, cache: LayerCache | None = None
    ) -> tuple[jax.Array, LayerCache]:
        """Attends to earlier positions of the same example.

        With a cache (S == 1), writes this position's keys and values into it and attends to the
        cache.

        Args:
          x: [B, S, D].
          context: the rotation, and what each position may see.
          cache: the keys and values of earlier positions; None: x holds whole rows.

        Returns:
          [B, S, D], and the updated cache or, without one, the keys and values of x's positions.
        """
        config = self.config
        epsilon, shape = config.rms_norm_eps, (*x.shape[:2], -1, config.head_dim)
        # The norms span all heads together; the clip comes after them, as in transformers.
        q = rms_norm(self._linear(x, "q", context), self.q_norm[...], epsilon)
        k = rms_norm(self._linear(x, "k", context), self.k_norm[...], epsilon)
        v = self._linear(x, "v", context)
        if config.clip_qkv is not None:
            q, k, v = (jnp.clip(part, -config.clip_qkv, config.clip_qkv) for part in (q, k, v))
        q, k, v = (part.reshape(shape) for part in (q, k, v))  # [B, S, H or G, d]
        q, k = rotary(q, context.rotation), rotary(k, context.rotation)
        new = LayerCache(jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2))  # [B, G, S, d]
        if cache is None or context.place is None:
            attend = functools.partial(attention, backend=self.settings.attention)
            y = on_own_rows(attend, q, k, v, context.segments)
        else:
            new = LayerCache(
                *(
                    jax.lax.dynamic_update_slice_in_dim(old, part, context.place.column, axis=2)
                    for old, part in zip(cache, new, strict=True)
                )
            )
            y = cached_attention(q, *new, context.place.visible)
        return self._linear(y.reshape(*x.shape[:2], -1), "o", context), new

    def _linear(self, x: jax.Array, name: str, context: Context) -> jax.Array:
        """Applies the matrix `name` with its adapter."""
        map_ = adapted(getattr(self, name)[...], self.lora, name, self.settings)
        map_ = jax.tree.map(gathered, map_)
        if context.place is not None:
            return linear(x, map_, x, decoding.matmul)
        dropped = x
        if map_.a is not None:
            dropped = dropout(x, context.dropout_keys, self.settings.lora, name)
        return keep(linear(x, map_, dropped))
