"""LoRA beside a router trained with DenseMixer's gradient, on ESFT's summarisation."""

from configs.table import experiment


def get_config():
    return experiment("densemixer_lora", "summary")
