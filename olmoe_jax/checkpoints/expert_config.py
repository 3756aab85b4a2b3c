"""The expert config: the JSON file that says which experts are tuned.

{"experts": {"1": [ids…], …}, "shared_experts": false, "non_expert_modules": false}. The keys of
the layers count from 1.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pydantic

from olmoe_jax.errors import UserError
from olmoe_jax.files import STRICT, read_json
from olmoe_jax.model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class ExpertConfig:
    """The modules that a method of expert tuning trains."""

    # The ids of each layer's tuned experts, sorted whatever order was given: the order of every
    # checkpoint's stack.
    experts: tuple[tuple[int, ...], ...]
    non_expert_modules: bool = False  # whether all weights outside the experts train too

    def __post_init__(self) -> None:
        object.__setattr__(self, "experts", tuple(tuple(sorted(ids)) for ids in self.experts))

    def to_json(self) -> dict[str, Any]:
        """Returns the content of the file."""
        experts = {str(layer + 1): list(ids) for layer, ids in enumerate(self.experts)}
        return {
            "experts": experts,
            "shared_experts": False,
            "non_expert_modules": self.non_expert_modules,
        }


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True)
class _ExpertFile:
    """The content of an expert config."""

    experts: dict[str, list[int]]
    shared_experts: bool = False
    non_expert_modules: bool = False


def read_expert_config(file: Path, config: ModelConfig) -> ExpertConfig:
    """Reads an expert config and checks it against the model's architecture.

    Raises:
      UserError: the layers or ids are another model's, the file names no expert, or it asks for
        shared experts, which OLMoE does not have.
    """
    content = read_json(_ExpertFile, file)
    experts = content.experts
    layers = [str(layer + 1) for layer in range(config.num_layers)]
    for layer in experts:
        if layer not in layers:
            raise UserError(
                f"{file}: layer {layer}: this model's layers are 1 to {layers[-1]}; is it of "
                "another model?"
            )
    for layer in layers:
        if layer not in experts:
            raise UserError(
                f"{file}: layer {layer} is missing; write [] where a layer trains no expert"
            )
    if content.shared_experts:
        raise UserError(f"{file}: shared_experts is true, but OLMoE has none; write false")
    tuned = []
    for layer in layers:
        ids = experts[layer]
        if not all(0 <= i < config.num_experts for i in ids) or len(set(ids)) != len(ids):
            raise UserError(
                f"{file}: layer {layer} has {ids}; write different ids from 0 to "
                f"{config.num_experts - 1}"
            )
        tuned.append(tuple(ids))
    if not any(tuned):
        raise UserError(f"{file}: names no expert; write ids for at least one layer")
    return ExpertConfig(tuple(tuned), content.non_expert_modules)
