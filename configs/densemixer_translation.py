"""Full fine-tuning with DenseMixer's router gradient on ESFT's translation."""

from configs.table import experiment


def get_config():
    return experiment("densemixer", "translation")
