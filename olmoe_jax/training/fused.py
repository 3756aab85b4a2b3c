"""A training step whose backward updates each layer as soon as that layer's gradient is there.

The gradients of one layer exist at a time, not those of the whole model. What that takes: a step is
one micro-batch, no layer's update may wait for another's gradient (no clipping to the global norm),
and the backward recomputes every layer from its input. The backward's loop carries all layers'
weights and moments, which XLA updates in place.

What trains outside of the layers (embedding, final norm, head) is updated when the loop has ended.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from olmoe_jax.model.olmoe import Olmoe, training_context
from olmoe_jax.model.parameters import LAYERS, Parameters, merge
from olmoe_jax.ops.quantization import dequantized
from olmoe_jax.training.step import (
    DeviceBatch,
    StepMetrics,
    Trainer,
    TrainState,
    next_state,
    select,
)


def fused_step(
    trainer: Trainer,
    state: TrainState,
    frozen: Parameters,
    batch: DeviceBatch,
    position: jax.Array,
) -> tuple[TrainState, StepMetrics]:
    """One AdamW update by the gradients of one micro-batch, not clipped.

    When the loss is not finite, nothing is updated. When a layer's gradient is not, neither that
    layer is nor what is updated after it: the layers below, embedding, norm and head. The layers
    above already are; the step counts as skipped all the same.

    Args:
      trainer: of the run.
      state: before the step.
      frozen: the parameters that do not train.
      batch: the whole step's examples.
      position: as for `Trainer.accumulate`.
    """
    in_layers, outside = _split(state.parameters)
    frozen_in_layers, frozen_outside = _split(frozen)
    whole = merge(trainer.graph, state.parameters | frozen)
    layer = _layer_function(whole, trainer, batch, position)

    def model(outside: Parameters) -> Olmoe:
        return merge(trainer.graph, in_layers | frozen_in_layers | outside | frozen_outside)

    def forward(x, inputs):
        y, statistics = layer(*inputs, x)
        return y, (x, statistics)

    def objective(outside, x, statistics):
        own = model(outside)
        return trainer.objective(own, own.normed(x), statistics, batch)

    numbers = jnp.arange(trainer.config.num_layers)
    x, embedding_backward = jax.vjp(lambda outside: model(outside).embedded(batch.tokens), outside)
    x, (layer_inputs, statistics) = jax.lax.scan(forward, x, (numbers, frozen_in_layers, in_layers))
    value, objective_backward, loss = jax.vjp(objective, outside, x, statistics, has_aux=True)
    of_objective, d_x, d_statistics = objective_backward(jnp.ones_like(value))

    learning_rate, key = trainer.schedule(state.step), trainer.update_key(state.step)

    def update(gradients, parameters, moments, key, finite):
        gradients = {name: g.astype(jnp.float32) for name, g in gradients.items()}
        new = trainer.optimizer.update(gradients, moments, parameters, learning_rate, key)
        return select(finite, new, (parameters, moments))

    def backward(carry, inputs):
        d_x, squares, stacked = carry
        number, frozen_layer, layer_input, d_statistics = inputs
        # Read once: a second read while the new weights are written would take a copy of all.
        parameters, moments = _layer_of(stacked, number)
        _, of_layer = jax.vjp(
            lambda own, x: layer(number, frozen_layer, own, x), parameters, layer_input
        )
        gradients, d_x = of_layer((d_x, d_statistics))
        squares += _sum_of_squares(gradients)
        new = update(
            gradients,
            parameters,
            moments,
            jax.random.fold_in(key, number),
            jnp.isfinite(squares),
        )
        return (d_x, squares, _with_layer(stacked, new, number)), None

    moments_in_layers, moments_outside = _split(state.optimizer)
    # Not a number from the start when the loss is none: then no layer is updated.
    carry = (d_x, loss * 0, (in_layers, moments_in_layers))
    (d_x, squares, (in_layers, moments_in_layers)), _ = jax.lax.scan(
        backward,
        carry,
        (numbers, frozen_in_layers, layer_inputs, d_statistics),
        reverse=True,
    )
    gradients = jax.tree.map(jnp.add, of_objective, *embedding_backward(d_x))
    norm = jnp.sqrt(squares + _sum_of_squares(gradients))
    finite = jnp.isfinite(norm)
    outside, moments_outside = update(gradients, outside, moments_outside, key, finite)
    optimizer = _join(moments_in_layers, moments_outside)
    new = next_state(state, in_layers | outside, optimizer, finite)
    metrics = StepMetrics(loss, norm, learning_rate, new.skipped, new.skipped_in_a_row, statistics)
    return new, metrics


def _layer_function(model: Olmoe, trainer: Trainer, batch: DeviceBatch, position: jax.Array):
    """(number, its frozen and its trained weights, x) -> x after the layer, router statistics."""
    graph, _ = nnx.split(model.layers)
    context = training_context(batch.segment_ids, batch.positions, trainer.dropout_key(position))

    def layer(number, frozen, trained, x):
        weights = dequantized(frozen | trained, trainer.settings.compute_dtype)
        weights = {name.removeprefix(LAYERS): value for name, value in weights.items()}
        x, (statistics, _) = merge(graph, weights)(x, context.of_layer(number), None, None, False)
        return x, statistics

    return layer


def _sum_of_squares(gradients: Parameters) -> jax.Array:
    return sum((jnp.sum(jnp.square(g.astype(jnp.float32))) for g in gradients.values()), 0.0)


# A state's leaves are dicts by parameter name and scalars (Adam's count).


def _is_dict(tree: Any) -> bool:
    return isinstance(tree, dict)


def _split(state: Any) -> tuple[Any, Any]:
    """The part of a state that belongs to layers, and the rest; scalars are in both."""

    def part(wanted: bool):
        def of_leaf(leaf):
            if not _is_dict(leaf):
                return leaf
            return {n: v for n, v in leaf.items() if n.startswith(LAYERS) == wanted}

        return jax.tree.map(of_leaf, state, is_leaf=_is_dict)

    return part(True), part(False)


def _join(in_layers: Any, outside: Any) -> Any:
    """The inverse of `_split`; scalars are those of `outside`, which is updated once a step."""
    return jax.tree.map(
        lambda a, b: a | b if _is_dict(a) else b, in_layers, outside, is_leaf=_is_dict
    )


def _layer_of(stacked: Any, number: jax.Array) -> Any:
    def of_leaf(leaf):
        return jax.tree.map(lambda x: x[number], leaf) if _is_dict(leaf) else leaf

    return jax.tree.map(of_leaf, stacked, is_leaf=_is_dict)


def _with_layer(stacked: Any, layer: Any, number: jax.Array) -> Any:
    def of_leaf(all_layers, own):
        if not _is_dict(all_layers):
            return all_layers
        return jax.tree.map(lambda a, b: a.at[number].set(b), all_layers, own)

    return jax.tree.map(of_leaf, stacked, layer, is_leaf=_is_dict)
