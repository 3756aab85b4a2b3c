"""Evaluations as the report reads them: the directories that `eval.run` wrote."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NotRequired

import pydantic
from typing_extensions import TypedDict

from eval.evaluation import MODEL, RESULT, ROWS, SETTINGS
from eval.tasks import TASKS
from olmoe_jax.errors import UserError
from olmoe_jax.files import STRICT, read_json, read_json_lines


def _scalar(value: Any) -> Any:
    if isinstance(value, dict | list):
        raise ValueError("is a list or an object; it must be text, a number, true, false or null")
    return value


Setting = Annotated[Any, pydantic.AfterValidator(_scalar)]
# Rounding leaves sacrebleu's best score a little above 100.
_Percent = Annotated[float, pydantic.Field(ge=-0.001, le=100.001)]
_Share = Annotated[float, pydantic.Field(ge=-0.00001, le=1.00001)]


@dataclass(frozen=True)
class Metric:
    """A task's score with its 95% interval, whose bounds are None where nothing varies.

    A share is in percent, and its rows' scores are 0 to 1. What is no share, as some of lm_eval's
    metrics, has the unit of its rows' scores.
    """

    value: _Percent
    low: _Percent | None
    high: _Percent | None
    higher_is_better: bool = True
    is_share: bool = True


@dataclass(frozen=True)
class Row:
    """A sample of a row, with its scores by name."""

    prompt: str
    output: str
    reference: Any
    scores: dict[str, float]


@dataclass(frozen=True)
class Result:
    """One evaluated task."""

    path: Path  # the task's directory, or lm_eval's file of results
    settings: Mapping[str, Setting]  # what was asked; `data` is a hash of the rows
    metrics: Mapping[str, Metric]  # by name, the main metric first
    rows: Mapping[str, list[Row]] = field(repr=False)  # {row id: its samples}


@pydantic.with_config(STRICT)
@dataclass(frozen=True)
class Model:
    """The fields that name an evaluated model, and say how it computed."""

    model: Annotated[str, pydantic.Field(min_length=1)]
    adapter: str | None = None
    backend: str | None = None
    compute_dtype: str | None = None
    tokenizer: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """The evaluated tasks of one model."""

    path: Path
    model: Model
    results: dict[str, Result]  # {task: result}
    unfinished: list[Path]  # directories of tasks that were begun and have no result yet


def read_evaluation(path: Path) -> Evaluation:
    """Reads a directory that `eval.run` wrote.

    Raises:
      UserError: a file is damaged.
    """
    found = Evaluation(path, read_json(Model, path / MODEL), {}, [])
    for task in TASKS:
        if (path / task / RESULT).exists():
            found.results[task] = _result(path / task)
        elif (path / task / SETTINGS).exists():
            found.unfinished.append(path / task)
    return found


@pydantic.with_config(STRICT)
@dataclass(frozen=True)
class _Stored:
    """The content of result.json."""

    settings: dict[str, Setting]
    metrics: dict[str, Metric]


@pydantic.with_config(STRICT)
class _Line(TypedDict, extra_items=_Share | None):
    """A line of rows.jsonl; what is not declared is a score."""

    id: str
    prompt: str
    output: str
    answer: Any
    reference: Any
    failure: NotRequired[Any]


def _result(path: Path) -> Result:
    try:
        stored = read_json(_Stored, path / RESULT)
        rows: dict[str, list[Row]] = {}
        for line in read_json_lines(_Line, path / ROWS):
            scores = {
                name: value
                for name, value in line.items()
                if name not in _Line.__annotations__ and value is not None
            }
            row = Row(line["prompt"], line["output"], line["reference"], scores)
            rows.setdefault(line["id"], []).append(row)
    except UserError as error:
        raise UserError(f"{error}; the same eval.run command writes the file again") from None
    return Result(path, stored.settings, stored.metrics, rows)
