"""The router gradient of one layer by hand, against `olmoe_jax.ops.router_gradient`.

    python -m examples.router_gradient

With g = dL/dy of the block's output y, DenseMixer gives every expert's probability the gradient
s_e = <g, E_e(x)>. The softmax turns s into dL/dz_e = p_e (s_e - sum_i p_i s_i), and the router's
gradient is dL/dW = x^T dL/dz.
"""

import jax
import jax.numpy as jnp

from olmoe_jax.ops.linear import ExpertWeights, Linear
from olmoe_jax.ops.router_gradient import router_gradient

T, D, F, E, K = 32, 16, 8, 8, 2  # tokens, model width, expert width, experts, experts per token


def main() -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the router's gradient [D, E] by hand, by our operation, and without DenseMixer."""
    keys = iter(jax.random.split(jax.random.key(0), 6))

    def random(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape) / shape[-2] ** 0.5

    x, g, router = random(T, D), random(T, D), random(D, E)
    gate, up, down = random(E, D, F), random(E, D, F), random(E, F, D)

    # By hand: all experts on all tokens.
    hidden = jax.nn.silu(jnp.einsum("td,edf->tef", x, gate)) * jnp.einsum("td,edf->tef", x, up)
    outputs = jnp.einsum("tef,efd->ted", hidden, down)
    p = jax.nn.softmax(x @ router)
    s = jnp.einsum("td,ted->te", g, outputs)
    by_hand = x.T @ (p * (s - jnp.sum(p * s, axis=-1, keepdims=True)))

    # By our operation: the block sums the chosen experts, as a conventional one does, and adds
    # zeros that carry the gradient of the others.
    def loss(router: jax.Array, densemixer: bool) -> jax.Array:
        p = jax.nn.softmax(x @ router)
        chosen = jax.lax.top_k(p, K)[1]
        is_chosen = jax.nn.one_hot(chosen, E, dtype=bool).any(axis=1)
        y = jnp.einsum("te,ted->td", jnp.where(is_chosen, p, 0), outputs)
        if densemixer:
            experts = ExpertWeights(Linear(gate), Linear(up), Linear(down))
            others = jnp.where(is_chosen, 0, p)
            y += router_gradient(x, others, experts, None, None, None)
        return jnp.sum(g * y)

    return by_hand, jax.grad(loss)(router, True), jax.grad(loss)(router, False)


if __name__ == "__main__":
    by_hand, ours, conventional = main()
    for name, gradient in (("router_gradient", ours), ("without DenseMixer", conventional)):
        error = jnp.linalg.norm(gradient - by_hand) / jnp.linalg.norm(by_hand)
        print(f"{name:20} {error:.1e} relative difference from the gradient by hand")
