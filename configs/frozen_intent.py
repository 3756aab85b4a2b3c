"""Full fine-tuning with a frozen router on ESFT's intent recognition."""

from configs.table import experiment


def get_config():
    return experiment("frozen", "intent")
