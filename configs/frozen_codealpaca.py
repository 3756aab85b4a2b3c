"""Full fine-tuning with a frozen router on CodeAlpaca's instructions to code."""

from configs.table import experiment


def get_config():
    return experiment("frozen", "codealpaca")
