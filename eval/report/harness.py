"""Evaluations as the report reads them: the directories that lm_eval wrote (--output_path).

PATH/MODEL/results_DATE.json      the metrics of a run's tasks and groups
PATH/MODEL/samples_TASK_DATE.jsonl  the rows of each task (--log_samples)
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypeVar

import pydantic
from typing_extensions import TypedDict

from eval.harness import NAME
from eval.report.results import Evaluation, Metric, Model, Result, Row, Setting
from eval.statistics import wilson
from olmoe_jax.errors import UserError
from olmoe_jax.files import STRICT, FileName, field_at, read_json, read_json_lines

PREFIX = "lm_eval:"
"""The first letters of the tasks' names in the report: lm_eval has a humaneval too."""
_RESULTS = "results_*.json"
_LARGEST = 1e30
"""No metric is larger."""

T = TypeVar("T")
_NotEmpty = Annotated[list[T], pydantic.Field(min_length=1)]
_LogLikelihood = Annotated[float, pydantic.Field(strict=False, allow_inf_nan=True)]
"""A number that lm_eval wrote as text."""


@pydantic.with_config(STRICT)
@dataclass(frozen=True)
class _Stored:
    """The content of a file of results: what the report needs of it."""

    backend: Annotated[str, field_at("config", "model")]
    model: Annotated[str, field_at("config", "model_args", "pretrained", min_length=1)]
    limit: Annotated[float | None, field_at("config", "limit")]
    results: dict[str, dict[str, Any]]
    group_subtasks: dict[str, list[FileName]]
    higher_is_better: dict[str, dict[str, bool | None]]
    n_shot: Annotated[dict[str, Setting], field_at("n-shot")]
    task_hashes: dict[FileName, str]
    lm_eval_version: str
    adapter: Annotated[str | None, field_at("config", "model_args", "peft")] = None
    compute_dtype: Annotated[str, field_at("config", "model_args", "dtype")] = "float32"


class _Request(TypedDict):
    arg_0: str
    arg_1: NotRequired[Any]


@pydantic.with_config(STRICT)
class _Sample(TypedDict, extra_items=Any):
    """A line of a file of samples; its scores have the names in `metrics`."""

    doc_id: int
    arguments: Annotated[dict[str, _Request], pydantic.Field(min_length=1)]
    resps: _NotEmpty[_NotEmpty[str]] | _NotEmpty[_NotEmpty[tuple[_LogLikelihood, Any]]]
    target: str
    filter: str
    metrics: list[str]


def harness_directories(path: Path, depth: int = 1) -> list[Path]:
    """Returns the directories at most `depth` below `path` in which lm_eval wrote results."""
    patterns = ["*/" * below + _RESULTS for below in range(depth + 1)]
    return sorted({file.parent for pattern in patterns for file in path.glob(pattern)})


def read_harness(path: Path) -> Evaluation:
    """Reads a directory that lm_eval wrote; of a task that ran twice the latest result counts.

    Raises:
      UserError: a file is damaged or missing.
    """
    results: dict[str, Result] = {}
    for file in sorted(path.glob(_RESULTS)):
        stored = read_json(_Stored, file)
        results |= {PREFIX + name: _result(file, stored, name) for name in _columns(stored)}
        backend = "jax" if stored.backend == NAME else stored.backend
        model = Model(stored.model, stored.adapter, backend, stored.compute_dtype)
    return Evaluation(path, model, results, [])


def _columns(stored: _Stored) -> list[str]:
    """Returns the tasks and groups with metrics, without those that are in another of them."""
    names = [name for name in stored.results if any(_values(stored, name))]
    hidden = _members(stored, names)
    return [name for name in names if name not in hidden]


def _members(stored: _Stored, names: Iterable[str]) -> Mapping[str, None]:
    """Returns the groups and tasks in groups, at any depth, in their order."""
    found: dict[str, None] = {}
    waiting = [member for name in names for member in stored.group_subtasks.get(name, ())][::-1]
    while waiting:
        if (member := waiting.pop()) not in found:
            found[member] = None
            waiting += stored.group_subtasks.get(member, ())[::-1]
    return found


def _values(stored: _Stored, name: str) -> Iterator[tuple[str, str, float]]:
    """Yields (metric, filter, value) of a task or group."""
    for key, value in stored.results[name].items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr") and _is_number(value):
            yield metric, kind, value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= _LARGEST


def _result(file: Path, stored: _Stored, name: str) -> Result:
    """Returns the metrics and rows of a task, or of a group with the rows of all its tasks.

    A metric whose rows' scores are all between 0 and 1 is a share, in percent; others are as
    lm_eval gives them.
    """
    in_group = [name, *_members(stored, [name])]
    tasks = [task for task in in_group if not stored.group_subtasks.get(task)]
    for task in tasks:
        if task not in stored.task_hashes:
            raise UserError(f"{file}: task_hashes has no {task}; run lm_eval again")
    rows: dict[str, list[Row]] = {}
    for task in tasks:
        for sample in _samples(file, task):
            id_ = str(sample["doc_id"]) if tasks == [name] else f"{task}/{sample['doc_id']}"
            # The samples of a row differ in their filter, and their scores in their names.
            rows.setdefault(id_, [_row(sample)])[0].scores.update(_scores(sample))

    metrics = {}
    for metric, kind, value in _values(stored, name):
        label = _label(metric, kind)
        scores = [row.scores[label] for (row,) in rows.values() if label in row.scores]
        error = stored.results[name].get(f"{metric}_stderr,{kind}")
        # None: the members of a group do not agree.
        higher_is_better = stored.higher_is_better.get(name, {}).get(metric) is not False
        metrics[label] = _metric(value, scores, error, higher_is_better)
    settings = {
        "data": " ".join(stored.task_hashes[task] for task in tasks),
        "limit": None if stored.limit is None else len(rows),
        "fewshot": stored.n_shot.get(tasks[0]) if tasks else None,
        "lm_eval": stored.lm_eval_version,
    }
    return Result(file, settings, metrics, rows)


def _metric(value: float, scores: Sequence[float], error: Any, higher_is_better: bool) -> Metric:
    """Returns a metric with its interval.

    The interval is Wilson's if rows are right or wrong and the metric is their mean, else 1.96 of
    lm_eval's standard errors to both sides, within 0 and 100 of a share.
    """
    is_share = bool(scores) and all(0 <= score <= 1 for score in [value, *scores])
    if is_share and set(scores) <= {0, 1} and math.isclose(value, sum(scores) / len(scores)):
        return Metric(100 * value, *wilson(int(sum(scores)), len(scores)), higher_is_better)
    low = high = None
    if _is_number(error) and error > 0:
        low, high = value - 1.96 * error, value + 1.96 * error
    if not is_share:
        return Metric(value, low, high, higher_is_better, is_share=False)
    if low is not None:
        low, high = 100 * max(0.0, low), 100 * min(1.0, high)
    return Metric(100 * value, low, high, higher_is_better)


def _samples(file: Path, task: str) -> Iterator[Mapping[str, Any]]:
    """Reads a task's samples beside a file of results: one for each row and filter."""
    samples = file.with_name(f"samples_{task}_{file.stem.removeprefix('results_')}.jsonl")
    if not samples.exists():
        raise UserError(
            f"{samples}: is missing, and the report needs the rows; run lm_eval again with "
            "--log_samples (with --use_cache nothing is computed again)"
        )
    return read_json_lines(_Sample, samples)


def _label(metric: str, kind: str) -> str:
    """Returns a metric's name, without the name of the filter that does nothing."""
    return metric if kind == "none" else f"{metric},{kind}"


def _scores(sample: Mapping[str, Any]) -> dict[str, float]:
    """Returns a row's numbers; a perplexity has none for a row, only the sums of a quotient."""
    return {
        _label(metric, sample["filter"]): float(sample[metric])
        for metric in sample["metrics"]
        if _is_number(sample.get(metric))
    }


def _row(sample: Mapping[str, Any]) -> Row:
    """Returns a row without scores; of several choices the most probable is the output."""
    requests, replies = list(sample["arguments"].values()), [reply[0] for reply in sample["resps"]]
    target, output = sample["target"], ""
    match requests[0].get("arg_1"), replies[0]:
        case str(), tuple():  # the log-likelihoods of choices
            choices = [str(request.get("arg_1")).strip() for request in requests]
            output = max(zip(replies, choices, strict=False), key=lambda pair: pair[0][0])[1]
            if len(choices) > 1:
                target = {str(i): choice for i, choice in enumerate(choices)}.get(target, target)
        case dict(), str(text):  # a generation with its options
            output = text
    return Row(requests[0]["arg_0"], output, target, {})
