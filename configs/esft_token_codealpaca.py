"""The experts chosen by most tokens (ESFT-Token), on CodeAlpaca's instructions to code."""

from configs.table import experiment
from olmoe_jax.config import Config


def get_config() -> Config:
    return experiment("esft_token", "codealpaca")
