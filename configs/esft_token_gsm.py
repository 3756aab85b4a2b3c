"""The experts chosen by most tokens (ESFT-Token), on grade school math (GSM8K)."""

from configs.table import experiment


def get_config():
    return experiment("esft_token", "gsm")
