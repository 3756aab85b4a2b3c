"""OLMoE's attention: projections, whole-width q/k norms, clip, rotary embedding, softmax.

Shapes: B rows, S positions, D model width, H heads, G key/value heads, d head size.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from olmoe_jax.model.config import ModelConfig, ModelSettings
from olmoe_jax.model.lora import TARGETS, Adapters, dropout, projection
from olmoe_jax.model.parameters import matrix, scale
from olmoe_jax.ops.attention import attention
from olmoe_jax.ops.attention.cached import cached_attention
from olmoe_jax.ops.decoding import matmul_by_rows
from olmoe_jax.ops.projection import project
from olmoe_jax.ops.remat import keep
from olmoe_jax.parallel.sharding import gathered, on_own_rows


class Rotation(NamedTuple):
    """Of the rotary embedding, both [B, S, 1, d/2] float32."""

    cos: jax.Array
    sin: jax.Array


class Context(NamedTuple):
    """What every layer's attention shares."""

    rotation: Rotation
    segments: jax.Array  # [B, S] int32, 0 is padding
    visible: jax.Array | None = None  # [B, T] bool: which keys of the cache are seen
    index: jax.Array | None = None  # [] int32: where in the cache this token's keys lie
    dropout_keys: jax.Array | None = None  # [B] random keys; None: no dropout

    def of_layer(self, layer: jax.Array) -> "Context":
        """What this layer sees: dropout keys of its own."""
        if self.dropout_keys is None:
            return self
        keys = jax.vmap(jax.random.fold_in, (0, None))(self.dropout_keys, layer)
        return self._replace(dropout_keys=keys)


class LayerCache(NamedTuple):
    """A layer's keys and values, both [B, G, T, d]."""

    keys: jax.Array
    values: jax.Array


def rms_norm(x: jax.Array, weight: jax.Array, epsilon: float) -> jax.Array:
    """x / rms(x) * weight over the last dimension, computed in float32, in x's dtype."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + epsilon)
    return weight.astype(x.dtype) * x32.astype(x.dtype)


def rotation(positions: jax.Array, config: ModelConfig) -> Rotation:
    """By the angles position * theta^(-2i/d), of positions [B, S]."""
    half = config.head_dim // 2
    frequencies = 1.0 / config.rope_theta ** (jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotary(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotates the pairs (i, i + d/2) of x [B, S, H, d], in float32."""
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
            setattr(self, name, matrix(rngs, axes, std))
        self.lora = Adapters(settings.lora, matrices, rngs) if settings.lora else None
        self.q_norm = scale({**layers, "norm": heads})
        self.k_norm = scale({**layers, "norm": kv_heads})

    def __call__(
        self, x: jax.Array, context: Context, cache: LayerCache | None = None
    ) -> tuple[jax.Array, LayerCache]:
        """x [B, S, D] -> [B, S, D] and the keys and values of these S positions.

        With a cache S is 1, attention is to the cache with this position's in it, and it is that
        cache that comes back.
        """
        config = self.config
        epsilon = config.rms_norm_eps
        q = rms_norm(self._project(x, "q", context), self.q_norm[...], epsilon)
        k = rms_norm(self._project(x, "k", context), self.k_norm[...], epsilon)
        v = self._project(x, "v", context)
        if config.clip_qkv is not None:
            q, k, v = (jnp.clip(part, -config.clip_qkv, config.clip_qkv) for part in (q, k, v))
        q, k, v = (part.reshape(*x.shape[:2], -1, config.head_dim) for part in (q, k, v))
        q, k = rotary(q, context.rotation), rotary(k, context.rotation)
        new = LayerCache(jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2))
        if cache is not None:
            start = (0, 0, context.index, 0)
            new = jax.tree.map(
                lambda old, part: jax.lax.dynamic_update_slice(old, part, start), cache, new
            )
            y = cached_attention(q, *new, context.visible)
        else:
            backend = self.settings.attention
            y = on_own_rows(
                functools.partial(attention, backend=backend), q, k, v, context.segments
            )
        return self._project(y.reshape(*x.shape[:2], -1), "o", context), new

    def _project(self, x: jax.Array, name: str, context: Context) -> jax.Array:
        settings = self.settings
        whole = projection(
            getattr(self, name)[...], self.lora, name, settings.lora, settings.compute_dtype
        )
        whole = jax.tree.map(gathered, whole)
        if context.index is not None:
            on_cpu = jax.default_backend() == "cpu"
            return project(x, whole, x, matmul_by_rows if on_cpu else jnp.matmul)
        if whole.a is None:
            return keep(project(x, whole, x))
        keys, rate = context.dropout_keys, settings.lora.dropout
        return keep(project(x, whole, dropout(x, keys, rate, TARGETS.index(name))))
