"""The best checkpoint of a run, by train.best_metric.

A checkpoint that was the best when the run saved it has {METRIC: value, "score": the value, or
minus the value where low is best} beside it. The others have nothing.
"""

import math
from collections.abc import Mapping
from pathlib import Path

from olmoe_jax.checkpoints import opening
from olmoe_jax.checkpoints.opening import CHECKPOINTS
from olmoe_jax.config import TrainOptions
from olmoe_jax.errors import UserError
from olmoe_jax.files import read_json

_SIGN = {"eval_loss": -1, "exact_match": 1}


def score_of(metrics: Mapping[str, float]) -> float:
    """Returns how good a checkpoint is; more is better."""
    # Before train.best_metric existed, runs kept the eval loss alone.
    return metrics["score"] if "score" in metrics else -metrics["eval_loss"]


class Best:
    """The best number of a run so far, by train.best_metric."""

    def __init__(self, options: TrainOptions):
        self._metric = options.best_metric
        self.score = -math.inf
        """The best score so far; a continued run sets it."""

    def improvement(self, found: Mapping[str, float]) -> dict[str, float] | None:
        """Returns what to keep with the checkpoint if an evaluation found a new best, else None.

        Of equal numbers the first is the best. A number that is missing or not finite is not.
        """
        value = found.get(self._metric)
        if value is None or not math.isfinite(value):
            return None
        score = _SIGN[self._metric] * value
        if score <= self.score:
            return None
        self.score = score
        return {self._metric: value, "score": score}


def best_step(run: Path) -> int:
    """Returns the step of a run's best checkpoint.

    Raises:
      UserError: none of its checkpoints was ever evaluated.
    """
    scores = {
        step: score_of(read_json(dict[str, float], file))
        for step in opening.steps(run)
        if (file := run / CHECKPOINTS / str(step) / "metrics" / "metrics").exists()
        and opening.step_damage(run, step, folder="metrics/") is None
    }
    if not scores:
        raise UserError(
            f"{run}: no checkpoint with an evaluation, so none is the best; write a step, or train "
            "with data.eval_path or data.eval_fraction"
        )
    return max(sorted(scores), key=lambda step: scores[step])
