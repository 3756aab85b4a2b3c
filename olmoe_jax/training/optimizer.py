"""AdamW, learning-rate schedules and gradient clipping, as PyTorch and transformers define them."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from olmoe_jax.model.parameters import Parameters

Schedule = Callable[[jax.Array], jax.Array]


def schedule(
    kind: Literal["linear", "cosine", "constant"], peak: float, warmup_steps: int, total_steps: int
) -> Schedule:
    """Learning rate of update 0, 1, … (float32), as transformers' schedules of these names.

    Linear warmup from 0 (the first update has learning rate 0 when there is a warmup), then
    linear to 0, half a cosine to 0, or constant.
    """

    def learning_rate(step: jax.Array) -> jax.Array:
        warmup = step / max(1, warmup_steps)
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        decay = {
            "linear": jnp.maximum(0.0, 1.0 - progress),
            "cosine": 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0))),
            "constant": jnp.float32(1.0),
        }[kind]
        return peak * jnp.where(step < warmup_steps, warmup, decay).astype(jnp.float32)

    return learning_rate


def adamw(
    beta1: float, beta2: float, epsilon: float, weight_decay: float
) -> optax.GradientTransformation:
    """AdamW's direction (Loshchilov and Hutter); the learning rate is applied by the caller.

    Every trained parameter is decayed, norms and embeddings too, as in the reference.
    """
    return optax.chain(
        optax.scale_by_adam(beta1, beta2, epsilon), optax.add_decayed_weights(weight_decay)
    )


def global_norm(gradients: Parameters) -> jax.Array:
    """sqrt of the sum of squares over all gradients, float32."""
    squares = [jnp.sum(jnp.square(g.astype(jnp.float32))) for g in gradients.values()]
    return jnp.sqrt(sum(squares))


def clip_scale(norm: jax.Array, max_norm: float) -> jax.Array:
    """PyTorch's clip_grad_norm_ factor: min(1, max_norm / (norm + 1e-6))."""
    return jnp.minimum(1.0, max_norm / (norm + 1e-6))
