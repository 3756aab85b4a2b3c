"""Full fine-tuning with DenseMixer's router gradient on ESFT's legal judgment."""

from configs.table import experiment


def get_config():
    return experiment("densemixer", "law")
