"""Evaluations as the report reads them: the directories that lm_eval wrote (--output_path).

PATH/MODEL/results_DATE.json      the metrics of a run's tasks and groups
PATH/MODEL/samples_TASK_DATE.jsonl  the rows of each task (--log_samples)
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.harness import NAME
from eval.report.results import Evaluation, Result
from olmoe_jax.checkpoints import directory
from olmoe_jax.errors import UserError

PREFIX = "lm_eval:"
"""The first letters of the tasks' names in the report: lm_eval has a humaneval too."""
_RESULTS = "results_*.json"


def harness_directories(path: Path, depth: int = 1) -> list[Path]:
    """Returns the directories at most `depth` below `path` in which lm_eval wrote results."""
    patterns = ["*/" * below + _RESULTS for below in range(depth + 1)]
    return sorted({file.parent for pattern in patterns for file in path.glob(pattern)})


def read_harness(path: Path) -> Evaluation:
    """Reads a directory that lm_eval wrote; of a task that ran twice the latest result counts.

    A group that has metrics of its own stands for its tasks.

    Raises:
      UserError: a file is damaged or missing.
    """
    results: dict[str, Result] = {}
    for file in sorted(path.glob(_RESULTS)):
        try:
            run = _HarnessRun(file, directory.read_json(file))
            results |= {PREFIX + name: run.result(name) for name in run.columns()}
            model = run.model()
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise UserError(
                f"{file}: is damaged, or not of a version of lm_eval that this project reads "
                f"({type(error).__name__}: {error}); run lm_eval again"
            ) from None
    return Evaluation(path, model, results, [])


@dataclass(frozen=True)
class _HarnessRun:
    """One run of lm_eval: its file of results and the content."""

    file: Path
    stored: Mapping[str, Any]

    def model(self) -> dict[str, str | None]:
        """Returns what names the model, in the terms of eval.run's model.json."""
        config = self.stored["config"]
        arguments = config["model_args"]
        return {
            "model": str(arguments["pretrained"]),
            "adapter": arguments.get("peft"),
            "backend": "jax" if config["model"] == NAME else config["model"],
            "compute_dtype": str(arguments.get("dtype", "float32")),
        }

    def columns(self) -> Iterator[str]:
        """Yields the tasks and groups that have metrics and are in no group that has metrics."""
        names = [name for name in self.stored["results"] if self.values(name)]
        hidden = {member for name in names for member in self.members(name)}
        return (name for name in names if name not in hidden)

    def values(self, name: str) -> dict[tuple[str, str], float]:
        """Returns {(metric, filter): value} of a task or group."""
        split = {
            tuple(key.split(",")): v for key, v in self.stored["results"].get(name, {}).items()
        }
        return {
            key: value
            for key, value in split.items()
            if len(key) == 2 and not key[0].endswith("_stderr") and isinstance(value, int | float)
        }

    def members(self, name: str) -> Iterator[str]:
        """Yields the groups and tasks in a group, at any depth."""
        for member in self.stored["group_subtasks"].get(name, ()):
            yield member
            yield from self.members(member)

    def result(self, name: str) -> Result:
        """Returns the metrics and rows of a task, or of all tasks of a group."""
        groups = self.stored["group_subtasks"]
        tasks = [task for task in (name, *self.members(name)) if not groups.get(task)]
        samples = {task: self.samples(task) for task in tasks}
        rows: dict[str, list[dict[str, Any]]] = {}
        for task, of_task in samples.items():
            for sample in of_task:
                id_ = str(sample["doc_id"]) if tasks == [name] else f"{task}/{sample['doc_id']}"
                # A sample for each filter, which are one row.
                rows.setdefault(id_, [texts_of(sample)])[0].update(scores_of(sample))
        limited = self.stored["config"]["limit"] is not None
        settings = {
            "data": " ".join(self.stored["task_hashes"][task] for task in tasks),
            "limit": len(rows) if limited else None,
            "fewshot": self.stored["n-shot"].get(tasks[0]),
            "lm_eval": self.stored["lm_eval_version"],
        }
        metrics = {
            label(*key): self.metric(name, key, value, [rows_[0] for rows_ in rows.values()])
            for key, value in self.values(name).items()
        }
        return Result(self.file, settings, metrics, rows)

    def metric(
        self, name: str, key: tuple[str, str], value: float, rows: Sequence[Mapping[str, Any]]
    ) -> dict[str, float]:
        """Returns a metric with 1.96 of lm_eval's standard errors to both sides.

        A share, whose rows' scores are all between 0 and 1, is in percent; others are as lm_eval
        gives them.
        """
        metric, kind = key
        scores = [row[label(*key)] for row in rows if label(*key) in row]
        error = self.stored["results"][name].get(f"{metric}_stderr,{kind}")
        error = error if isinstance(error, int | float) and math.isfinite(error) else 0.0
        scale = 100 if scores and all(0 <= score <= 1 for score in [value, *scores]) else 1
        return {
            "value": scale * value,
            "low": scale * (value - 1.96 * error),
            "high": scale * (value + 1.96 * error),
            "rows": len(rows),
            # None: the members of a group do not agree.
            "higher_is_better": self.stored["higher_is_better"].get(name, {}).get(metric)
            is not False,
        }

    def samples(self, task: str) -> list[dict[str, Any]]:
        """Returns the lines of a task's samples: one for each row and filter."""
        date = self.file.stem.removeprefix("results_")
        file = self.file.with_name(f"samples_{task}_{date}.jsonl")
        try:
            with open(file, encoding="utf-8") as lines:
                return list(map(json.loads, lines))
        except FileNotFoundError:
            raise UserError(
                f"{file}: is missing, and the report needs the rows; run lm_eval again with "
                "--log_samples (with --use_cache nothing is computed again)"
            ) from None


def label(metric: str, kind: str) -> str:
    """Returns a metric's name, without the name of the filter that does nothing."""
    return metric if kind == "none" else f"{metric},{kind}"


def scores_of(sample: Mapping[str, Any]) -> dict[str, float]:
    """Returns a row's numbers by metric; a perplexity has none, only sums that it is made of."""
    return {
        label(metric, sample["filter"]): float(sample[metric])
        for metric in sample["metrics"]
        if isinstance(sample[metric], int | float)
    }


def texts_of(sample: Mapping[str, Any]) -> dict[str, str]:
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
