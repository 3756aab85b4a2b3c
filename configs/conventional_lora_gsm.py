"""LoRA beside a conventionally trained router, on grade school math (GSM8K)."""

from configs.table import experiment


def get_config():
    return experiment("conventional_lora", "gsm")
