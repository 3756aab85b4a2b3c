"""The experts with the highest gate scores (ESFT-Gate), on ESFT's intent recognition."""

from configs.table import experiment


def get_config():
    return experiment("esft_gate", "intent")
