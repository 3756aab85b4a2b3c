"""OLMoE (https://arxiv.org/abs/2409.02060): embedding, scanned decoder layers, norm, head.

Shapes: B rows, S positions, D model width, V vocabulary, L layers.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from olmoe_jax.model.attention import Attention, Context, LayerCache, rms_norm, rotation
from olmoe_jax.model.config import ModelConfig, ModelSettings
from olmoe_jax.model.moe import MoE, RouterStatistics
from olmoe_jax.model.parameters import ParameterSpec, matrix, scale, specs
from olmoe_jax.model.tuned import LayerTunedExperts, TunedExperts
from olmoe_jax.ops.decoding import transposed_matmul_in_parts
from olmoe_jax.ops.embedding import embedding_lookup, embedding_rows
from olmoe_jax.ops.quantization import dequantized, is_quantized
from olmoe_jax.ops.remat import keep, rematerialised
from olmoe_jax.ops.router_gradient import ExpertProjections
from olmoe_jax.parallel.sharding import gathered, shard_batch


class KVCache(NamedTuple):
    """What decoding carries: keys and values of every layer and what lies where."""

    layers: tuple[LayerCache, ...]  # one per layer: each in place, none a slice of a larger array
    visible: jax.Array  # [B, T] bool, False: empty or padding
    length: jax.Array  # [] int32: columns filled


class DecodingLayers(NamedTuple):
    """The layers as a decode step takes them."""

    graph: nnx.GraphDef  # of one
    experts: ExpertProjections | None  # of all layers, for `MoE.decode`; None: among the weights
    weights: Any  # with experts: a state for each layer; without: one state of all, stacked
    tuned: LayerTunedExperts | None  # of all layers, stacked


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
        tuned: LayerTunedExperts | None = None,
        with_router_logits: bool = False,
    ) -> tuple[jax.Array, tuple[RouterStatistics, LayerCache]]:
        """x [B, S, D] -> the same after this layer; router statistics; its keys and values."""
        x, keys = self._attend(x, context, None)
        with jax.named_scope("moe"):
            y, statistics = self.moe(
                rms_norm(x, self.moe_norm[...], self.epsilon),
                context.segments > 0,
                context.dropout_keys,
                tuned,
                with_router_logits,
            )
        return shard_batch(x + y), (statistics, keys)

    def decode(
        self,
        x: jax.Array,
        context: Context,
        cache: LayerCache,
        tuned: LayerTunedExperts | None,
        experts: tuple[ExpertProjections, int] | None,
    ) -> tuple[jax.Array, LayerCache]:
        """x [B, 1, D] -> the same after this layer, and its cache with this position.

        `experts`: those of all layers and this one's number, where `MoE.decode` is to run.
        """
        x, cache = self._attend(x, context, cache)
        with jax.named_scope("moe"):
            normed, is_token = rms_norm(x, self.moe_norm[...], self.epsilon), context.segments > 0
            if experts is None:
                y, _ = self.moe(normed, is_token, tuned=tuned)
            else:
                y = self.moe.decode(normed, is_token, *experts)
        return shard_batch(x + y), cache

    def _attend(self, x, context, cache):
        with jax.named_scope("attention"):
            normed = rms_norm(x, self.attention_norm[...], self.epsilon)
            y, cache = self.attention(normed, context, cache)
            return keep(shard_batch(x + y)), cache


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
        chosen = settings.tuned_experts
        self.tuned = TunedExperts(config, chosen, rngs=rngs) if any(chosen or ()) else None
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
    ) -> tuple[jax.Array, RouterStatistics]:
        """Final normalised hidden states [B, S, D] and each layer's router statistics.

        With `dropout_key` (a scalar random key) the adapters' dropout is on.
        """
        if segments is None:
            segments = jnp.ones_like(tokens)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        context = self.context(segments, positions, dropout_key)
        return self._run_layers(tokens, context, with_router_logits)[:2]

    def context(
        self,
        segments: jax.Array,
        positions: jax.Array,
        dropout_key: jax.Array | None = None,
    ) -> Context:
        """What the layers share, of whole rows [B, S]; see `hidden`."""
        keys = None
        if dropout_key is not None:
            keys = shard_batch(jax.random.split(dropout_key, segments.shape[0]))
        return Context(
            rotation(positions, self.config),
            segments,
            dropout_keys=keys,
        )

    def prefill(
        self, tokens: jax.Array, segments: jax.Array, positions: jax.Array, room: int
    ) -> tuple[jax.Array, KVCache]:
        """Logits [B, V] after the last of these tokens, and a cache with room for `room` more.

        Args:
          tokens: [B, S] int.
          segments: [B, S] int, 1, or 0 for padding in front.
          positions: [B, S] int, of the tokens in their rows.
        """
        context = self.context(segments, positions)
        x, _, keys = self._run_layers(tokens, context, with_keys=True)

        def with_room(stacked, layer):
            return shard_batch(jnp.pad(stacked[layer], ((0, 0), (0, 0), (0, room), (0, 0))))

        layers = tuple(
            LayerCache(*(with_room(part, layer) for part in keys))
            for layer in range(self.config.num_layers)
        )
        visible = jnp.pad(segments > 0, ((0, 0), (0, room)))
        return self.logits(x[:, -1:])[:, 0], KVCache(layers, visible, jnp.int32(tokens.shape[1]))

    def decoding_layers(self, batch: int) -> DecodingLayers:
        """The layers as `decode` takes them for `batch` rows; call it outside the loop over tokens.

        Where `MoE.decode` runs, the experts stay in the arrays of all layers, and the rest is
        copied out of them, once.
        """
        graph, stacked = nnx.split(self.layers)
        experts = None
        if not (self.tuned or is_quantized(stacked)):
            experts = self.layers.moe.decoding_experts(batch)
        if experts is None:
            return DecodingLayers(graph, None, stacked, self._tuned_by_layer())
        weights = [_one_of(stacked, layer) for layer in range(self.config.num_layers)]
        return DecodingLayers(graph, experts, weights, None)

    def decode(
        self,
        layers: DecodingLayers,
        tokens: jax.Array,
        is_token: jax.Array,
        positions: jax.Array,
        cache: KVCache,
    ) -> tuple[jax.Array, KVCache]:
        """Logits [B, V] after one more token a row, and the cache with it.

        The layers follow each other in the program: a scan would copy each layer's weights and keys
        out of the arrays that it scans over.

        Args:
          layers: `decoding_layers`.
          tokens: [B] int.
          is_token: [B] bool; False: the row has ended.
          positions: [B] int, of the tokens in their rows.
          cache: what `prefill` or this function returned.
        """
        is_token, length = is_token[:, None], cache.length
        visible = jax.lax.dynamic_update_slice(cache.visible, is_token, (0, length))
        turned = rotation(positions[:, None], self.config)
        context = Context(turned, is_token.astype(jnp.int32), visible, length)
        x = embedding_rows(gathered(self.embed[...]), tokens[:, None])
        x, new = shard_batch(x.astype(self.settings.compute_dtype)), []
        for number, old in enumerate(cache.layers):
            if layers.experts is not None:
                weights, tuned = layers.weights[number], None
                experts = layers.experts, number
            else:
                # An index that XLA does not know before the loop over tokens: else it would take
                # the experts of all layers out of their arrays there, and hold them twice.
                index, _ = jax.lax.optimization_barrier((jnp.int32(number), length))
                weights, tuned = _one_of((layers.weights, layers.tuned), index)
                weights, experts = dequantized(weights, self.settings.compute_dtype), None
            layer = nnx.merge(layers.graph, weights)
            x, written = layer.decode(x, context, old, tuned, experts)
            new.append(written)
        x, head = self.normed(x)[:, 0], gathered(self.head().astype(x.dtype))
        if jax.default_backend() == "cpu":
            logits = transposed_matmul_in_parts(x, head)
        else:
            logits = self.logits(x[:, None])[:, 0]
        return logits, KVCache(tuple(new), visible, length + 1)

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

    def _run_layers(
        self, tokens, context: Context, with_router_logits: bool = False, with_keys: bool = False
    ):
        graph, stacked = nnx.split(self.layers)

        def layer(x, inputs):
            index, weights, tuned = inputs
            inside = context.of_layer(index)
            # Here, so that only one layer's weights ever lie there in full, in the backward too.
            weights = dequantized(weights, self.settings.compute_dtype)
            x, (statistics, keys) = nnx.merge(graph, weights)(x, inside, tuned, with_router_logits)
            return x, (statistics, keys if with_keys else None)

        layers = jnp.arange(self.config.num_layers)
        # In this order: jax mixes up gradients where one for a Ref follows one that is an array.
        inputs = (layers, stacked, self._tuned_by_layer())
        x, (statistics, keys) = jax.lax.scan(
            rematerialised(layer, self.settings.remat), self.embedded(tokens), inputs
        )
        return self.normed(x), statistics, keys

    def _tuned_by_layer(self) -> LayerTunedExperts | None:
        """Of all layers."""
        if not self.tuned:
            return None
        return self.tuned.by_layer(self.config.num_experts, self.settings.compute_dtype)


def _one_of(stacked: Any, layer: jax.Array | int) -> Any:
    """A layer's part of what is stacked for all."""
    return jax.tree.map(lambda values: values[layer], stacked)


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
