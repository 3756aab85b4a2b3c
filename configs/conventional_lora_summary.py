"""LoRA beside a conventionally trained router, on ESFT's summarisation."""

from configs.table import experiment
from olmoe_jax.config import Config


def get_config() -> Config:
    return experiment("conventional_lora", "summary")
