"""The experts with the highest gate scores (ESFT-Gate), on ESFT's legal judgment."""

from configs.table import experiment
from olmoe_jax.config import Config


def get_config() -> Config:
    return experiment("esft_gate", "law")
