"""LoRA beside a router trained with DenseMixer's gradient, on ESFT's summarisation."""

from configs.table import experiment
from olmoe_jax.config import Config


def get_config() -> Config:
    return experiment("densemixer_lora", "summary")
