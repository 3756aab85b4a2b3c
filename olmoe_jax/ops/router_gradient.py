"""DenseMixer's router gradient: probabilities of experts that were not chosen learn too.

Shapes: T tokens, D model width, F expert width, E experts, K experts per token, m experts with a
router gradient. The straight-through estimator of DenseMixer
(https://fengyao.notion.site/moe-posttraining, github.com/yaof20/DenseMixer) gives each router
weight w_e, of a chosen expert or not, the gradient dL/dw_e = <g, E_e(x)> with g the gradient of the
MoE block's output. The weight w_e is the probability p_e; with `norm_topk_prob` it is p_e / c, c
being the sum of the chosen probabilities, and a constant in the weights of the other experts. A
zero-valued term (the form of Levanter's `dense_router_delta`) carries this gradient; the experts
that the forward did not run are run only in the backward. With m, the forward chooses the
experts (a second top_k). Without, a loop scores all E experts; the scores of the chosen ones are
discarded, because the block's own backward has them.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from olmoe_jax.ops.expert_parallel import own_experts
from olmoe_jax.ops.linear import (
    ExpertWeights,
    cast,
    expert_of,
    grouped_linear,
    grouped_linear_transposed,
    merged_weight,
    untuned,
)
from olmoe_jax.ops.routing import Routing, sort_by_expert


def dense_router_term(
    x: jax.Array,
    routing: Routing,
    is_token: jax.Array,
    experts: ExpertWeights,
    first_expert: jax.Array | int = 0,
    *,
    normalize: bool,
    router_gradient_experts: int | None,
    dtype: str | None,
    backend: str | None,
) -> jax.Array:
    """Returns zeros [T, D] that carry the router gradient of the experts that were not chosen.

    The chosen experts already have their gradient from the block's own backward.

    Args:
      x: [T, D], the block's input.
      routing: the router's decision for these tokens.
      is_token: [T] bool; padding learns nothing, whatever gradient reaches its output.
      experts: the consecutive experts at hand, the first of which has the number `first_expert`.
      first_expert: see `experts`.
      normalize: whether the chosen experts' weights are divided by their sum (`norm_topk_prob`).
      router_gradient_experts: m, the most probable experts that get a gradient (the K chosen ones
        among them); None: all E.
      dtype: see `router_gradient`.
      backend: see `router_gradient`.
    """
    experts = ExpertWeights(*map(untuned, experts))
    num_experts, num_own = routing.probabilities.shape[1], experts.gate.weight.shape[0]
    is_chosen = jax.nn.one_hot(routing.chosen, num_experts, dtype=bool).any(axis=1)  # [T, E]
    other_weights = jnp.where(is_chosen | ~is_token[:, None], 0.0, routing.probabilities)
    if normalize:
        chosen_sum = jnp.sum(jnp.where(is_chosen, routing.probabilities, 0.0), -1, keepdims=True)
        # Padding chooses nothing; its sum must not divide by zero.
        chosen_sum = jnp.where(is_token[:, None], chosen_sum, 1.0)
        other_weights = other_weights / jax.lax.stop_gradient(chosen_sum)
    if num_own < num_experts:
        other_weights = jax.lax.dynamic_slice_in_dim(other_weights, first_expert, num_own, axis=1)
    if router_gradient_experts is None or router_gradient_experts >= num_experts:
        return router_gradient(x, other_weights, experts, None, dtype, backend)
    num_chosen = routing.chosen.shape[1]
    # In `route`'s order, so that the first K are the chosen ones.
    candidates = jax.lax.top_k(routing.probabilities, router_gradient_experts)[1][:, num_chosen:]
    candidates = jnp.where(is_token[:, None], candidates, num_experts)
    candidates = own_experts(candidates, first_expert, num_own)  # [T, m - K]
    return router_gradient(x, other_weights, experts, candidates, dtype, backend)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def router_gradient(
    x: jax.Array,
    other_weights: jax.Array,
    experts: ExpertWeights,
    candidates: jax.Array | None,
    dtype: str | None,
    backend: str | None,
) -> jax.Array:
    """Returns zeros [T, D] whose gradient for `other_weights` is <g_t, E_e(x_t)>.

    x, the experts and their adapters get no gradient here: it reaches them through the chosen
    experts alone, as in the straight-through estimator.

    Args:
      x: [T, D], the block's input.
      other_weights: [T, E] float32, the weights of the experts that were not chosen. The caller
        masks entries whose gradient must not count.
      experts: in x's dtype; with adapters, the adapted experts count, without dropout.
      candidates: [T, m - K] int32, the experts to compute, E means "none"; None: all experts.
      dtype: of the factors of the backward's matmuls, which add up in float32 (with candidates,
        each product is then rounded to this dtype); None: x's; "float8_e4m3fn", for all experts
        only: scaled to its range, rows and matrix columns alone.
      backend: of the grouped matmul (used with candidates).
    """
    return jnp.zeros_like(x)


def _forward(
    x: jax.Array,
    other_weights: jax.Array,
    experts: ExpertWeights,
    candidates: jax.Array | None,
    dtype: str | None,
    backend: str | None,
) -> tuple[jax.Array, tuple]:
    return jnp.zeros_like(x), (x, experts, candidates)


def _backward(
    dtype: str | None,
    backend: str | None,
    residuals: tuple,
    g: jax.Array,
) -> tuple[None, jax.Array, None, None]:
    x, experts, candidates = residuals
    if dtype == "bfloat16":
        x, g = x.astype(dtype), g.astype(dtype)
    if candidates is None:
        scores = all_expert_scores(x, g, experts, float8=dtype == "float8_e4m3fn")
    else:
        experts = ExpertWeights(*(cast(map_, x.dtype) for map_ in experts))
        scores = candidate_scores(x, g, experts, candidates, backend)
    return None, scores, None, None


router_gradient.defvjp(_forward, _backward)


def _scores(x: Any, g: Any, multiply: Callable[[Any, str], jax.Array]) -> jax.Array:
    """Computes <g, W_down h> as <W_down^T g, h>, h = silu(W_gate x) * W_up x: three matmuls."""
    # `multiply(g, "down")` is g W_down^T.
    hidden = jax.nn.silu(multiply(x, "gate")) * multiply(x, "up")
    return jnp.sum(hidden * multiply(g, "down"), axis=-1)


def all_expert_scores(
    x: jax.Array, g: jax.Array, experts: ExpertWeights, float8: bool = False
) -> jax.Array:
    """Returns the scores s[t, e] = <g_t, E_e(x_t)>, [T, E] float32.

    Runs one expert at a time, in x's dtype: no array of [T, E, F] or [T, E, D] ever exists. With
    `float8` the matmuls' factors are rounded to 8 bits (see `_to_float8`).
    """
    # In 8 bits, x and g are pairs of values and scales.
    factor, g_factor = (_to_float8(x, axis=1), _to_float8(g, axis=1)) if float8 else (x, g)

    def one_expert(_: None, number: jax.Array) -> tuple[None, jax.Array]:
        def multiply(rows: Any, name: str) -> jax.Array:
            # down is [F, D]: contracting its D applies the transpose without making it.
            contract = 1 if name == "down" else 0
            weight = merged_weight(expert_of(getattr(experts, name), number, x.dtype))
            dot = functools.partial(
                jax.lax.dot_general,
                dimension_numbers=(((1,), (contract,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
            if not float8:
                return dot(rows, weight)
            (values, row_scales), (weight, scales) = rows, _to_float8(weight, axis=contract)
            return dot(values, weight) * row_scales * scales.reshape(1, -1)

        return None, _scores(factor, g_factor, multiply)

    return jax.lax.scan(one_expert, None, jnp.arange(experts.gate.weight.shape[0]))[1].T


def _to_float8(matrix: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Returns float8_e4m3fn values and float32 scales with matrix ~ values * scales.

    "FP8 formats for deep learning" (https://arxiv.org/abs/2209.05433) scales whole tensors. This
    function scales each row (or column) to the range, and the matmul's result is multiplied by the
    scales afterwards.
    """
    dtype = jnp.float8_e4m3fn
    largest = jnp.max(jnp.abs(matrix), axis, keepdims=True).astype(jnp.float32)
    scales = jnp.where(largest > 0, largest / float(jnp.finfo(dtype).max), 1.0)
    return (matrix / scales).astype(dtype), scales


def candidate_scores(
    x: jax.Array,
    g: jax.Array,
    experts: ExpertWeights,
    candidates: jax.Array,
    backend: str | None,
) -> jax.Array:
    """Returns `all_expert_scores` for each token's `candidates` [T, m - K]; 0 elsewhere."""
    num_tokens, num_candidates = candidates.shape
    num_experts = experts.gate.weight.shape[0]
    order, _, group_sizes = sort_by_expert(candidates, num_experts)
    token = order // num_candidates

    def multiply(rows: jax.Array, name: str) -> jax.Array:
        if name == "down":
            y = grouped_linear_transposed(rows, experts.down, group_sizes, backend)
        else:
            y = grouped_linear(rows, getattr(experts, name), rows, group_sizes, backend)
        return y.astype(jnp.float32)

    scores = _scores(x[token], g[token], multiply)
    expert = candidates.reshape(-1)[order]
    return (
        jnp.zeros((num_tokens, num_experts), jnp.float32).at[token, expert].add(scores, mode="drop")
    )
