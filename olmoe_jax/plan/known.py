"""The architectures of published models, known without weights or a network."""

from olmoe_jax.model.config import ModelConfig

OLMOE_1B_7B = ModelConfig(
    vocab_size=50304,
    hidden_size=2048,
    intermediate_size=1024,
    num_layers=16,
    num_heads=16,
    num_kv_heads=16,
    head_dim=128,
    num_experts=64,
    num_experts_per_token=8,
    rope_theta=10000.0,
    rms_norm_eps=1e-5,
    pad_token_id=1,
)
"""The architecture of allenai/OLMoE-1B-7B, all releases."""

KNOWN = {"allenai/OLMoE-1B-7B-": OLMOE_1B_7B}
"""Architectures by the beginning of the hub id."""


def known_config(hub_id: str) -> ModelConfig | None:
    """Returns the architecture of a hub id, or None if the model is not known."""
    for beginning, config in KNOWN.items():
        if hub_id.startswith(beginning):
            return config
    return None
