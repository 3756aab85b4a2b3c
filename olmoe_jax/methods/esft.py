"""ESFT, expert-specialised fine-tuning (https://arxiv.org/abs/2407.01906): few experts train.

The tuned experts of each layer are given (method.experts_path), or chosen by their score on the
run's training data. A run keeps its choice in OUTPUT_DIR/experts.json.
"""

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from olmoe_jax.checkpoints import directory
from olmoe_jax.checkpoints.expert_config import ExpertConfig, read_expert_config
from olmoe_jax.checkpoints.loading import (
    load_parameters,
    load_tuned,
    random_parameters,
    stack_tuned,
)
from olmoe_jax.checkpoints.opening import EXPERTS
from olmoe_jax.config import MethodOptions
from olmoe_jax.methods.method import Base, Method, Preparation
from olmoe_jax.methods.scoring import expert_scores
from olmoe_jax.methods.selection import scores_to_json, select
from olmoe_jax.model.config import ModelConfig, ModelSettings
from olmoe_jax.model.decoder import graph_of
from olmoe_jax.parallel import distributed
from olmoe_jax.plots import heat_maps


class TunedExpertsMethod(Method):
    """Only the tuned experts train, and the output head.

    The router keeps its weight, unless the expert config lets all modules but the experts train.
    Subclasses say which experts: `choose`.
    """

    experts: ExpertConfig | None = None
    """What trains; None until the run is prepared."""

    def __init__(self, options: MethodOptions, config: ModelConfig):
        super().__init__(options, config)
        if options.esft_densemixer:
            self.router_gradient = "all"
        self.router_trains = False
        if options.experts_path:
            self._settle(read_expert_config(Path(options.experts_path), config))

    def model_settings(self, settings: ModelSettings) -> ModelSettings:
        tuned = self.experts.experts if self.experts else None
        return dataclasses.replace(super().model_settings(settings), tuned_experts=tuned)

    def trains(self, name: str) -> bool:
        head = "embed" if self.config.tie_word_embeddings else "lm_head"
        if name.startswith("tuned.") or (name == head and self.options.esft_train_head):
            return True
        return self._tuned.non_expert_modules and ".experts." not in name

    def prepare(self, run: Preparation) -> Self:
        """Settles the tuned experts: chosen by this run before, given, or chosen now."""
        file = run.output / EXPERTS
        chosen_before = file.exists()
        distributed.barrier("look for experts.json")
        if not chosen_before:
            experts = self.experts or self.choose(run)
            if distributed.is_writer():
                directory.write_json(file, experts.to_json())
        distributed.barrier("experts.json")
        # From the file in any case: the order in it (by id) is that of every checkpoint's stack.
        return self.with_experts(read_expert_config(file, self.config))

    def choose(self, run: Preparation) -> ExpertConfig:
        """Chooses the tuned experts of a run that was given none."""
        raise NotImplementedError

    def with_experts(self, experts: ExpertConfig) -> Self:
        """Returns the method with these tuned experts."""
        method = copy.copy(self)
        method._settle(experts)
        return method

    def _settle(self, experts: ExpertConfig) -> None:
        # The router is one of the modules that are not experts.
        self.experts, self.router_trains = experts, experts.non_expert_modules

    @property
    def _tuned(self) -> ExpertConfig:
        if self.experts is None:
            raise ValueError("the method has no tuned experts yet: prepare it first")
        return self.experts

    def assuming(self, experts_per_layer: int) -> tuple[Self, int | None]:
        if self.experts:
            return self, None
        number = min(experts_per_layer, self.config.num_experts)
        first = ((tuple(range(number)),) * self.config.num_layers,)
        return self.with_experts(ExpertConfig(*first)), number

    def added_parameters(self, base: Base) -> Mapping[str, jax.Array | np.ndarray]:
        if base.source is None:
            return stack_tuned(base.parameters, self._tuned.experts)
        return load_tuned(base.source, self._tuned.experts)


class Esft(TunedExpertsMethod):
    """ESFT: the tuned experts are those that hold most of a layer's score on the task."""

    score: str
    """The score to choose by: "gate" or "token" (`olmoe_jax.methods.scoring`)."""
    top_p: float
    """The share of a layer's score to reach where method.esft_top_p is none (the paper's)."""

    def choose(self, run: Preparation) -> ExpertConfig:
        """Scores the base's experts on the training data; writes scores.json and scores.png."""
        dtype = run.settings.compute_dtype
        if run.source:
            parameters = load_parameters(run.source, run.mesh, lambda name: dtype)
        else:
            drawn = random_parameters(
                self.config, run.settings, run.seed, run.mesh, lambda name: True
            )
            parameters = jax.tree.map(lambda value: jnp.asarray(value, dtype), drawn)
        scores, tokens = expert_scores(
            graph_of(self.config, run.settings),
            parameters,
            self.config,
            run.mesh,
            run.dataset,
            max_tokens=self.options.esft_score_tokens,
            seed=run.seed,
            layout=run.layout,
        )
        experts = select(scores[self.score], self.options.esft_top_p or self.top_p)
        if distributed.is_writer():
            directory.write_json(run.output / "scores.json", scores_to_json(scores))
            maps = {f"{name} score": score for name, score in scores.items()}
            heat_maps(maps, run.output / "scores.png")
            chosen = sum(map(len, experts.experts))
            total = self.config.num_layers * self.config.num_experts
            print(
                f"ESFT: scored {tokens:,} tokens, chose {chosen} of {total} experts; "
                f"see {run.output}/{EXPERTS}"
            )
        return experts


class EsftGate(Esft):
    """Chooses by the mean probability that the router gives an expert."""

    score = "gate"
    top_p = 0.1


class EsftToken(Esft):
    """Chooses by the share of the tokens that use an expert."""

    score = "token"
    top_p = 0.2
