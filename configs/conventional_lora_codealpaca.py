"""LoRA beside a conventionally trained router, on CodeAlpaca's instructions to code."""

from configs.table import experiment


def get_config():
    return experiment("conventional_lora", "codealpaca")
