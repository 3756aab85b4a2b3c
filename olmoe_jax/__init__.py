"""Post-training of the OLMoE mixture-of-experts model in JAX.

model = olmoe_jax.from_pretrained("allenai/OLMoE-1B-7B-0125")
logits = model(tokens)
texts = olmoe_jax.generate(model, tokenizer, ["Question: 2 + 3?\\nAnswer:"])
olmoe_jax.train(config)
"""

import importlib
from typing import Any

_HOMES = {
    "from_pretrained": "olmoe_jax.checkpoints.loading",
    "generate": "olmoe_jax.generation.decoding",
    "train": "olmoe_jax.training.loop",
}
__all__ = ["from_pretrained", "generate", "train"]


def __getattr__(name: str) -> Any:
    """Imports a name on its first use, so that --help and a command's checks need no jax."""
    if name not in _HOMES:
        raise AttributeError(f"module 'olmoe_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
