"""Full fine-tuning with DenseMixer's router gradient on CodeAlpaca's instructions to code."""

from configs.table import experiment


def get_config():
    return experiment("densemixer", "codealpaca")
