"""Evaluations as the report reads them: the directories that `eval.run` wrote."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.evaluation import MODEL, RESULT, ROWS, SETTINGS
from eval.tasks import TASKS
from olmoe_jax.errors import UserError
from olmoe_jax.files import read_json


@dataclass(frozen=True)
class Result:
    """One evaluated task.

    Attributes:
      path: the task's directory, or lm_eval's file of results.
      settings: what was asked; `data` is a hash of the rows.
      metrics: {name: {value, low, high, rows, higher_is_better}}, main metric first, in percent.
      rows: {row id: its samples}, each a dict with prompt, output, reference and scores (0 to 1).
    """

    path: Path
    settings: Mapping[str, Any]
    metrics: Mapping[str, Mapping[str, float]]
    rows: Mapping[str, list[dict[str, Any]]] = field(repr=False)


@dataclass(frozen=True)
class Evaluation:
    """The evaluated tasks of one model.

    Attributes:
      path: the directory.
      model: model, adapter, backend and compute_dtype.
      results: {task: result}.
      unfinished: directories of tasks that were begun and have no result yet.
    """

    path: Path
    model: Mapping[str, str | None]
    results: dict[str, Result]
    unfinished: list[Path]


def is_evaluation(path: Path) -> bool:
    """Returns whether `eval.run` wrote this directory."""
    return (path / MODEL).is_file()


def read_evaluation(path: Path) -> Evaluation:
    """Reads a directory that `eval.run` wrote.

    Raises:
      UserError: a file is damaged.
    """
    model = read_json(dict[str, Any], path / MODEL)
    if not isinstance(model.get("model"), str):
        raise UserError(f"{path / MODEL}: names no model, so eval.run did not write the file")
    found = Evaluation(path, model, {}, [])
    for task in TASKS:
        if (path / task / RESULT).exists():
            found.results[task] = _result(path / task)
        elif (path / task / SETTINGS).exists():
            found.unfinished.append(path / task)
    return found


def _result(path: Path) -> Result:
    stored = read_json(dict[str, Any], path / RESULT)
    try:
        rows: dict[str, list[dict]] = {}
        with open(path / ROWS, encoding="utf-8") as file:
            for row in map(json.loads, file):
                rows.setdefault(row["id"], []).append(row)
        metrics = {
            name: {key: float(metric[key]) for key in ("value", "low", "high", "rows")}
            | {"higher_is_better": True}
            for name, metric in stored["metrics"].items()
        }
        return Result(path, stored["settings"], metrics, rows)
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: {RESULT} or {ROWS} is damaged ({type(error).__name__}: {error}); the same "
            "eval.run command writes them again"
        ) from None
