"""Expert tuning: some experts of each layer train, and everything else stays.

A run keeps its choice of experts in OUTPUT_DIR/experts.json.
"""

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import jax
import numpy as np

from olmoe_jax.checkpoints import checksums
from olmoe_jax.checkpoints.expert_config import ExpertConfig, read_expert_config
from olmoe_jax.checkpoints.loading import load_tuned, stack_tuned
from olmoe_jax.checkpoints.opening import EXPERTS
from olmoe_jax.config import MethodOptions
from olmoe_jax.errors import UserError
from olmoe_jax.methods.method import Base, Method, Preparation
from olmoe_jax.model.config import ModelConfig, ModelSettings
from olmoe_jax.parallel import distributed


class ExpertTuning(Method):
    """Trains the tuned experts; everything else keeps its weights, the router too.

    A subclass says which experts are tuned: `choose`, or `choose_by_data`. An expert config may say
    that all modules but the experts train too (`non_expert_modules`), the router among them.
    """

    trains_head = False
    """True if the output head trains too (with tied embeddings, the embedding)."""

    def __init__(self, options: MethodOptions, config: ModelConfig):
        super().__init__(options, config)
        path = options.experts_path
        # The tuned experts; None: the method chooses them when the run is prepared.
        self.experts = read_expert_config(Path(path), config) if path else None

    def choose(self, seed: int) -> ExpertConfig | None:
        """Chooses the tuned experts of a run that was given none, by the run's seed.

        Returns:
          The experts; None: the choice depends on data, see `choose_by_data`.
        """
        return None

    def choose_by_data(self, run: Preparation) -> ExpertConfig:
        """Chooses the tuned experts where `choose` leaves that to the data."""
        raise NotImplementedError(f"{self.options.name}: write choose or choose_by_data")

    def with_experts(self, experts: ExpertConfig) -> Self:
        """Returns the method with these tuned experts."""
        method = copy.copy(self)
        method.experts = experts
        return method

    def model_settings(self, settings: ModelSettings) -> ModelSettings:
        tuned = self.experts.experts if self.experts else None
        return dataclasses.replace(super().model_settings(settings), tuned_experts=tuned)

    def trains(self, name: str) -> bool:
        head = "embed" if self.config.tie_word_embeddings else "lm_head"
        if name.startswith("tuned.") or (name == head and self.trains_head):
            return True
        others_train = self.experts is not None and self.experts.non_expert_modules
        return others_train and ".experts." not in name

    def prepare(self, run: Preparation) -> Self:
        """Settles the tuned experts: chosen by this run before, given, or chosen now."""
        file = run.output / EXPERTS
        chosen_before = file.exists()
        distributed.barrier("look for experts.json")
        if not chosen_before:
            experts = self.experts or self.choose(run.seed) or self.choose_by_data(run)
            if distributed.is_writer():
                checksums.write_json(file, experts.to_json())
        distributed.barrier("experts.json")
        experts = read_expert_config(file, self.config)
        if self.experts not in (None, experts):
            raise UserError(
                f"method.experts_path={self.options.experts_path}: names other experts than "
                f"{file}, with which the run began; bring the expert config back, write another "
                "train.output_dir, or train.resume=restart"
            )
        return self.with_experts(experts)

    def for_plan(self, seed: int, experts_per_layer: int) -> tuple[Self, int | None]:
        if experts := self.experts or self.choose(seed):
            return self.with_experts(experts), None
        number = min(experts_per_layer, self.config.num_experts)
        experts = ExpertConfig((tuple(range(number)),) * self.config.num_layers)
        return self.with_experts(experts), number

    def added_parameters(self, base: Base) -> Mapping[str, jax.Array | np.ndarray]:
        if base.source is None:
            return stack_tuned(base.parameters, self._tuned.experts)
        return load_tuned(base.source, self._tuned.experts)

    def describe(self) -> str:
        chosen = sum(map(len, self._tuned.experts))
        total = self.config.num_layers * self.config.num_experts
        return f"{super().describe()}, {chosen} of {total} experts ({EXPERTS})"

    @property
    def _tuned(self) -> ExpertConfig:
        if self.experts is None:
            raise ValueError(f"{self.options.name}: no experts are chosen yet")
        return self.experts
