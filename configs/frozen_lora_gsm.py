"""LoRA with a frozen router, on grade school math (GSM8K)."""

from configs.table import experiment
from olmoe_jax.config import Config


def get_config() -> Config:
    return experiment("frozen_lora", "gsm")
