"""The experts with the highest gate scores (ESFT-Gate), on CodeAlpaca's instructions to code."""

from configs.table import experiment


def get_config():
    return experiment("esft_gate", "codealpaca")
