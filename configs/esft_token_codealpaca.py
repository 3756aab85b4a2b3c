"""The experts chosen by most tokens (ESFT-Token), on CodeAlpaca's instructions to code."""

from configs.table import experiment


def get_config():
    return experiment("esft_token", "codealpaca")
