"""LoRA beside a conventionally trained router, on CodeAlpaca's instructions to code."""

from configs.table import experiment
from olmoe_jax.config import Config


def get_config() -> Config:
    return experiment("conventional_lora", "codealpaca")
