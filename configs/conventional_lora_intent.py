"""LoRA beside a conventionally trained router, on ESFT's intent recognition."""

from configs.table import experiment


def get_config():
    return experiment("conventional_lora", "intent")
