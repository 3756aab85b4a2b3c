"""Full fine-tuning with a frozen router on grade school math (GSM8K)."""

from configs.table import experiment


def get_config():
    return experiment("frozen", "gsm")
