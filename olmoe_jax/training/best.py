"""The best checkpoint of a run, by train.best_metric.

What a checkpoint that was the best when it was saved has beside it: {METRIC: value, "score":
the value, or minus the value where low is best}. Checkpoints that were not have nothing.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from olmoe_jax.checkpoints.opening import CHECKPOINTS
from olmoe_jax.config import TrainOptions
from olmoe_jax.errors import UserError

_MORE_IS_BETTER = ("exact_match", "router_entropy")


def score_of(metrics: Mapping[str, float]) -> float:
    """How good a checkpoint is; more is better."""
    # Before train.best_metric existed, the eval loss alone was kept.
    return metrics["score"] if "score" in metrics else -metrics["eval_loss"]


class Best:
    """Says of a run's numbers whether they are better than all before them.

    Args:
      options: whose best_metric and best_metric_mode count.
    """

    def __init__(self, options: TrainOptions):
        self._metric = options.best_metric
        mode = options.best_metric_mode
        mode = mode or ("max" if self._metric in _MORE_IS_BETTER else "min")
        self._sign = 1 if mode == "max" else -1
        self.score = -math.inf
        """Of the best so far; a continued run sets it."""

    def improvement(self, logged: Mapping[str, float | None]) -> dict[str, float] | None:
        """What to keep with the checkpoint if these numbers are the best so far; else None.

        Of equal ones the first is the best. A number that is missing or not finite is not.
        """
        value = logged.get(self._metric)
        if value is None or not math.isfinite(value) or self._sign * value <= self.score:
            return None
        self.score = self._sign * value
        return {self._metric: value, "score": self.score}


def best_step(run: Path) -> int:
    """The step of a run's best checkpoint.

    Raises:
      UserError: none of its checkpoints was ever evaluated.
    """
    scores = {
        int(file.parent.parent.name): score_of(json.loads(file.read_text()))
        for file in (run / CHECKPOINTS).glob("[0-9]*/metrics/metrics")
    }
    if not scores:
        raise UserError(
            f"{run}: no checkpoint with an evaluation, so none is the best; write a step, or train "
            "with data.eval_path or data.eval_fraction"
        )
    return max(sorted(scores), key=scores.get)
