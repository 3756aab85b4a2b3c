"""The experts chosen by most tokens (ESFT-Token), on ESFT's intent recognition."""

from configs.table import experiment


def get_config():
    return experiment("esft_token", "intent")
