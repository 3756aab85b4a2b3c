"""Full fine-tuning with DenseMixer's router gradient on grade school math (GSM8K)."""

from configs.table import experiment


def get_config():
    return experiment("densemixer", "gsm")
