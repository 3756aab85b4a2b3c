"""Expert scores -> the experts to train, and the two JSON files that hold them.

Scores: {"gate_scores": {"1": {"0": x, …}, …}, "token_scores": …}; expert config: {"experts": {"1":
[ids…], …}, "shared_experts": false, "non_expert_modules": false}. Layer keys count from 1.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from olmoe_jax.checkpoints import directory
from olmoe_jax.checkpoints.expert_config import ExpertConfig
from olmoe_jax.errors import UserError

FUNCTIONS = ("gate", "token")
Normalization = Literal["within_layer", "across_layers"]

_ROUNDED = 5e-5
"""Scores in published files have four decimals."""


def read_scores(file: Path, function: str) -> np.ndarray:
    """The scores [L, E] of a scores file for "gate" or "token".

    Raises:
      UserError: the file has none, or layers or experts are missing.
    """
    content = directory.read_json(file)
    table = content.get(f"{function}_scores")
    if not isinstance(table, dict) or not table:
        raise UserError(f'{file}: has no "{function}_scores"; make one with olmoe_jax.esft score')
    layers = [str(layer + 1) for layer in range(len(table))]
    for layer in layers:
        if layer not in table:
            raise UserError(
                f'{file}: "{function}_scores" lacks layer {layer} (layers count from 1); score the '
                "model again with olmoe_jax.esft score"
            )
    first = table["1"]
    experts = [str(expert) for expert in range(len(first) if isinstance(first, dict) else 0)]
    for layer in layers:
        row = table[layer]
        if not experts or not isinstance(row, dict) or set(row) != set(experts):
            raise UserError(
                f'{file}: "{function}_scores" layer {layer} needs a number for each expert, "0" '
                f'to "{max(len(experts), 1) - 1}" as in layer 1, and no others'
            )
        for expert, score in row.items():
            number = isinstance(score, int | float) and not isinstance(score, bool)
            if not (number and 0 <= score < math.inf):
                raise UserError(
                    f'{file}: "{function}_scores" layer {layer} expert {expert} is {score}; '
                    "scores are numbers from 0 up"
                )
    return np.array([[float(table[layer][expert]) for expert in experts] for layer in layers])


def scores_to_json(scores: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """{"gate_scores": …, "token_scores": …} of arrays [L, E] by function."""
    return {
        f"{function}_scores": {
            str(layer + 1): {str(expert): float(score) for expert, score in enumerate(row)}
            for layer, row in enumerate(values)
        }
        for function, values in scores.items()
    }


def check_top_p(top_p: float, name: str) -> None:
    """Raises a UserError for a share of a layer's score that makes no sense.

    Rounded scores may sum to a little less or more than 1, so up to 1.1 is accepted: it selects
    every expert whatever the rounding, as the published scripts are used.
    """
    if not 0 < top_p <= 1.1:
        raise UserError(f"{name}={top_p}: must be above 0 and at most 1; write e.g. 0.2")


def select(
    scores: np.ndarray, top_p: float, normalization: Normalization = "within_layer"
) -> ExpertConfig:
    """Per layer, experts by descending score until the running sum reaches `top_p`.

    Args:
      scores: [L, E], non-negative.
      top_p: share of a layer's score.
      normalization: "within_layer": a layer's scores sum to 1. "across_layers" reproduces the
        scripts published with ESFT for OLMoE: an expert's scores sum to 1 over the layers, and
        layer l gets the choice of layer l + 1 (the last one the first's).
    """
    scores = _normalized(scores, normalization)
    chosen = []
    for row in scores:
        order = sorted(range(len(row)), key=lambda expert: -row[expert])
        total, ids = 0.0, []
        for expert in order:
            if total >= top_p:
                break
            ids.append(expert)
            total += row[expert]
        chosen.append(tuple(ids))
    return ExpertConfig(tuple(chosen))


def _normalized(scores: np.ndarray, normalization: Normalization) -> np.ndarray:
    if normalization == "across_layers":
        total = scores.sum(axis=0, keepdims=True)
        shares = np.divide(scores, total, out=np.zeros_like(scores), where=total > 0)
        return np.round(np.roll(shares, -1, axis=0), 4)
    total = scores.sum(axis=1, keepdims=True)
    # What was normalised and rounded already stays as it is, or ties would break another way.
    total = np.where(np.abs(total - 1) <= _ROUNDED * scores.shape[1], 1.0, total)
    return np.divide(scores, total, out=np.zeros_like(scores), where=total > 0)
