"""Selection of the tuned experts by their scores, and the files of scores.

scores.json: {"gate_scores": {"1": {"0": x, …}, …}, "token_scores": …}. The keys of the layers count
from 1, the keys of the experts from 0. Shapes: L layers, E experts.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pydantic

from olmoe_jax.checkpoints import directory
from olmoe_jax.checkpoints.expert_config import ExpertConfig
from olmoe_jax.errors import UserError
from olmoe_jax.files import STRICT, read_json
from olmoe_jax.plots import heat_maps

FUNCTIONS = ("gate", "token")
Normalization = Literal["within_layer", "across_layers"]

_ROUNDED = 5e-5
"""The rounding error of a score in a published file, which has four decimals."""


_Table = dict[str, dict[str, Annotated[float, pydantic.Field(ge=0, le=1e30)]]]


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True)
class _Scores:
    """The content of a scores file."""

    gate_scores: _Table | None = None
    token_scores: _Table | None = None


def read_scores(file: Path, function: str) -> np.ndarray:
    """Reads the scores [L, E] float64 of `function`, "gate" or "token", from a scores file.

    Raises:
      UserError: the file lacks these scores, a layer or an expert, or a score is not a number from
        0 up.
    """
    name = f"{function}_scores"
    table = getattr(read_json(_Scores, file), name)
    if not table:
        raise UserError(f'{file}: has no "{name}"; make one with olmoe_jax.esft score')
    layers = [str(layer + 1) for layer in range(len(table))]
    for layer in layers:
        if layer not in table:
            raise UserError(
                f'{file}: "{name}" lacks layer {layer} (layers count from 1); score the model '
                "again with olmoe_jax.esft score"
            )
    experts = [str(expert) for expert in range(max(1, len(table["1"])))]
    for layer in layers:
        if table[layer].keys() != set(experts):
            raise UserError(
                f'{file}: "{name}" layer {layer} needs a number for each expert, "0" to '
                f'"{experts[-1]}" as in layer 1, and no others'
            )
    return np.array([[table[layer][expert] for expert in experts] for layer in layers])


def write_scores(scores: Mapping[str, np.ndarray], folder: Path) -> None:
    """Writes scores.json and scores.png, a picture of it. scores: function -> [L, E]."""
    directory.write_json(folder / "scores.json", scores_to_json(scores))
    maps = {f"{function} score": values for function, values in scores.items()}
    heat_maps(maps, folder / "scores.png")


def scores_to_json(scores: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the content of a scores file. scores: function -> [L, E]."""
    return {
        f"{function}_scores": {
            str(layer + 1): {str(expert): float(score) for expert, score in enumerate(row)}
            for layer, row in enumerate(values)
        }
        for function, values in scores.items()
    }


def select(
    scores: np.ndarray, top_p: float, normalization: Normalization = "within_layer"
) -> ExpertConfig:
    """Selects experts of each layer by descending score until their sum reaches `top_p`.

    Args:
      scores: [L, E], non-negative.
      top_p: the share of a layer's score to reach.
      normalization: "within_layer": a layer's scores sum to 1. "across_layers" reproduces the
        scripts published with ESFT for OLMoE: an expert's scores sum to 1 over the layers, and
        layer l gets the experts selected for layer l + 1 (the last layer those of the first).
    """
    tuned = []
    for row in _normalized(scores, normalization):
        order = np.argsort(-row, kind="stable")
        # One more than the experts whose running sum lies below top_p.
        count = np.searchsorted(np.cumsum(row[order]), top_p) + 1
        tuned.append(tuple(order[:count].tolist()))
    return ExpertConfig(tuple(tuned))


def _normalized(scores: np.ndarray, normalization: Normalization) -> np.ndarray:
    """Returns the scores of `select` [L, E], each layer or each expert divided by its sum."""
    if normalization == "across_layers":
        total = scores.sum(axis=0, keepdims=True)
        shares = np.divide(scores, total, out=np.zeros_like(scores), where=total > 0)
        return np.round(np.roll(shares, -1, axis=0), 4)
    total = scores.sum(axis=1, keepdims=True)
    # Scores that are normalised and rounded already stay as they are: else ties break differently.
    total = np.where(np.abs(total - 1) <= _ROUNDED * scores.shape[1], 1.0, total)
    return np.divide(scores, total, out=np.zeros_like(scores), where=total > 0)
