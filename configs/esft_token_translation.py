"""The experts chosen by most tokens (ESFT-Token), on ESFT's translation."""

from configs.table import experiment


def get_config():
    return experiment("esft_token", "translation")
