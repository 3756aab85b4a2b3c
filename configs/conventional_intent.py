"""Full fine-tuning with the conventional router gradient on ESFT's intent recognition."""

from configs.table import experiment


def get_config():
    return experiment("conventional", "intent")
