"""LoRA with a frozen router, on ESFT's summarisation."""

from configs.table import experiment


def get_config():
    return experiment("frozen_lora", "summary")
