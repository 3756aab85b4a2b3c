"""A task: its rows as prompts, its post-processing, its scores."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from eval.statistics import Metric, mean_metric
from olmoe_jax.data.reading import Row, read_rows
from olmoe_jax.errors import UserError
from olmoe_jax.files import validate


@dataclass(frozen=True)
class Example:
    """A row of a task: id in the results, prompt, and the reference for the scores."""

    id: str
    prompt: str
    reference: Any


@dataclass(frozen=True)
class Prediction:
    """One sample for an example: the model's text, and the answer that post-processing found."""

    example: Example
    output: str
    answer: Any


RunPrograms = Callable[..., list[str | None]]
"""Runs (program, tests) pairs in the sandbox, under limits named in keywords. Returns for each why
it failed, None if it passed."""
Judging = Callable[[str, Sequence[Prediction]], tuple[list[float | None], dict[str, Any]]]
"""Asks the judge about a task's predictions. Returns a score (0 to 1) for each, None if the judge
gave none, and counts to report."""


@dataclass(frozen=True)
class Tools:
    """Tools that some scorers need besides the predictions."""

    run_programs: RunPrograms | None = None  # None: running code was not allowed
    judge: Judging | None = None  # None: no judge was named


@dataclass(frozen=True)
class Scores:
    """A task's metrics, main one first, each prediction's own scores, and counts to report."""

    metrics: dict[str, Metric]
    rows: list[dict[str, Any]]
    counts: dict[str, Any] = field(default_factory=dict)


def exact_match(right: Iterable[bool], **counts: int) -> Scores:
    """Returns the scores of rows that are right or wrong."""
    scores = list(map(float, right))
    rows = [{"exact_match": score} for score in scores]
    return Scores({"exact_match": mean_metric(scores)}, rows, counts)


class Task:
    """Base of the tasks. Flags override what says how the model decodes."""

    name: ClassVar[str]  # for --tasks and the output directory
    local_file: ClassVar[str]  # below --data, where the hub's paths are found too (`local_path`)
    hub: ClassVar[tuple[tuple[str, str], ...]]  # (source of `read_rows`, split), one after another
    row: ClassVar[type]  # a dataclass, the fields that a row must have
    protocol: ClassVar[str] = "ours"  # whose rules these are
    dtype: ClassVar[str] = "float32"  # in which the model computes
    max_new_tokens: ClassVar[int] = 512
    temperature: ClassVar[float] = 0.0
    top_p: ClassVar[float] = 1.0
    top_k: ClassVar[int] = 0
    stop: ClassVar[tuple[str, ...]] = ()  # an output ends before the first of these
    sampled: ClassVar[bool] = False  # --samples applies; else a row has one sample
    runs_code: ClassVar[bool] = False  # scoring needs `Tools.run_programs`

    def examples(self, rows: Iterable[tuple[str, Row]]) -> list[Example]:
        """Returns the examples of the rows of `read_rows`, in the rows' order.

        Raises:
          UserError: a row lacks a field, or a field is wrong.
        """
        names = [field.name for field in dataclasses.fields(self.row)]
        return self.examples_of(
            [
                validate(self.row, {name: row[name] for name in names if name in row}, place)
                for place, row in rows
            ]
        )

    def examples_of(self, rows: Sequence[Any]) -> list[Example]:
        """Returns the examples of rows of the type `row`."""
        raise NotImplementedError

    def shorten(self, prompt: str) -> str | None:
        """Returns the prompt without its oldest solved example; None if the prompt has none."""
        return None

    def answer(self, output: str) -> Any:
        """Returns the part of the model's text that is scored: a JSON value. Never raises."""
        raise NotImplementedError

    def score(self, predictions: Sequence[Prediction], tools: Tools) -> Scores:
        """Scores predictions, in which the samples of an example stand together."""
        raise NotImplementedError


def local_path(data: Path, name: str, source: str) -> Path:
    """Returns the path of a data file below the directory `data`.

    Args:
      data: the directory.
      name: the file's path in this project's layout, also returned where there is no file.
      source: the file on the hub, OWNER/REPOSITORY:FILE. Its path may be REPOSITORY/FILE or
        OWNER/REPOSITORY/FILE, as a download leaves it.
    """
    path = source.replace(":", "/")
    places = [data / name, data / path.partition("/")[2], data / path]
    return next(filter(Path.is_file, places), places[0])


def source_of(task: Task, data: str | None) -> tuple[str, Path | None]:
    """Returns where a task's rows come from: the hub's name or ours, and the local file if any.

    Raises:
      UserError: the directory `data` has no file for the task.
    """
    hub = task.hub[0][0]
    if data is None:
        return hub, None
    path, own = local_path(Path(data), task.local_file, hub), Path(data) / task.local_file
    if not path.exists():
        raise UserError(
            f"--data {data}: no {task.local_file} there for the task {task.name}; put the file "
            "there, or leave --data out to read the hub"
        )
    return (task.local_file if path == own else hub), path


def read_examples(task: Task, data: str | None) -> list[Example]:
    """Reads a task's examples from the directory `data`, or from the hub.

    Raises:
      UserError: the data is missing or lacks a field.
    """
    _, path = source_of(task, data)
    sources = [(str(path), "train")] if path else task.hub
    return task.examples(row for source, split in sources for row in read_rows(source, split))
