"""Analytic FLOPs of the model: what its mathematics needs, whatever an implementation does.

A matmul of a token's vector with an [m, n] matrix counts 2 m n.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from olmoe_jax.model.config import ModelConfig, ModelSettings
from olmoe_jax.model.decoder import parameter_specs
from olmoe_jax.model.parameters import ParameterSpec


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


class StepFlops(NamedTuple):
    """FLOPs per token of a training step, by what they are for."""

    forward: float
    backward: float
    router_gradient: float  # DenseMixer's term, of the experts that were not selected
    recomputed: float  # what the implementation computes a second time

    @property
    def model(self) -> float:
        """What the mathematics needs."""
        return self.forward + self.backward + self.router_gradient

    @property
    def executed(self) -> float:
        """What the devices compute."""
        return self.model + self.recomputed


def step_flops_per_token(
    config: ModelConfig, settings: ModelSettings, trains: Callable[[str], bool], context: float
) -> StepFlops:
    """FLOPs of a training step per token that attends to `context` positions on average.

    With W the weights that a token is multiplied with (of each layer's E experts only K; adapters
    too; the head, no embedding or norm) and A = 2 * context * heads * L its attention scores and
    mixtures:

    - forward = 2 (W + A); backward = 2 W for the inputs' gradients + 2 W' for the weights' + 4 A.
      W' counts only weights that train: without LoRA all of them; of ESFT's selected experts the
      share K/E of tokens that an average expert sees.
    - router_gradient = 2 L (m - K) w for DenseMixer, with w the weights of an expert and m = E
      unless settings.router_gradient_experts is less.
    - recomputed = the forward of all layers with remat="full", but for the last matmul of an
      expert, whose output no gradient needs; and 2 L K w when DenseMixer is exact: its loop runs
      all experts.

    Work that does not grow with the tokens (adapters multiplied out, the optimizer) is left out.
    """
    weights = trained = last = 0.0
    for name, spec in parameter_specs(config, settings).items():
        size = _matmul_weights(name, spec, config)
        trained += size * trains(name)
        weights += 0.0 if name.startswith("tuned.") else size
        # With an adapter A B, the input of B is needed and its output not.
        last += size if name.endswith(("experts.down", "experts.lora.down_b")) else 0.0
    attention = 2.0 * context * config.num_heads * config.head_dim * config.num_layers
    head = config.hidden_size * config.vocab_size
    router_gradient = recomputed = 0.0
    if settings.remat == "full":
        recomputed += 2.0 * (weights - head - last + attention)
    if settings.router_method == "densemixer":
        expert = 2.0 * config.num_layers * expert_weights(config)
        selected, terms = config.num_experts_per_token, settings.router_gradient_experts
        if terms is None or terms >= config.num_experts:
            terms = config.num_experts
            recomputed += selected * expert
        router_gradient = max(0, terms - selected) * expert
    return StepFlops(
        forward=2.0 * (weights + attention),
        backward=2.0 * (weights + trained) + 4.0 * attention,
        router_gradient=router_gradient,
        recomputed=recomputed,
    )


def _matmul_weights(name: str, spec: ParameterSpec, config: ModelConfig) -> float:
    """How many of a parameter's numbers a token is multiplied with."""
    if "norm" in name or (name == "embed" and not config.tie_word_embeddings):
        return 0.0
    size = float(math.prod(spec.shape))
    if ".experts." in name or name.startswith("tuned."):
        return size * config.num_experts_per_token / config.num_experts
    return size
