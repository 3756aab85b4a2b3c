"""Full fine-tuning with the conventional router gradient on grade school math (GSM8K)."""

from configs.table import experiment


def get_config():
    return experiment("conventional", "gsm")
