"""LoRA beside a router trained with DenseMixer's gradient, on CodeAlpaca's instructions to code."""

from configs.table import experiment


def get_config():
    return experiment("densemixer_lora", "codealpaca")
