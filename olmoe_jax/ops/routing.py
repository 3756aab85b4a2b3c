"""Moving tokens to their experts and back. T tokens, K experts per token, E experts, D width."""

import functools

import jax
import jax.numpy as jnp


def sort_by_expert(experts: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sorts the T*K assignments by expert; assignments to expert E ("none") come last.

    Args:
      experts: [T, K] int32 in 0…E.

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


@jax.custom_vjp
def permute(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """x[order] for a permutation; its gradient is a gather with `inverse`, not a scatter."""
    return x[order]


def _permute_forward(x, order, inverse):
    return x[order], inverse


def _permute_backward(inverse, g):
    return g[inverse], None, None


permute.defvjp(_permute_forward, _permute_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def to_experts(x: jax.Array, order: jax.Array, inverse: jax.Array, per_token: int) -> jax.Array:
    """[T, D] -> [T*K, D], each token once for each of its experts, sorted by expert."""
    return x[order // per_token]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def from_experts(y: jax.Array, order: jax.Array, inverse: jax.Array, per_token: int) -> jax.Array:
    """The sum over a token's K rows, in float32: [T*K, D] sorted by expert -> [T, D] in y's dtype.

    The transpose of `to_experts`, as that is of this.
    """
    y = y[inverse].reshape(-1, per_token, y.shape[-1])
    return jnp.sum(y, axis=1, dtype=jnp.float32).astype(y.dtype)


def _to_experts_forward(x, order, inverse, per_token):
    return to_experts(x, order, inverse, per_token), (order, inverse)


def _to_experts_backward(per_token, residuals, g):
    return from_experts(g, *residuals, per_token), None, None


def _from_experts_forward(y, order, inverse, per_token):
    return from_experts(y, order, inverse, per_token), (order, inverse)


def _from_experts_backward(per_token, residuals, g):
    return to_experts(g, *residuals, per_token), None, None


to_experts.defvjp(_to_experts_forward, _to_experts_backward)
from_experts.defvjp(_from_experts_forward, _from_experts_backward)
