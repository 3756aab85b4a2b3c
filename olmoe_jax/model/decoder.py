"""OLMoE (https://arxiv.org/abs/2409.02060): embedding, scanned decoder layers, norm, head.

Shapes: B rows, S positions, C columns of the cache, D model width, V vocabulary, L layers.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from olmoe_jax.model import overlap
from olmoe_jax.model.attention import (
    Attention,
    CachePlace,
    Context,
    LayerCache,
    rms_norm,
    rotation,
)
from olmoe_jax.model.config import ModelConfig, ModelSettings
from olmoe_jax.model.moe import AllLayers, MoE
from olmoe_jax.model.parameters import ParameterSpec, norm_scale, specs, weight
from olmoe_jax.model.tuned import LayerTunedExperts, TunedExperts
from olmoe_jax.ops import decoding
from olmoe_jax.ops.embedding import embedding_lookup, embedding_rows
from olmoe_jax.ops.grouped_matmul import reads_in_stack
from olmoe_jax.ops.linear import ExpertWeights, Linear
from olmoe_jax.ops.quantization import dequantized, is_quantized
from olmoe_jax.ops.remat import keep, rematerialised
from olmoe_jax.ops.routing import RouterStatistics
from olmoe_jax.parallel.sharding import active_mesh, gathered, shard_batch


class KVCache(NamedTuple):
    """The state of decoding: keys and values of every layer, and which columns hold tokens."""

    layers: tuple[LayerCache, ...]  # one per layer: each in place, none a slice of a larger array
    visible: jax.Array  # [B, C] bool, False: empty or padding
    length: jax.Array  # [] int32: columns filled


class DecodingLayers(NamedTuple):
    """The layers as a decode step reads them (see `Olmoe.decoding_layers`)."""

    graph: nnx.GraphDef  # of one layer
    experts: ExpertWeights | None  # of all layers, read in place; None: they are in `weights`
    weights: Any  # with `experts`: a state for each layer; without: one state of all, stacked


class DecoderLayer(nnx.Module):
    """Pre-norm attention and mixture of experts, each with a residual connection.

    The parameters are those of all L layers, stacked; `Olmoe` scans over them.
    """

    def __init__(self, config: ModelConfig, settings: ModelSettings, *, rngs: nnx.Rngs):
        self.epsilon = config.rms_norm_eps
        norm = {"layer": config.num_layers, "norm": config.hidden_size}
        self.attention_norm = norm_scale(norm)
        self.attention = Attention(config, settings, rngs=rngs)
        self.moe_norm = norm_scale(norm)
        self.moe = MoE(config, settings, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        context: Context,
        cache: LayerCache | None = None,
        tuned: LayerTunedExperts | None = None,
        with_router_logits: bool = False,
        decode_experts: AllLayers | None = None,
        stacked_experts: AllLayers | None = None,
    ) -> tuple[jax.Array, tuple[RouterStatistics, LayerCache]]:
        """Runs the layer, in training, prefill and decoding.

        Args:
          x: [B, S, D].
          context: the inputs that all layers share.
          cache: the keys and values of earlier positions (then S == 1); None: x holds whole rows.
          tuned: this layer's tuned experts.
          with_router_logits: whether the statistics hold the router's logits.
          decode_experts: see `MoE.__call__`.
          stacked_experts: see `MoE.__call__`.

        Returns:
          [B, S, D]; the router's statistics; the cache with x's keys and values.
        """
        with jax.named_scope("attention"):
            normed = rms_norm(x, self.attention_norm[...], self.epsilon)
            y, cache = self.attention(normed, context, cache)
            x = keep(shard_batch(x + y))
        with jax.named_scope("moe"):
            y, statistics = self.moe(
                rms_norm(x, self.moe_norm[...], self.epsilon),
                context.segments > 0,
                context.dropout_keys,
                tuned,
                with_router_logits,
                decode_experts,
                stacked_experts,
            )
        return shard_batch(x + y), (statistics, cache)


class Olmoe(nnx.Module):
    """The language model. `model(tokens)` returns logits.

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
        self.embed = weight(rngs, vocabulary, std)
        self.layers = DecoderLayer(config, settings, rngs=rngs)
        self.norm = norm_scale({"norm": config.hidden_size})
        tuned = settings.tuned_experts
        self.tuned = TunedExperts(config, tuned, rngs=rngs) if tuned and any(tuned) else None
        if not config.tie_word_embeddings:
            self.lm_head = weight(rngs, vocabulary, std)

    def __call__(
        self,
        tokens: jax.Array,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Returns logits [B, S, V] float32.

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
        sums: Mapping[str, Any] | None = None,
    ) -> tuple[jax.Array, RouterStatistics]:
        """Returns the final normalised hidden states [B, S, D] and each layer's router statistics.

        Args:
          tokens: [B, S] int.
          segments: see `__call__`.
          positions: see `__call__`.
          with_router_logits: whether the statistics hold the router's logits.
          dropout_key: a scalar random key that switches the adapters' dropout on; None: off.
          sums: the refs to which a step adds the gradients of what trains, by name. With them a
            model whose weights are sharded runs as in `olmoe_jax.model.overlap`.
        """
        if segments is None:
            segments = jnp.ones_like(tokens)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        if sums is not None and overlap.serves(active_mesh(), self.settings.remat):
            x, statistics = overlap.run_module(
                self.layers,
                self._tuned_by_layer(),
                {n: spec.axes for n, spec in parameter_specs(self.config, self.settings).items()},
                self.settings,
                self.embedded(tokens),
                self._context(segments, positions, dropout_key),
                sums,
            )
            return self.normed(x), statistics
        return self._run_layers(
            tokens, segments, positions, dropout_key, with_router_logits, sums=sums
        )[:2]

    def prefill(
        self, tokens: jax.Array, segments: jax.Array, positions: jax.Array, room: int
    ) -> tuple[jax.Array, KVCache]:
        """Runs the prompts and fills a cache with room for `room` more tokens.

        Args:
          tokens: [B, S] int.
          segments: [B, S] int, 1, or 0 for padding in front.
          positions: [B, S] int, of the tokens in their rows.
          room: columns of the cache beyond the prompts'.

        Returns:
          Logits [B, V] float32 after each row's last token, and the cache, C = S + room.
        """
        x, _, cache = self._run_layers(tokens, segments, positions, with_cache=True)

        def with_room(stacked: jax.Array, layer: int) -> jax.Array:
            return shard_batch(jnp.pad(stacked[layer], ((0, 0), (0, 0), (0, room), (0, 0))))

        layers = tuple(
            LayerCache(with_room(cache.keys, layer), with_room(cache.values, layer))
            for layer in range(self.config.num_layers)
        )
        visible = jnp.pad(segments > 0, ((0, 0), (0, room)))
        return self.logits(x[:, -1:])[:, 0], KVCache(layers, visible, jnp.int32(tokens.shape[1]))

    def decoding_layers(self, batch: int) -> DecodingLayers:
        """Prepares the layers for decode steps of `batch` rows; call it outside the token loop.

        If a step reads the experts in place, they stay in the arrays of all layers, and the rest
        is copied out of these arrays once.
        """
        config, (graph, stacked) = self.config, nnx.split(self.layers)
        in_place = decoding.reads_in_place(
            batch, config.num_experts_per_token, config.num_experts
        ) and not is_quantized(stacked)
        if not in_place:
            return DecodingLayers(graph, None, stacked)
        weights = [_layer_of(stacked, layer) for layer in range(config.num_layers)]
        return DecodingLayers(graph, self.layers.moe.experts.weights(self.settings), weights)

    def decode(
        self,
        layers: DecodingLayers,
        tokens: jax.Array,
        is_token: jax.Array,
        positions: jax.Array,
        cache: KVCache,
    ) -> tuple[jax.Array, KVCache]:
        """Runs one more token a row.

        The layers follow each other in the program: a scan would copy each layer's weights and keys
        out of the arrays that it scans over.

        Args:
          layers: `decoding_layers`.
          tokens: [B] int.
          is_token: [B] bool; False: the row has ended.
          positions: [B] int, of the tokens in their rows.
          cache: what `prefill` or this function returned.

        Returns:
          Logits [B, V] float32, and the cache with these tokens.
        """
        is_token, length = is_token[:, None], cache.length
        visible = jax.lax.dynamic_update_slice(cache.visible, is_token, (0, length))
        turned = rotation(positions[:, None], self.config)
        context = Context(turned, is_token.astype(jnp.int32), CachePlace(length, visible))
        x = embedding_rows(gathered(self.embed[...]), tokens[:, None])
        x, new = shard_batch(x.astype(self.settings.compute_dtype)), []
        for number, old in enumerate(cache.layers):
            if layers.experts is not None:
                weights = layers.weights[number]
                experts = AllLayers(layers.experts, number)
            else:
                # The barrier hides the index from XLA until the loop over tokens runs. Otherwise
                # XLA takes all layers' experts out of their arrays before, and holds them twice.
                index, _ = jax.lax.optimization_barrier((jnp.int32(number), length))
                weights = _layer_of(layers.weights, index)
                weights, experts = dequantized(weights, self.settings.compute_dtype), None
            layer = nnx.merge(layers.graph, weights)
            x, (_, written) = layer(x, context, old, decode_experts=experts)
            new.append(written)
        x, head = self.normed(x)[:, 0], gathered(self.head().astype(x.dtype))
        return decoding.head_matmul(x, head), KVCache(tuple(new), visible, length + 1)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Applies the head: [B, S, D] -> [B, S, V] float32."""
        head = gathered(self.head().astype(hidden.dtype))
        return jnp.einsum("bsd,vd->bsv", hidden, head, preferred_element_type=jnp.float32)

    def head(self) -> jax.Array:
        """Returns the output projection [V, D], as it is stored and sharded."""
        return (self.embed if self.config.tie_word_embeddings else self.lm_head)[...]

    def embedded(self, tokens: jax.Array) -> jax.Array:
        """Looks the tokens up: [B, S] int -> [B, S, D] in the compute dtype."""
        x = embedding_lookup(self.embed[...], tokens, self.settings.compute_dtype)
        if self.config.pad_token_id is not None:
            # torch's padding_idx: that row learns nothing from being looked up.
            is_pad = (tokens == self.config.pad_token_id)[..., None]
            x = jnp.where(is_pad, jax.lax.stop_gradient(x), x)
        return shard_batch(x)

    def normed(self, x: jax.Array) -> jax.Array:
        """Applies the final norm to the last layer's output [B, S, D]."""
        return rms_norm(x, self.norm[...], self.config.rms_norm_eps)

    def _run_layers(
        self,
        tokens: jax.Array,
        segments: jax.Array,
        positions: jax.Array,
        dropout_key: jax.Array | None = None,
        with_router_logits: bool = False,
        *,
        with_cache: bool = False,
        sums: Mapping[str, Any] | None = None,
    ) -> tuple[jax.Array, RouterStatistics, Any]:
        """Scans the layers; returns normed hidden states, statistics [L, …] and keys and values.

        The last is a stacked `LayerCache` [L, …], or None without `with_cache`.
        """
        context = self._context(segments, positions, dropout_key)
        graph, stacked = nnx.split(self.layers)
        experts = self._stacked_experts(stacked, sums or {})
        x = self.embedded(tokens)
        if experts:
            # A matrix whose gradient goes to the sums gets none here, not even zeros.
            held: Any = stacked["moe"]["experts"]
            for name, map_ in experts._asdict().items():
                if map_.sums is not None:
                    x = _dependent(x, held[name][...])
                    held[name] = held[name].replace(jax.lax.stop_gradient(map_.weight))

        def layer(x: jax.Array, inputs: tuple) -> tuple[jax.Array, tuple]:
            index, weights, tuned = inputs
            # Inside the scan, so that only one layer's weights are ever dequantized at a time, in
            # the backward too.
            weights = dequantized(weights, self.settings.compute_dtype)
            whole = AllLayers(experts, index) if experts else None
            x, (statistics, cache) = nnx.merge(graph, weights)(
                x, context.of_layer(index), None, tuned, with_router_logits, stacked_experts=whole
            )
            return x, (statistics, cache if with_cache else None)

        # The tuned experts, whose gradients are arrays, come after the stacked weights, whose
        # gradients go to Refs: in the other order jax 0.10 mixes the two kinds up.
        inputs = (jnp.arange(self.config.num_layers), stacked, self._tuned_by_layer())
        x, (statistics, cache) = jax.lax.scan(rematerialised(layer, self.settings.remat), x, inputs)
        return self.normed(x), statistics, cache

    def _context(
        self, segments: jax.Array, positions: jax.Array, dropout_key: jax.Array | None
    ) -> Context:
        """Returns the inputs that all layers share."""
        keys = None
        if dropout_key is not None:
            # A key for each row: no mesh changes what is dropped.
            keys = shard_batch(jax.random.split(dropout_key, segments.shape[0]))
        return Context(rotation(positions, self.config), segments, dropout_keys=keys)

    def _stacked_experts(self, stacked: nnx.State, sums: Mapping[str, Any]) -> ExpertWeights | None:
        """Returns the experts of all layers, with their sums, where loops over experts read them.

        XLA would copy a layer's experts out of the stacks before such a loop.
        """
        settings, experts = self.settings, self.layers.moe.experts
        in_stack = reads_in_stack(settings.grouped_matmul)
        # A mesh gathers a layer's weights, and quantized ones become numbers a layer at a time.
        if active_mesh() or is_quantized(stacked):
            return None
        if not (in_stack or settings.dense_router_gradient):
            return None

        def of_all_layers(name: str) -> Linear:
            matrices = jax.lax.stop_gradient(getattr(experts, name)[...])
            own_sums = sums.get(f"layers.moe.experts.{name}") if in_stack else None
            return Linear(matrices, sums=own_sums)

        return ExpertWeights(*map(of_all_layers, ExpertWeights._fields))

    def _tuned_by_layer(self) -> LayerTunedExperts | None:
        """Returns the tuned experts of all layers, stacked."""
        if not self.tuned:
            return None
        return self.tuned.by_layer(self.config.num_experts, self.settings.compute_dtype)


@jax.custom_vjp
def _dependent(x: jax.Array, matrices: jax.Array) -> jax.Array:
    """Returns x, which depends on the matrices in jax's eyes; their gradient is zero.

    Without it no backward would run, and add to the matrices' sums, where nothing else trains.
    """
    return x


_dependent.defvjp(lambda x, matrices: (x, None), lambda _, g: (g, None))


def _layer_of(stacked: Any, layer: jax.Array | int) -> Any:
    """Takes one layer's part out of arrays that are stacked over the layers."""
    return jax.tree.map(lambda values: values[layer], stacked)


@functools.cache
def parameter_specs(
    config: ModelConfig, settings: ModelSettings | None = None
) -> dict[str, ParameterSpec]:
    """Returns name -> shape and logical axes of every parameter, adapters included."""
    return specs(lambda: Olmoe(config, settings, rngs=nnx.Rngs(0)))


def graph_of(config: ModelConfig, settings: ModelSettings) -> nnx.GraphDef:
    """Returns the model's structure, to `merge` with parameters; allocates nothing."""
    return nnx.split(nnx.eval_shape(lambda: Olmoe(config, settings, rngs=nnx.Rngs(0))))[0]
