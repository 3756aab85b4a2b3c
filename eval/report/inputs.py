"""What a report is made of: the evaluations and training runs in the directories it is given.

A row of the report is a method. An evaluation belongs to the training run that holds its directory,
or whose directory (or export in it) its model.json names, as the adapter or else the model, and has
that run's method; the base model of a run is "base", any other model the name of the evaluation's
directory. NAME=DIR names it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.table import DATASETS, METHODS
from eval.evaluation import MODEL, RESULT, ROWS, SETTINGS
from eval.tasks import HARNESS_DIRECTORY, TASKS
from olmoe_jax.checkpoints import directory
from olmoe_jax.config import ModelOptions
from olmoe_jax.errors import UserError
from olmoe_jax.training.run_directory import CONFIG, METRICS, read_metrics

BASE = "base"


@dataclass(frozen=True)
class TrainingRun:
    """A train.output_dir.

    data: a short name of the data set; metrics: the lines of metrics.jsonl; scores: the picture of
    the experts' scores by which an ESFT run selected.
    """

    path: Path
    method: str
    data: str
    base: str
    metrics: list[dict[str, Any]] = field(repr=False)
    scores: Path | None = None


@dataclass(frozen=True)
class Result:
    """One evaluated task: where it is, its result.json, and {row id: its samples' scores}."""

    path: Path
    model: Mapping[str, str]
    settings: Mapping[str, Any]
    metrics: Mapping[str, Mapping[str, float]]
    rows: Mapping[str, list[dict[str, Any]]] = field(repr=False)


@dataclass(frozen=True)
class Inputs:
    """All of a report.

    runs: (name of the method, run) pairs; results: {task: {name of the method: result}};
    unfinished: directories of tasks that were begun and have no result yet.
    """

    runs: list[tuple[str, TrainingRun]]
    results: dict[str, dict[str, Result]]
    unfinished: list[Path]

    @property
    def methods(self) -> list[str]:
        """The names that have results: the base first, then in the order of the configs' table."""
        order = {name: place for place, name in enumerate((BASE, *METHODS))}
        found = dict.fromkeys(name for column in self.results.values() for name in column)
        return sorted(found, key=lambda name: order.get(name, len(order)))


def read_inputs(arguments: Sequence[str]) -> Inputs:
    """Everything in the directories that the arguments (DIR or NAME=DIR) name.

    Raises:
      UserError: a directory is neither an evaluation nor a training run, a file in it is damaged,
        or two evaluations would fill the same cell.
    """
    runs: dict[Path, tuple[str | None, TrainingRun]] = {}
    evaluations: dict[Path, str | None] = {}
    for argument in arguments:
        name, path = _split(argument)
        if is_evaluation(path):
            evaluations.setdefault(path.resolve(), name)
        elif is_run(path):
            runs.setdefault(path.resolve(), (name, open_run(path)))
            for inner in sorted(path.glob(f"*/{MODEL}")):
                if is_evaluation(inner.parent):
                    evaluations.setdefault(inner.parent.resolve(), name)
        else:
            raise UserError(
                f"{path}: neither an evaluation (no {MODEL}) nor a training run (no {CONFIG} of "
                f"one); write a directory that eval.run or train.py wrote"
            )
    models = {path: _model(path) for path in evaluations}
    for path, model in models.items():
        if (run := _run_of(path, model)) and run.resolve() not in runs:
            runs[run.resolve()] = (None, open_run(run))
    bases = {ModelOptions().path, *(run.base for _, run in runs.values())}
    inputs = Inputs([(name or run.method, run) for name, run in runs.values()], {}, [])
    for path, name in evaluations.items():
        _add(inputs, path, models[path], name or _name(path, models[path], runs, bases))
    return inputs


def is_evaluation(path: Path) -> bool:
    """Whether eval.run wrote this directory."""
    return (path / MODEL).is_file()


def is_run(path: Path) -> bool:
    """Whether train.py wrote this directory; a Hugging Face checkpoint has a config.json too."""
    file = path / CONFIG
    return file.is_file() and {"method", "train"} <= directory.read_json(file).keys()


def open_run(path: Path) -> TrainingRun:
    """Reads a training run's directory.

    Raises:
      UserError: its configuration or its metrics are damaged.
    """
    config = directory.read_json(path / CONFIG)
    try:
        method, lora = config["method"]["name"], config["method"]["lora_rank"]
        data, base = config["data"]["train_path"], config["model"]["path"]
        metrics = read_metrics(path)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: {CONFIG} or {METRICS} is damaged ({type(error).__name__}: {error}); bring it "
            "back, or leave the run out"
        ) from None
    name = f"{method}_lora" if lora else method
    # Of its own, or beside the expert config that it was given.
    given = config["method"].get("experts_path")
    places = [path, *([Path(given).parent] if given else [])]
    scores = next((p / "scores.png" for p in places if (p / "scores.png").exists()), None)
    return TrainingRun(path, name, data_name(data), base, metrics, scores)


def data_name(train_path: str) -> str:
    """A short name of a data set: the table's, or that of its file (of train.*: its folder)."""
    for name, dataset in DATASETS.items():
        if train_path.partition(":")[0] == dataset.hub_id:
            return name
    file = Path(train_path.rpartition(":")[2])
    return file.parent.name if file.stem == "train" and file.parent.name else file.stem


def _split(argument: str) -> tuple[str | None, Path]:
    name, equals, path = argument.partition("=")
    if Path(argument).exists() or not equals:
        name, path = "", argument
    elif not name:
        raise UserError(f"{argument}: the name before = is empty; write NAME=DIR, or DIR alone")
    if not Path(path).is_dir():
        raise UserError(
            f"{path}: no such directory; write one that eval.run or train.py wrote, or NAME=DIR"
        )
    return name or None, Path(path)


def _model(evaluation: Path) -> dict[str, Any]:
    model = directory.read_json(evaluation / MODEL)
    if not isinstance(model.get("model"), str):
        raise UserError(f"{evaluation / MODEL}: names no model; it is not a file of eval.run")
    return model


def _run_of(evaluation: Path, model: Mapping[str, str]) -> Path | None:
    """The directory of the training run that made an evaluation's model, if it is there.

    Of a model with an adapter, the run that made the adapter.
    """
    named = Path(model.get("adapter") or model["model"])
    # Where the model is not (any more), the evaluation may have been moved together with its run.
    for place in (named, named.parent) if named.exists() else (evaluation.parent,):
        if is_run(place):
            return place
    return None


def _name(path: Path, model: Mapping[str, str], runs: Mapping, bases: set[str]) -> str:
    if run := _run_of(path, model):
        name, opened = runs[run.resolve()]
        return name or opened.method
    is_base = model["model"] in bases and not model.get("adapter")
    return BASE if is_base else path.name


def _add(inputs: Inputs, evaluation: Path, model: Mapping[str, str], name: str) -> None:
    """Puts an evaluation's tasks into the table."""
    harness = sorted(path.name for path in evaluation.glob(f"{HARNESS_DIRECTORY}*"))
    for task in (*TASKS, *harness):
        path = evaluation / task
        if not (path / RESULT).exists():
            if (path / SETTINGS).exists():
                inputs.unfinished.append(path)
            continue
        column = inputs.results.setdefault(task, {})
        if name in column:
            raise UserError(
                f"{column[name].path} and {path} both are {task} of {name}; name one of them, e.g. "
                f"{name}_2={evaluation}, or leave one out"
            )
        column[name] = _result(path, model)


def _result(path: Path, model: Mapping[str, str]) -> Result:
    stored = directory.read_json(path / RESULT)
    try:
        rows: dict[str, list[dict]] = {}
        with open(path / ROWS, encoding="utf-8") as file:
            for row in map(json.loads, file):
                rows.setdefault(row["id"], []).append(row)
        metrics = {
            name: {key: float(metric[key]) for key in ("value", "low", "high", "rows")}
            | {"higher_is_better": bool(metric.get("higher_is_better", True))}
            for name, metric in stored["metrics"].items()
        }
        return Result(path, model, stored["settings"], metrics, rows)
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: {RESULT} or {ROWS} is damaged ({type(error).__name__}: {error}); the same "
            "eval.run command writes them again"
        ) from None
