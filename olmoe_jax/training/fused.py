"""A training step whose backward updates each layer as soon as that layer's gradient is there.

The gradients of one layer exist at a time, not those of the whole model. What that takes: a step is
one micro-batch, no layer's update may wait for another's gradient (no clipping to the global norm),
and the backward recomputes every layer from its input. The backward's loop carries all layers'
weights and moments, which XLA updates in place.

What trains outside of the layers (embedding, final norm, head) is updated when the loop has ended.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from olmoe_jax.model.decoder import Olmoe
from olmoe_jax.model.parameters import LAYERS, Parameters, merge
from olmoe_jax.ops.quantization import dequantized
from olmoe_jax.training.layered import (
    join_layers,
    layer_of,
    split_layers,
    update_fetched,
    with_layer,
)
from olmoe_jax.training.step import (
    DeviceBatch,
    StepMetrics,
    Trainer,
    TrainState,
    next_state,
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
    in_layers, outside = split_layers(state.parameters)
    frozen_in_layers, frozen_outside = split_layers(frozen)
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

    def update(squares, *of_part):
        return trainer.update_part(state.step, jnp.isfinite(squares), 1.0, *of_part)

    def backward(carry, inputs):
        d_x, squares, stacked = carry
        number, frozen_layer, layer_input, d_statistics = inputs
        parameters, moments = layer_of(stacked, number)
        _, of_layer = jax.vjp(
            lambda own, x: layer(number, frozen_layer, own, x), parameters, layer_input
        )
        gradients, d_x = of_layer((d_x, d_statistics))
        squares += _sum_of_squares(gradients)
        new = update(squares, gradients, parameters, moments, number)
        return (d_x, squares, with_layer(stacked, new, number)), None

    moments_in_layers, moments_outside = split_layers(state.optimizer)
    # Not a number from the start when the loss is none: then no layer is updated.
    carry = (d_x, loss * 0, (in_layers, moments_in_layers))
    (d_x, squares, (in_layers, moments_in_layers)), _ = jax.lax.scan(
        backward,
        carry,
        (numbers, frozen_in_layers, layer_inputs, d_statistics),
        reverse=True,
    )
    gradients = jax.tree.map(jnp.add, of_objective, *embedding_backward(d_x))
    squares += _sum_of_squares(gradients)
    outside = update_fetched(
        functools.partial(update, squares), gradients, (outside, moments_outside)
    )
    parameters, optimizer = join_layers((in_layers, moments_in_layers), outside)
    new = next_state(state, parameters, optimizer, jnp.isfinite(squares))
    metrics = StepMetrics(
        loss,
        jnp.sqrt(squares),
        trainer.schedule(state.step),
        new.skipped,
        new.skipped_in_a_row,
        statistics,
    )
    return new, metrics


def _layer_function(model: Olmoe, trainer: Trainer, batch: DeviceBatch, position: jax.Array):
    """(number, its frozen and its trained weights, x) -> x after the layer, router statistics."""
    graph, _ = nnx.split(model.layers)
    context = model.context(batch.segment_ids, batch.positions, trainer.dropout_key(position))

    def layer(number, frozen, trained, x):
        weights = dequantized(frozen | trained, trainer.settings.compute_dtype)
        weights = {name.removeprefix(LAYERS): value for name, value in weights.items()}
        x, (statistics, _) = merge(graph, weights)(x, context.of_layer(number))
        return x, statistics

    return layer


def _sum_of_squares(gradients: Parameters) -> jax.Array:
    return sum((jnp.sum(jnp.square(g.astype(jnp.float32))) for g in gradients.values()), 0.0)
