"""The inputs of a report: the evaluations and training runs in the given directories.

A row of the report is a method. An evaluation names its adapter, or else its model. If that is a
training run's directory, or an export in one, the row is the run's method. If that path does not
exist (any more), the run is the one that holds the evaluation's directory, unless this run started
from that model. The base model of a run is "base". Any other model has the name of the evaluation's
directory. NAME=DIR names a row.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pydantic

from configs.table import DATASETS, EXPERIMENTS
from eval.evaluation import MODEL
from eval.report.harness import harness_directories, read_harness
from eval.report.results import Evaluation, Result, read_evaluation
from olmoe_jax.checkpoints.metrics import Metrics, read_metrics
from olmoe_jax.config import ModelOptions
from olmoe_jax.errors import UserError
from olmoe_jax.files import STRICT, absolute, expand, field_at, read_json
from olmoe_jax.sources import parse
from olmoe_jax.training.run_directory import CONFIG

BASE = "base"


@dataclass(frozen=True)
class TrainingRun:
    """A train.output_dir."""

    path: Path
    method: str  # as configs/table.py names it
    data: str  # a short name of the data set
    base: str  # the model from which the run started
    metrics: list[Metrics] = field(repr=False)  # the lines of metrics.jsonl
    scores: Path | None = None  # the picture of the scores by which an ESFT run chose its experts


@dataclass(frozen=True)
class Inputs:
    """Everything that a report shows, by the names of its rows."""

    runs: list[tuple[str, TrainingRun]]
    results: dict[str, dict[str, Result]] = field(default_factory=dict)  # by task, then by row
    evaluations: list[tuple[str, Evaluation]] = field(default_factory=list)
    unfinished: list[Path] = field(default_factory=list)  # of all evaluations

    @property
    def methods(self) -> list[str]:
        """The rows that have results: the base first, then in the order of the configs' table."""
        order = {name: place for place, name in enumerate((BASE, *EXPERIMENTS))}
        found = dict.fromkeys(name for column in self.results.values() for name in column)
        return sorted(found, key=lambda name: order.get(name, len(order)))

    def add(self, evaluation: Evaluation, name: str) -> None:
        """Puts an evaluation's results into the row `name`.

        Raises:
          UserError: the row has a result of one of these tasks already.
        """
        for task, result in evaluation.results.items():
            column = self.results.setdefault(task, {})
            if name in column:
                raise UserError(
                    f"{column[name].path} and {result.path} both are {task} of {name}; name one of "
                    f"them, e.g. {name}_2={evaluation.path}, or leave one out"
                )
            column[name] = result
        if evaluation.results:
            self.evaluations.append((name, evaluation))
        self.unfinished.extend(evaluation.unfinished)


def read_inputs(arguments: Sequence[str]) -> Inputs:
    """Reads everything in the directories that the arguments (DIR or NAME=DIR) name.

    Raises:
      UserError: a directory is neither an evaluation nor a training run, a file in it is damaged,
        or two evaluations would fill the same cell.
    """
    runs: dict[Path, tuple[str | None, TrainingRun]] = {}
    evaluations: dict[Path, tuple[str | None, Evaluation]] = {}
    for argument in arguments:
        name, path = _split(argument)
        found = _evaluations(path)
        if is_run(path):
            runs.setdefault(path.resolve(), (name, open_run(path)))
        elif not found:
            raise UserError(
                f"{path}: neither an evaluation (no {MODEL}, no results of lm_eval) nor a training "
                f"run (no {CONFIG} of one); write a directory that eval.run, lm_eval or train.py "
                "wrote"
            )
        for evaluation in found:
            evaluations.setdefault(evaluation.path, (name, evaluation))
    # Curves of a run whose evaluation alone was named.
    for _, evaluation in evaluations.values():
        if (run := _run_of(evaluation)) and run.resolve() not in runs:
            runs[run.resolve()] = (None, open_run(run))
    bases = {ModelOptions().path, *(absolute(run.base) for _, run in runs.values())}
    inputs = Inputs([(name or run.method, run) for name, run in runs.values()])
    for name, evaluation in evaluations.values():
        inputs.add(evaluation, name or _row_name(evaluation, runs, bases))
    return inputs


def is_run(path: Path) -> bool:
    """Returns whether train.py wrote this directory, and not save_pretrained."""
    file = path / CONFIG
    return file.is_file() and {"method", "train"} <= read_json(dict[str, Any], file).keys()


@pydantic.with_config(STRICT)
@dataclass(frozen=True)
class _Config:
    """The fields of a run's config.json that the report reads."""

    method: Annotated[str, field_at("method", "name")]
    data: Annotated[str, field_at("data", "train_path")]
    base: Annotated[str, field_at("model", "path")]
    lora_rank: Annotated[int | None, field_at("method", "lora_rank")]
    experts_path: Annotated[str | None, field_at("method", "experts_path")] = None


def open_run(path: Path) -> TrainingRun:
    """Reads a training run's directory.

    Raises:
      UserError: its configuration or its metrics are damaged.
    """
    config = read_json(_Config, path / CONFIG)
    name = f"{config.method}_lora" if config.lora_rank else config.method
    # The run scored the experts itself, or was given an expert config that lies beside the picture.
    places = [path, *([Path(config.experts_path).parent] if config.experts_path else [])]
    scores = next((p / "scores.png" for p in places if (p / "scores.png").exists()), None)
    data = data_name(config.data)
    return TrainingRun(path, name, data, config.base, read_metrics(path), scores)


def data_name(train_path: str) -> str:
    """Returns a data set's short name: the table's, or its file's (the folder's of train.*)."""
    sources = parse(train_path)
    if len(sources) > 1:
        return "+".join(data_name(source.path) for source in sources)
    train_path = sources[0].path
    for name, dataset in DATASETS.items():
        if train_path.partition(":")[0] == dataset.hub_id:
            return name
    file = Path(train_path.rpartition(":")[2])
    return file.parent.name if file.stem == "train" and file.parent.name else file.stem


def _split(argument: str) -> tuple[str | None, Path]:
    """Returns name and directory of NAME=DIR or DIR."""
    name, equals, path = argument.partition("=")
    if os.path.exists(argument) or not equals:
        name, path = "", argument
    elif not name:
        raise UserError(f"{argument}: the name before = is empty; write NAME=DIR, or DIR alone")
    path = expand(path)
    if not os.path.isdir(path):
        raise UserError(
            f"{path}: no such directory; write one that eval.run or train.py wrote, or NAME=DIR"
        )
    return name or None, Path(path)


def _evaluations(path: Path) -> list[Evaluation]:
    """Reads the evaluation in a directory, or those directly below it."""
    files = [path / MODEL] if (path / MODEL).is_file() else path.glob(f"*/{MODEL}")
    # lm_eval puts a directory with the model's name between.
    of_harness = harness_directories(path, depth=2 if is_run(path) else 1)
    return [
        *(read_evaluation(file.parent.resolve()) for file in sorted(files)),
        *(read_harness(place.resolve()) for place in of_harness),
    ]


def _run_of(evaluation: Evaluation) -> Path | None:
    """Returns the training run that made the model, or the adapter, if the run is there."""
    named = Path(evaluation.model.adapter or evaluation.model.model)
    if named.exists():
        return next(filter(is_run, (named, named.parent)), None)
    # The evaluation may have been moved together with its run. A base may be a hub id.
    around = filter(is_run, evaluation.path.parents[:2])
    return next((run for run in around if open_run(run).base != str(named)), None)


def _row_name(
    evaluation: Evaluation, runs: Mapping[Path, tuple[str | None, TrainingRun]], bases: set[str]
) -> str:
    if run := _run_of(evaluation):
        name, opened = runs[run.resolve()]
        return name or opened.method
    is_base = absolute(evaluation.model.model) in bases and not evaluation.model.adapter
    return BASE if is_base else evaluation.path.name
