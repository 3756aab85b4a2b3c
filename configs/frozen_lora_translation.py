"""LoRA with a frozen router, on ESFT's translation."""

from configs.table import experiment
from olmoe_jax.config import Config


def get_config() -> Config:
    return experiment("frozen_lora", "translation")
