"""OLMoE (https://arxiv.org/abs/2409.02060): embedding, scanned decoder layers, norm, head.

Shapes: B rows, S positions, D model width, V vocabulary, L layers.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from olmoe_jax.model.attention import Attention, Context, LayerCache, rms_norm
from olmoe_jax.model.config import ModelConfig, ModelSettings
from olmoe_jax.model.moe import MoE, RouterStatistics
from olmoe_jax.model.parameters import ParameterSpec, matrix, scale, specs
from olmoe_jax.model.selected import LayerSelection, SelectedExperts
from olmoe_jax.ops.embedding import embedding_lookup
from olmoe_jax.ops.quantization import dequantized, is_quantized
from olmoe_jax.ops.remat import keep, rematerialised
from olmoe_jax.ops.router_gradient import ExpertProjections
from olmoe_jax.sharding import BATCH, active_mesh, gathered, shard_batch


class KVCache(NamedTuple):
    """What decoding carries: keys and values of every layer and what lies where."""

    layers: LayerCache  # [L, B, G, T, d] each
    segments: jax.Array  # [B, T] int32, 0: empty or padding
    length: jax.Array  # [] int32: columns filled


class DecoderLayer(nnx.Module):
    """Pre-norm attention and mixture of experts, each with a residual connection.

    Its parameters are those of all L layers, stacked; `Olmoe` scans over them.
    """

    def __init__(self, config: ModelConfig, settings: ModelSettings, *, rngs: nnx.Rngs):
        self.epsilon = config.rms_norm_eps
        norm = {"layer": config.num_layers, "norm": config.hidden_size}
        self.attention_norm = scale(norm)
        self.attention = Attention(config, settings, rngs=rngs)
        self.moe_norm = scale(norm)
        self.moe = MoE(config, settings, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        context: Context,
        cache: LayerCache | None,
        selection: LayerSelection | None,
        with_router_logits: bool,
        experts: ExpertProjections | None = None,
    ):
        with jax.named_scope("attention"):
            normed = rms_norm(x, self.attention_norm[...], self.epsilon)
            y, cache = self.attention(normed, context, cache)
            x = keep(shard_batch(x + y))
        with jax.named_scope("moe"):
            normed, is_token = rms_norm(x, self.moe_norm[...], self.epsilon), context.segments > 0
            if experts is not None:
                y, statistics = self.moe.decode(normed, is_token, experts, context.layer), None
            else:
                y, statistics = self.moe(
                    normed,
                    is_token,
                    context.dropout_keys,
                    selection,
                    with_router_logits,
                    context.router_probe,
                )
        return shard_batch(x + y), (statistics, cache)


class Olmoe(nnx.Module):
    """The language model. `model(tokens)` gives logits.

    Args:
      config: the architecture.
      settings: how to compute (dtype, router gradient, remat).
      rngs: its "params" stream draws the weights.
    """

    def __init__(
        self, config: ModelConfig, settings: ModelSettings | None = None, *, rngs: nnx.Rngs
    ):
        self.config = config
        self.settings = settings = settings or ModelSettings()
        std = config.initializer_range
        vocabulary = {"vocab": config.vocab_size, "embed": config.hidden_size}
        self.embed = matrix(rngs, vocabulary, std)
        self.layers = DecoderLayer(config, settings, rngs=rngs)
        self.norm = scale({"norm": config.hidden_size})
        chosen = settings.selected_experts
        self.selected = SelectedExperts(config, chosen, rngs=rngs) if any(chosen or ()) else None
        if not config.tie_word_embeddings:
            self.lm_head = matrix(rngs, vocabulary, std)

    def __call__(
        self,
        tokens: jax.Array,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Logits [B, S, V] float32.

        Args:
          tokens: [B, S] int.
          segments: [B, S] int, which example each token belongs to, 0 for padding; None: one
            example a row, no padding.
          positions: [B, S] int, restarting with each example; None: 0…S-1.
        """
        return self.logits(self.hidden(tokens, segments, positions)[0])

    def hidden(
        self,
        tokens: jax.Array,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        *,
        with_router_logits: bool = False,
        dropout_key: jax.Array | None = None,
        router_probe: jax.Array | None = None,
    ) -> tuple[jax.Array, RouterStatistics]:
        """Final normalised hidden states [B, S, D] and each layer's router statistics.

        With `dropout_key` (a scalar random key) the adapters' dropout is on. `router_probe`:
        [L, D, E], see `MoE`.
        """
        if segments is None:
            segments = jnp.ones_like(tokens)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        context = training_context(segments, positions, dropout_key)._replace(
            router_probe=router_probe
        )
        x, (statistics, _) = self._run_layers(tokens, context, None, with_router_logits)
        return x, statistics

    def decode(
        self, tokens: jax.Array, segments: jax.Array, positions: jax.Array, cache: KVCache
    ) -> tuple[jax.Array, KVCache]:
        """Logits [B, V] after the last of these tokens [B, S], which are added to the cache.

        Args:
          tokens: [B, S] int.
          segments: [B, S] int, 1, or 0 for padding: in front of a prompt, or a row that has ended.
          positions: [B, S] int, of the tokens in their rows.
          cache: `empty_cache`, or what this function returned before.
        """
        start = (0, cache.length)
        key_segments = jax.lax.dynamic_update_slice(cache.segments, segments, start)
        context = Context(positions, segments, key_segments, cache.length)
        x, (_, layers) = self._run_layers(tokens, context, cache.layers, False)
        cache = KVCache(layers, key_segments, cache.length + tokens.shape[1])
        return self.logits(x[:, -1:])[:, 0], cache

    def empty_cache(self, batch: int, length: int) -> KVCache:
        """A cache with room for `length` tokens in each of `batch` rows."""
        config = self.config
        shape = (config.num_layers, batch, config.num_kv_heads, length, config.head_dim)
        empty = jnp.zeros(shape, self.settings.compute_dtype)
        if active_mesh() is not None:
            empty = jax.lax.with_sharding_constraint(empty, P(None, *BATCH))
        return KVCache(
            LayerCache(empty, empty), jnp.zeros((batch, length), jnp.int32), jnp.int32(0)
        )

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[B, S, D] -> [B, S, V] float32."""
        head = gathered(self.head().astype(hidden.dtype))
        return jnp.einsum("bsd,vd->bsv", hidden, head, preferred_element_type=jnp.float32)

    def head(self) -> jax.Array:
        """The output projection [V, D], as it is stored and sharded."""
        return (self.embed if self.config.tie_word_embeddings else self.lm_head)[...]

    def embedded(self, tokens: jax.Array) -> jax.Array:
        """What goes into the first layer: [B, S] int -> [B, S, D] in the compute dtype."""
        x = embedding_lookup(self.embed[...], tokens, self.settings.compute_dtype)
        if self.config.pad_token_id is not None:
            # torch's padding_idx: that row learns nothing from being looked up.
            is_pad = (tokens == self.config.pad_token_id)[..., None]
            x = jnp.where(is_pad, jax.lax.stop_gradient(x), x)
        return shard_batch(x)

    def normed(self, x: jax.Array) -> jax.Array:
        """The final norm of what comes out of the last layer [B, S, D]."""
        return rms_norm(x, self.norm[...], self.config.rms_norm_eps)

    def _run_layers(self, tokens, context: Context, cache, with_router_logits: bool):
        graph, stacked = nnx.split(self.layers)
        experts = None
        if cache is not None and not is_quantized(stacked):
            experts = self._stacked_experts(tokens)

        def layer(carry, inputs):
            x, cache = carry
            index, weights, router_probe, selection = inputs
            inside = context.of_layer(index)._replace(router_probe=router_probe)
            # Here, so that only one layer's weights ever lie there in full, in the backward too.
            weights = dequantized(weights, self.settings.compute_dtype)
            x, (statistics, cache) = nnx.merge(graph, weights)(
                x, inside, cache, selection, with_router_logits, experts
            )
            return (x, cache), statistics

        selection = None
        if self.selected:
            dtype = self.settings.compute_dtype
            selection = self.selected.by_layer(self.config.num_experts, dtype)
        layers = jnp.arange(self.config.num_layers)
        # In this order: jax mixes up gradients where one for a Ref follows one that is an array.
        inputs = (layers, stacked, context.router_probe, selection)
        (x, cache), statistics = jax.lax.scan(
            rematerialised(layer, self.settings.remat), (self.embedded(tokens), cache), inputs
        )
        outputs = statistics, cache
        return self.normed(x), outputs

    def _stacked_experts(self, tokens: jax.Array) -> ExpertProjections | None:
        """All layers' experts for a decode step that is to read only those in use."""
        batch, length = tokens.shape
        if length > 1 or self.selected or active_mesh() is not None:
            return None
        return self.layers.moe.decoding_experts(batch)


def training_context(
    segments: jax.Array, positions: jax.Array, dropout_key: jax.Array | None
) -> Context:
    """What the layers share, of whole rows [B, S]; with `dropout_key` the dropout is on."""
    keys = None
    if dropout_key is not None:
        keys = shard_batch(jax.random.split(dropout_key, segments.shape[0]))
    return Context(positions, segments, segments, 0, keys)


def load_balancing_loss(statistics: RouterStatistics, config: ModelConfig) -> jax.Array:
    """E * sum_e f_e P_e over the tokens of all layers (Switch Transformers, eq. 4-6).

    f_e: share of the (token, layer) pairs that selected e (these sum to K); P_e: mean probability.
    Padding is in neither. A batch without tokens gives 0.
    """
    pairs = jnp.maximum(jnp.sum(statistics.load) / config.num_experts_per_token, 1.0)
    share = jnp.sum(statistics.load, axis=0) / pairs
    probability = jnp.sum(statistics.probability, axis=0) / pairs
    return config.num_experts * jnp.sum(jax.lax.stop_gradient(share) * probability)


@functools.cache
def parameter_specs(
    config: ModelConfig, settings: ModelSettings | None = None
) -> dict[str, ParameterSpec]:
    """Name -> shape and logical axes of every parameter, adapters included; allocates nothing."""
    return specs(lambda: Olmoe(config, settings, rngs=nnx.Rngs(0)))


def graph_of(config: ModelConfig, settings: ModelSettings) -> nnx.GraphDef:
    """The model's structure, to `merge` with parameters; allocates nothing."""
    return nnx.split(nnx.eval_shape(lambda: Olmoe(config, settings, rngs=nnx.Rngs(0))))[0]
