"""The experts with the highest gate scores (ESFT-Gate), on grade school math (GSM8K)."""

from configs.table import experiment


def get_config():
    return experiment("esft_gate", "gsm")
