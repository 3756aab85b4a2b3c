"""DenseMixer's router gradient: every expert's probability learns, at no cost in the forward.

Shapes: T tokens, D model width, F expert width, E experts. The straight-through estimator of
DenseMixer (https://fengyao.notion.site/moe-posttraining, github.com/yaof20/DenseMixer) gives each
router probability, selected or not, the gradient dL/dp_e = <g, E_e(x)> with g the gradient of the
MoE block's output. A zero-valued term (the form of Levanter's `dense_router_delta`) carries it;
here the experts that the forward did not run are run only in the backward.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from olmoe_jax.ops.projection import (
    Projection,
    adapted_weight,
    grouped_project,
    transposed,
    with_tuned,
)
from olmoe_jax.ops.routing import sort_by_expert


class ExpertProjections(NamedTuple):
    """The experts' matrices: gate, up [E, D, F] and down [E, F, D], adapted or not."""

    gate: Projection
    up: Projection
    down: Projection


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def router_gradient(
    experts_per_token: int | None,
    dtype: str | None,
    backend: str | None,
    probabilities: jax.Array,
    x: jax.Array,
    experts: ExpertProjections,
    candidates: jax.Array,
) -> jax.Array:
    """Zeros [T, D] whose gradient for `probabilities` is <g_t, E_e(x_t)>, and zero for the rest.

    Args:
      experts_per_token: m, how many of a token's candidates get the exact term; None: all E.
      dtype: of the factors of the backward's matmuls, which add up in float32; None: x's;
        "float8_e4m3fn", for all experts only: scaled to its range, rows and matrix columns alone.
      backend: of the grouped matmul (used when m is given).
      probabilities: [T, E] float32: the weights of the experts that were not selected. Entries
        whose gradient must not count are masked by the caller.
      x: [T, D] the block's input.
      experts: in x's dtype; with adapters, the adapted experts count (without dropout).
      candidates: [T, m] int32: with m given, the experts to compute; E means "none". Unused else.
    """
    return jnp.zeros_like(x)


def _forward(experts_per_token, dtype, backend, probabilities, x, experts, candidates):
    return jnp.zeros_like(x), (x, experts, candidates)


def _backward(experts_per_token, dtype, backend, residuals, g):
    x, experts, candidates = residuals
    experts = ExpertProjections(*map(with_tuned, experts))
    if dtype == "bfloat16":
        x, g, experts = jax.tree.map(lambda value: value.astype(dtype), (x, g, experts))
    if experts_per_token is None:
        scores = all_expert_scores(x, g, experts, float8=dtype == "float8_e4m3fn")
    else:
        scores = candidate_scores(x, g, experts, candidates, backend)
    return scores, None, None, None


router_gradient.defvjp(_forward, _backward)


def _scores(x, g, multiply: Callable[[jax.Array, str], jax.Array]) -> jax.Array:
    """<g, W_down h> as <W_down^T g, h>, h = silu(W_gate x) * W_up x: three matmuls, no output."""
    hidden = jax.nn.silu(multiply(x, "gate")) * multiply(x, "up")
    return jnp.sum(hidden * multiply(g, "down"), axis=-1)


def all_expert_scores(x, g, experts: ExpertProjections, float8: bool = False) -> jax.Array:
    """s[t, e] = <g_t, E_e(x_t)>, [T, E] float32; one expert at a time, never [T, E, F].

    With `float8` the matmuls' factors are rounded to 8 bits (see `_to_float8`).
    """
    if float8:
        x, g = _to_float8(x, axis=1), _to_float8(g, axis=1)

    def one_expert(_, expert: ExpertProjections):
        def multiply(rows, name):
            # down is [F, D]: contracting its D applies the transpose without making it.
            contract = 1 if name == "down" else 0
            weight = adapted_weight(getattr(expert, name))
            multiply = functools.partial(
                jax.lax.dot_general,
                dimension_numbers=(((1,), (contract,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
            if not float8:
                return multiply(rows, weight)
            (rows, row_scales), (weight, scales) = rows, _to_float8(weight, axis=contract)
            return multiply(rows, weight) * row_scales * scales.reshape(1, -1)

        return None, _scores(x, g, multiply)

    return jax.lax.scan(one_expert, None, experts)[1].T


def _to_float8(matrix, axis: int) -> tuple[jax.Array, jax.Array]:
    """matrix ~ values * scales: float8_e4m3fn that uses its range along `axis`, float32 scales.

    As in "FP8 formats for deep learning" (https://arxiv.org/abs/2209.05433), but scaled by row or
    column, which a matmul leaves to be multiplied afterwards.
    """
    dtype = jnp.float8_e4m3fn
    largest = jnp.max(jnp.abs(matrix), axis, keepdims=True).astype(jnp.float32)
    scales = jnp.where(largest > 0, largest / float(jnp.finfo(dtype).max), 1.0)
    return (matrix / scales).astype(dtype), scales


def candidate_scores(x, g, experts: ExpertProjections, candidates, backend) -> jax.Array:
    """As `all_expert_scores`, but only for each token's `candidates` [T, m]; 0 elsewhere."""
    num_tokens, per_token = candidates.shape
    num_experts = experts.gate.weight.shape[0]
    order, _, group_sizes = sort_by_expert(candidates, num_experts)
    token = order // per_token
    experts = experts._replace(down=transposed(experts.down))

    def multiply(rows, name):
        y = grouped_project(rows, getattr(experts, name), rows, group_sizes, backend)
        return y.astype(jnp.float32)

    scores = _scores(x[token], g[token], multiply)
    expert = candidates.reshape(-1)[order]
    return (
        jnp.zeros((num_tokens, num_experts), jnp.float32).at[token, expert].add(scores, mode="drop")
    )
