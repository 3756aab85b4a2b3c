"""The experts chosen by most tokens (ESFT-Token), on ESFT's intent recognition."""

from configs.table import experiment
from olmoe_jax.config import Config


def get_config() -> Config:
    return experiment("esft_token", "intent")
