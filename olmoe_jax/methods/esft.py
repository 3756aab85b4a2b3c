"""ESFT, expert-specialised fine-tuning (https://arxiv.org/abs/2407.01906): few experts train.

The tuned experts of each layer are given (method.experts_path), or chosen by their score on the
run's training data.
"""

import jax
import jax.numpy as jnp

from olmoe_jax.checkpoints.expert_config import ExpertConfig
from olmoe_jax.checkpoints.loading import load_parameters, random_parameters
from olmoe_jax.config import MethodOptions
from olmoe_jax.errors import UserError
from olmoe_jax.methods.expert_tuning import ExpertTuning
from olmoe_jax.methods.method import Preparation
from olmoe_jax.methods.scoring import expert_scores
from olmoe_jax.methods.selection import select, write_scores
from olmoe_jax.model.config import ModelConfig
from olmoe_jax.model.decoder import graph_of
from olmoe_jax.parallel import distributed


class Esft(ExpertTuning):
    """ESFT: the tuned experts are those that hold most of a layer's score on the task."""

    score: str
    """The score to choose by: "gate" or "token" (`olmoe_jax.methods.scoring`)."""
    top_p: float
    """The share of a layer's score to reach where method.esft_top_p is none (the paper's)."""

    def __init__(self, options: MethodOptions, config: ModelConfig):
        super().__init__(options, config)
        self.trains_head = options.esft_train_head
        self.dense_router_gradient = options.esft_densemixer
        if self.experts and self.experts.non_expert_modules and not self.trains_head:
            raise UserError(
                f"method.esft_train_head=false: {options.experts_path} says non_expert_modules, "
                "which trains the head too; write method.esft_train_head=true, or false in the file"
            )

    def choose_by_data(self, run: Preparation) -> ExpertConfig:
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
            write_scores(scores, run.output)
            print(f"ESFT: scored the experts on {tokens:,} tokens; see {run.output}/scores.png")
        return experts


class EsftGate(Esft):
    """Chooses by the mean probability that the router gives an expert."""

    score = "gate"
    top_p = 0.1


class EsftToken(Esft):
    """Chooses by the share of the tokens that give an expert a probability of 0.01 or more."""

    score = "token"
    top_p = 0.2
