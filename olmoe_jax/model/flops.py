"""Analytic FLOPs of the model: what its mathematics needs, whatever an implementation does.

A matmul of a token's vector with an [m, n] matrix counts 2 m n.
"""

from olmoe_jax.model.config import ModelConfig


def forward_flops_per_token(config: ModelConfig, context: float) -> float:
    """FLOPs of the forward pass per token that attends to `context` positions on average."""
    hidden, heads = config.hidden_size, config.num_heads * config.head_dim
    kv_heads = config.num_kv_heads * config.head_dim
    projections = hidden * (2 * heads + 2 * kv_heads)
    experts = config.num_experts_per_token * expert_weights(config)
    scores = 2 * context * heads
    layer = projections + scores + hidden * config.num_experts + experts
    return 2.0 * (config.num_layers * layer + hidden * config.vocab_size)


def expert_weights(config: ModelConfig) -> int:
    """Weights of one expert."""
    return 3 * config.hidden_size * config.intermediate_size


def train_flops_per_token(
    config: ModelConfig, method: str, router_gradient_experts: int | None, context: float
) -> float:
    """FLOPs of forward and backward per token, without recomputation.

    The backward is twice the forward. DenseMixer adds one expert-sized forward for each expert
    whose probability gets its term and that the sparse backward does not give already.
    """
    flops = 3 * forward_flops_per_token(config, context)
    if method == "densemixer":
        terms = router_gradient_experts or config.num_experts
        extra = max(0, terms - config.num_experts_per_token)
        flops += 2.0 * config.num_layers * extra * expert_weights(config)
    return flops
