"""The FLOPs of a training step: what its mathematics needs, and what this implementation repeats.

A matmul of a token's vector with an [m, n] matrix counts 2 m n FLOPs. Norms, softmaxes, rotary
angles and the optimizer are left out: they are small beside the matmuls.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from olmoe_jax.model.config import ModelConfig, ModelSettings
from olmoe_jax.model.decoder import parameter_specs


class StepFlops(NamedTuple):
    """FLOPs per token of a training step, by purpose."""

    forward: float
    backward: float
    router_gradient: float  # DenseMixer's term: the forward of experts that were not selected
    recomputed: float  # what the implementation computes a second time

    @property
    def model(self) -> float:
        """The FLOPs that the mathematics needs."""
        return self.forward + self.backward + self.router_gradient

    @property
    def executed(self) -> float:
        """The FLOPs that the devices compute."""
        return self.model + self.recomputed


def step_flops_per_token(
    config: ModelConfig, settings: ModelSettings, trains: Callable[[str], bool], context: float
) -> StepFlops:
    """Returns the FLOPs of a training step per token.

    The sums use these quantities:

    - W: weights that one token is multiplied with. A layer's experts count K/E of their weights;
      adapters and the head count whole; the embedding and the norms count nothing.
    - W': the part of W whose gradient is computed. A tuned expert counts K/E of its weights, the
      share of the tokens that an average expert sees.
    - A = 2 L context (heads * head size): attention's scores and mixtures.
    - w: weights of one expert.  m: experts with DenseMixer's term (E unless the settings say less).

    | part | FLOPs |
    | --- | --- |
    | forward | 2 W + 2 A |
    | backward | 2 W (the inputs' gradients) + 2 W' (the weights' gradients) + 4 A |
    | router_gradient | 2 L (m - K) w for DenseMixer, else 0 |
    | recomputed | with remat="full" the layers' forward, without the last matmul of an expert, |
    | | whose output no gradient needs; and 2 L K w when DenseMixer covers all experts |

    Multiplying adapters out does not grow with the tokens and is left out.

    Args:
      config: the architecture.
      settings: how the model computes; decides about adapters, tuned experts and the router.
      trains: tells of a parameter's name whether it trains.
      context: positions that a token attends to on average.
    """
    weights = trained = not_recomputed = 0.0
    for name, spec in parameter_specs(config, settings).items():
        size = _multiplied(name, math.prod(spec.shape), config)
        trained += size * trains(name)
        # Tuned experts are experts of the base, which `weights` counts already.
        weights += 0.0 if name.startswith("tuned.") else size
        # The backward of an adapter A B needs B's input, and so A's product, but not B's.
        if name.endswith(("experts.down", "experts.lora.down_b")):
            not_recomputed += size
    attention = 2.0 * config.num_layers * context * config.num_heads * config.head_dim
    router_gradient = recomputed = 0.0
    if settings.remat == "full":
        head = config.hidden_size * config.vocab_size
        recomputed += 2.0 * (weights - head - not_recomputed + attention)
    if settings.dense_router_gradient:
        one_expert = 2.0 * config.num_layers * 3 * config.hidden_size * config.intermediate_size
        selected, terms = config.num_experts_per_token, settings.router_gradient_experts
        if terms is None or terms >= config.num_experts:
            # The loop over all experts computes the selected ones again.
            terms = config.num_experts
            recomputed += selected * one_expert
        router_gradient = max(0, terms - selected) * one_expert
    return StepFlops(
        forward=2.0 * (weights + attention),
        backward=2.0 * (weights + trained) + 4.0 * attention,
        router_gradient=router_gradient,
        recomputed=recomputed,
    )


def _multiplied(name: str, size: int, config: ModelConfig) -> float:
    """Returns how many of a parameter's `size` numbers one token is multiplied with."""
    if "norm" in name or (name == "embed" and not config.tie_word_embeddings):
        return 0.0
    if ".experts." in name or name.startswith("tuned."):
        return size * config.num_experts_per_token / config.num_experts
    return float(size)
