"""Routing: which experts a token goes to, and moving tokens there (dispatch) and back (combine).

Shapes: T tokens, D model width, E experts, K experts per token.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from olmoe_jax.ops.remat import keep


class Routing(NamedTuple):
    """The router's decision for T tokens."""

    logits: jax.Array  # [T, E] float32
    probabilities: jax.Array  # [T, E] float32, softmax over all E experts
    weights: jax.Array  # [T, K] float32, of the chosen experts
    chosen: jax.Array  # [T, K] int32 in 0…E, the most probable first; E: padding goes nowhere


class RouterStatistics(NamedTuple):
    """Sums over the real (unpadded) tokens of a batch; stacked [L, …] for a whole model."""

    load: jax.Array  # [E] float32: tokens that chose the expert
    probability: jax.Array  # [E] float32: sum of the router's probabilities
    entropy: jax.Array  # [] float32: sum of the entropies (nats) of the probabilities
    logits: jax.Array | None  # [B, S, E] float32, only on request


def router_statistics(routing: Routing, is_token: jax.Array) -> RouterStatistics:
    """Returns the statistics of T tokens, without the logits. is_token: [T] bool."""
    num_experts = routing.logits.shape[1]
    load = jnp.bincount(routing.chosen.reshape(-1), length=num_experts + 1)[:-1]
    information = jax.nn.log_softmax(routing.logits) * routing.probabilities
    return RouterStatistics(
        load=load.astype(jnp.float32),
        probability=jnp.sum(routing.probabilities * is_token[:, None], axis=0),
        entropy=-jnp.sum(information * is_token[:, None]),
        logits=None,
    )


def load_balancing_loss(
    statistics: RouterStatistics, experts_per_token: int, load: jax.Array | None = None
) -> jax.Array:
    """Returns E * sum_e f_e P_e over the tokens of all layers (Switch Transformers, eq. 4-6).

    f_e is the share of the (token, layer) pairs that chose e (these sum to K), P_e the mean
    probability of e. Padding is in neither. A batch without tokens gives 0.

    Args:
      statistics: of a batch, [L, …].
      experts_per_token: K.
      load: [L, E], the tokens of a larger batch that chose each expert. The result is then this
        batch's part of the larger batch's loss: the parts add up. None: the batch's own.
    """
    load = jax.lax.stop_gradient(statistics.load if load is None else load)
    pairs = jnp.maximum(jnp.sum(load) / experts_per_token, 1.0)
    share = jnp.sum(load, axis=0) / pairs
    probability = jnp.sum(statistics.probability, axis=0) / pairs
    return load.shape[1] * jnp.sum(share * probability)


def route(
    x: jax.Array, router: jax.Array, is_token: jax.Array, experts_per_token: int, normalize: bool
) -> Routing:
    """Chooses every token's K most probable experts.

    Args:
      x: [T, D] in any float dtype; the router computes in float32.
      router: [D, E] float32.
      is_token: [T] bool; False: padding, which goes to no expert.
      experts_per_token: K.
      normalize: whether the K weights are divided by their sum (`norm_topk_prob`).
    """
    logits = keep(jnp.dot(x.astype(jnp.float32), router, precision=jax.lax.Precision.HIGHEST))
    probabilities = jax.nn.softmax(logits, axis=-1)
    weights, chosen = jax.lax.top_k(probabilities, experts_per_token)
    if normalize:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    chosen = jnp.where(is_token[:, None], chosen, router.shape[1])
    return Routing(logits, probabilities, weights, chosen)


def sort_by_expert(experts: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sorts the T*K assignments by expert; assignments to expert E ("none") come last.

    Args:
      experts: [T, K] int32 in 0…E.
      num_experts: E.

    Returns:
      order [T*K]: the assignment (token*K + k) at each sorted row.
      inverse [T*K]: the sorted row of each assignment.
      group_sizes [E] int32: rows of each expert.
    """
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    inverse = jnp.argsort(order)
    group_sizes = jnp.bincount(flat, length=num_experts + 1)[:num_experts].astype(jnp.int32)
    return order, inverse, group_sizes


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def dispatch(x: jax.Array, order: jax.Array, inverse: jax.Array, per_token: int) -> jax.Array:
    """Copies each token to a row for each of its K experts: [T, D] -> [T*K, D], sorted by expert.

    `order` and `inverse` are `sort_by_expert`'s, `per_token` is K. The transpose of `combine`.
    """
    return x[order // per_token]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def combine(y: jax.Array, order: jax.Array, inverse: jax.Array, per_token: int) -> jax.Array:
    """Adds up each token's K rows: [T*K, D] sorted by expert -> [T, D] in y's dtype.

    The sum is computed in float32 and rounded once. The transpose of `dispatch`.
    """
    y = y[inverse].reshape(-1, per_token, y.shape[-1])
    return jnp.sum(y, axis=1, dtype=jnp.float32).astype(y.dtype)


def permute(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """Returns x[order] for a permutation; its gradient is a gather by `inverse`, not a scatter."""
    return dispatch(x, order, inverse, 1)


# Each is the other's transpose, so that both backwards are gathers.
def _forward(
    function: Callable, x: jax.Array, order: jax.Array, inverse: jax.Array, per_token: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return function(x, order, inverse, per_token), (order, inverse)


def _backward(
    transpose: Callable, per_token: int, indices: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, None, None]:
    return transpose(g, *indices, per_token), None, None


dispatch.defvjp(functools.partial(_forward, dispatch), functools.partial(_backward, combine))
combine.defvjp(functools.partial(_forward, combine), functools.partial(_backward, dispatch))
