"""Weighted cross-entropy, chunked over positions so that a row's logits never exist at once."""

import jax
import jax.numpy as jnp

CHUNK = 512
"""Positions per chunk: bounds the live logits to [B, CHUNK, V] float32."""


def weighted_cross_entropy(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array
) -> jax.Array:
    """Sum over positions of weight * -log softmax(head h)[target], a float32 scalar.

    Args:
      hidden: [B, S, D]; head: [V, D]; both in the compute dtype.
      targets: [B, S] int; weights: [B, S] float32 (0 where there is nothing to learn).
    """

    def chunk_loss(hidden, targets, weights):
        logits = jnp.einsum("bsd,vd->bsv", hidden, head, preferred_element_type=jnp.float32)
        target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        losses = jax.nn.logsumexp(logits, axis=-1) - target_logits
        # A weight of zero must hide an infinite loss too (0 * inf is not a number).
        return jnp.sum(jnp.where(weights != 0, losses * weights, 0.0))

    length = hidden.shape[1]
    if length <= CHUNK or length % CHUNK:
        return chunk_loss(hidden, targets, weights)

    def chunks(x):
        return jnp.moveaxis(x.reshape(x.shape[0], length // CHUNK, CHUNK, *x.shape[2:]), 1, 0)

    def body(total, inputs):
        return total + jax.checkpoint(chunk_loss)(*inputs), None

    return jax.lax.scan(body, jnp.float32(0), (chunks(hidden), chunks(targets), chunks(weights)))[0]
