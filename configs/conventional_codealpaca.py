"""Full fine-tuning with the conventional router gradient on CodeAlpaca's instructions to code."""

from configs.table import experiment


def get_config():
    return experiment("conventional", "codealpaca")
