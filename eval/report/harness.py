"""Evaluations as the report reads them: the directories that lm_eval wrote (--output_path).

PATH/MODEL/results_DATE.json      the metrics of a run's tasks and groups
PATH/MODEL/samples_TASK_DATE.jsonl  the rows of each task (--log_samples)
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from eval.harness import NAME
from eval.report.results import Evaluation, Result
from olmoe_jax.errors import UserError
from olmoe_jax.files import read_json

PREFIX = "lm_eval:"
"""The first letters of the tasks' names in the report: lm_eval has a humaneval too."""
_RESULTS = "results_*.json"

Stored = Mapping[str, Any]
"""The content of a file of results."""


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
        try:
            stored = read_json(dict[str, Any], file)
            config, arguments = stored["config"], stored["config"]["model_args"]
            model = {
                "model": str(arguments["pretrained"]),
                "adapter": arguments.get("peft"),
                "backend": "jax" if config["model"] == NAME else config["model"],
                "compute_dtype": str(arguments.get("dtype", "float32")),
            }
            results |= {PREFIX + name: _result(file, stored, name) for name in _columns(stored)}
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise UserError(
                f"{file}: is damaged, or not of a version of lm_eval that this project reads "
                f"({type(error).__name__}: {error}); run lm_eval again"
            ) from None
    return Evaluation(path, model, results, [])


def _columns(stored: Stored) -> list[str]:
    """Returns the tasks and groups that have metrics and are in no group that has metrics."""
    names = [name for name in stored["results"] if any(_values(stored, name))]
    hidden = {member for name in names for member in _members(stored, name)}
    return [name for name in names if name not in hidden]


def _members(stored: Stored, name: str) -> Iterator[str]:
    """Yields the groups and tasks in a group, at any depth."""
    for member in stored["group_subtasks"].get(name, ()):
        yield member
        yield from _members(stored, member)


def _values(stored: Stored, name: str) -> Iterator[tuple[str, str, float]]:
    """Yields (metric, filter, value) of a task or group."""
    for key, value in stored["results"][name].items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            yield metric, kind, value


def _result(file: Path, stored: Stored, name: str) -> Result:
    """Returns the metrics and rows of a task, or of a group with the rows of all its tasks.

    A metric whose rows' scores are all between 0 and 1 is a share, in percent; others are as
    lm_eval gives them. The interval is 1.96 of lm_eval's standard errors to both sides.
    """
    in_group = [name, *_members(stored, name)]
    tasks = [task for task in in_group if not stored["group_subtasks"].get(task)]
    rows: dict[str, list[dict[str, Any]]] = {}
    for task in tasks:
        for sample in _samples(file, task):
            id_ = str(sample["doc_id"]) if tasks == [name] else f"{task}/{sample['doc_id']}"
            # The samples of a row differ in their filter, and their scores in their names.
            rows.setdefault(id_, [_texts(sample)])[0].update(_scores(sample))

    metrics = {}
    for metric, kind, value in _values(stored, name):
        label = _label(metric, kind)
        scores = [row[label] for (row,) in rows.values() if label in row]
        scale = 100 if scores and all(0 <= score <= 1 for score in [value, *scores]) else 1
        error = stored["results"][name].get(f"{metric}_stderr,{kind}")
        error = error if isinstance(error, int | float) and math.isfinite(error) else 0.0
        metrics[label] = {
            "value": scale * value,
            "low": scale * (value - 1.96 * error),
            "high": scale * (value + 1.96 * error),
            "rows": len(rows),
            # None: the members of a group do not agree.
            "higher_is_better": stored["higher_is_better"].get(name, {}).get(metric) is not False,
        }
    settings = {
        "data": " ".join(stored["task_hashes"][task] for task in tasks),
        "limit": None if stored["config"]["limit"] is None else len(rows),
        "fewshot": stored["n-shot"].get(tasks[0]),
        "lm_eval": stored["lm_eval_version"],
    }
    return Result(file, settings, metrics, rows)


def _samples(file: Path, task: str) -> list[dict[str, Any]]:
    """Reads a task's samples beside a file of results: one for each row and filter."""
    samples = file.with_name(f"samples_{task}_{file.stem.removeprefix('results_')}.jsonl")
    try:
        with open(samples, encoding="utf-8") as lines:
            return list(map(json.loads, lines))
    except FileNotFoundError:
        raise UserError(
            f"{samples}: is missing, and the report needs the rows; run lm_eval again with "
            "--log_samples (with --use_cache nothing is computed again)"
        ) from None


def _label(metric: str, kind: str) -> str:
    """Returns a metric's name, without the name of the filter that does nothing."""
    return metric if kind == "none" else f"{metric},{kind}"


def _scores(sample: Mapping[str, Any]) -> dict[str, float]:
    """Returns a row's numbers; a perplexity has none for a row, only the sums of a quotient."""
    return {
        _label(metric, sample["filter"]): float(sample[metric])
        for metric in sample["metrics"]
        if isinstance(sample[metric], int | float)
    }


def _texts(sample: Mapping[str, Any]) -> dict[str, str]:
    """Returns prompt, output and reference; of several choices the most probable is the output."""
    requests = list(sample["arguments"].values())
    prompt, target = requests[0]["arg_0"], sample["target"]
    match requests[0].get("arg_1"):
        case str():  # log-likelihoods: sample["resps"] has [value, greedy] of each choice, as text
            choices = [request["arg_1"].strip() for request in requests]
            values = [float(of_choice[0][0]) for of_choice in sample["resps"]]
            output = choices[values.index(max(values))]
            if target.isdecimal() and int(target) < len(choices) > 1:
                target = choices[int(target)]
        case dict():  # a generation with its options
            output = sample["resps"][0][0]
        case _:  # the log-likelihood of a whole text
            output = ""
    return {"prompt": prompt, "output": output, "reference": target}
