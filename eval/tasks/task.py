"""What a task is: its rows as prompts, its post-processing, its scores."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from eval.statistics import Metric
from olmoe_jax.data.reading import read_rows
from olmoe_jax.errors import UserError


@dataclass(frozen=True)
class Example:
    """A row: its name in the results, what the model reads, what scoring compares with."""

    id: str
    prompt: str
    reference: Any


@dataclass(frozen=True)
class Prediction:
    """One sample for an example: the model's text, and what post-processing made of it."""

    example: Example
    output: str
    answer: Any


@dataclass(frozen=True)
class Tools:
    """What some scorers need besides the predictions.

    run_programs: runs (program, tests) pairs in the sandbox and returns for each why it failed, or
      None when it passed; None when running code was not allowed.
    judge: asks the judge about (task, prediction) pairs and returns a score (0 to 1) for each, or
      None where there is none, with counts to report; None when no judge was named.
    """

    run_programs: Callable[[Sequence[tuple[str, str]]], list[str | None]] | None = None
    judge: Callable[[str, Sequence[Prediction]], tuple[list[float | None], dict]] | None = None


@dataclass(frozen=True)
class Scores:
    """A task's metrics, main one first, each prediction's own scores, and counts to report."""

    metrics: dict[str, Metric]
    rows: list[dict[str, Any]]
    counts: dict[str, Any] = field(default_factory=dict)


class Task:
    """Base of the tasks. Greedy decoding, one sample a row, unless `sampled`."""

    name: ClassVar[str]
    local_file: ClassVar[str]
    """Path under --data."""
    hub: ClassVar[tuple[tuple[str, str], ...]]
    """(what `read_rows` takes, split) on the hub; several are read one after the other."""
    fields: ClassVar[tuple[str, ...]]
    """That every row must have."""
    max_new_tokens: ClassVar[int] = 512
    stop: ClassVar[tuple[str, ...]] = ()
    """The output ends before the first of these."""
    sampled: ClassVar[bool] = False
    """Whether --samples and --temperature apply."""
    runs_code: ClassVar[bool] = False

    def examples(self, rows: Sequence[dict[str, Any]]) -> list[Example]:
        """The examples of a data set's rows, in their order."""
        raise NotImplementedError

    def shorten(self, prompt: str) -> str | None:
        """The prompt with less of its context, for models that it is too long for; None: cannot."""
        return None

    def answer(self, output: str) -> Any:
        """What is scored of the model's text. JSON-serialisable; never raises."""
        raise NotImplementedError

    def score(self, predictions: Sequence[Prediction], tools: Tools) -> Scores:
        """Scores predictions, those of one example beside each other."""
        raise NotImplementedError


def read_examples(task: Task, data: str | None) -> list[Example]:
    """A task's examples from the directory `data`, or from the hub.

    Raises:
      UserError: the data is missing or lacks a field.
    """
    if data:
        path = os.path.join(data, task.local_file)
        if not os.path.exists(path):
            raise UserError(
                f"--data {data}: no {task.local_file} there for the task {task.name}; put the file "
                "there, or leave --data out to read the hub"
            )
        sources = [(path, "train")]
    else:
        path, sources = task.hub[0][0], task.hub
    rows = [row for source, split in sources for row in read_rows(source, split)]
    for number, row in enumerate(rows, 1):
        missing = [name for name in task.fields if name not in row]
        if missing:
            raise UserError(
                f"{path}: row {number} has no field {missing[0]!r}; the task {task.name} reads "
                f"rows with {', '.join(task.fields)}"
            )
    return task.examples(rows)
