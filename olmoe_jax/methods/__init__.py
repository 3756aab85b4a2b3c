"""The fine-tuning methods: a class for each, made from a run's options by `build`."""

import importlib

from olmoe_jax.config import MethodOptions
from olmoe_jax.config.methods import METHODS
from olmoe_jax.errors import UserError
from olmoe_jax.methods.lora import Lora
from olmoe_jax.methods.method import Base, Method, Preparation
from olmoe_jax.model.config import LoraSettings, ModelConfig

__all__ = ["Base", "Method", "Preparation", "build", "implementation"]


def build(options: MethodOptions, config: ModelConfig) -> Method:
    """Makes the method that a run's validated options ask for.

    Raises:
      UserError: the options do not fit the model, or an expert config cannot be read.
    """
    m, num_chosen = options.router_gradient_experts, config.num_experts_per_token
    if m is not None and m < num_chosen:
        raise UserError(
            f"method.router_gradient_experts={m}: a token goes to {num_chosen} experts, whose "
            f"probabilities always get a gradient; write {num_chosen} (as conventional) or more"
        )
    if m is not None and m > config.num_experts:
        raise UserError(
            f"method.router_gradient_experts={m}: the model has {config.num_experts} experts; "
            "write none for all of them"
        )
    method = implementation(options.name)(options, config)
    if (lora := LoraSettings.of_method(vars(options))) is not None:
        method = Lora(method, lora)
    return method


def implementation(name: str) -> type[Method]:
    """Imports and returns the class of a method in the table."""
    module, _, class_name = METHODS[name].implementation.partition(":")
    return getattr(importlib.import_module(module), class_name)
