"""The experts with the highest gate scores (ESFT-Gate), on CodeAlpaca's instructions to code."""

from configs.table import experiment
from olmoe_jax.config import Config


def get_config() -> Config:
    return experiment("esft_gate", "codealpaca")
