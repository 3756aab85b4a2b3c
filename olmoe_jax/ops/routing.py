"""Moving tokens to their experts and back. T tokens, K experts per token, E experts, D width."""

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


def to_experts(x: jax.Array, order: jax.Array, inverse: jax.Array, per_token: int) -> jax.Array:
    """[T, D] -> [T*K, D], each token once for each of its experts, sorted by expert."""
    repeated = jnp.repeat(x, per_token, axis=0)
    return permute(repeated, order, inverse)


def from_experts(
    y: jax.Array, weights: jax.Array, order: jax.Array, inverse: jax.Array
) -> jax.Array:
    """Sum over k of weights[t, k] times the row of (t, k): [T*K, D] -> [T, D] float32."""
    tokens, per_token = weights.shape
    y = permute(y, inverse, order).reshape(tokens, per_token, -1)
    return jnp.einsum("tkd,tk->td", y.astype(jnp.float32), weights)
