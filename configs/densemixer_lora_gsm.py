"""LoRA beside a router trained with DenseMixer's gradient, on grade school math (GSM8K)."""

from configs.table import experiment


def get_config():
    return experiment("densemixer_lora", "gsm")
