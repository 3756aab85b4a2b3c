"""Full fine-tuning with the conventional router gradient on ESFT's translation."""

from configs.table import experiment


def get_config():
    return experiment("conventional", "translation")
