"""LoRA with a frozen router, on ESFT's legal judgment."""

from configs.table import experiment


def get_config():
    return experiment("frozen_lora", "law")
