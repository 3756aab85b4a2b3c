"""Full fine-tuning with the conventional router gradient on ESFT's summarisation."""

from configs.table import experiment


def get_config():
    return experiment("conventional", "summary")
