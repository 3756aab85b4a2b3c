"""The experts with the highest gate scores (ESFT-Gate), on grade school math (GSM8K)."""

from configs.table import experiment
from olmoe_jax.config import Config


def get_config() -> Config:
    return experiment("esft_gate", "gsm")
