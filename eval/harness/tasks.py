"""lm_eval's tasks by name, and its results in the form of this project's.

OUTPUT/lm_eval_NAME holds settings.json, the answers, rows.jsonl and result.json.
"""

import contextlib
import functools
import hashlib
import importlib.util
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eval.backends import Prompts
from eval.backends.jax import JaxBackend
from eval.evaluation import MODEL, RESULT, ROWS
from eval.harness.answers import Answers
from eval.statistics import RESAMPLES, Metric
from eval.tasks import HARNESS, HARNESS_DIRECTORY
from olmoe_jax.checkpoints import directory
from olmoe_jax.checkpoints.opening import open_source
from olmoe_jax.config.schema import nearest
from olmoe_jax.data import load_tokenizer
from olmoe_jax.data.hub import first_line
from olmoe_jax.errors import UserError


@dataclass(frozen=True)
class HarnessTask:
    """A task, group or tag of lm_eval, with its data.

    Attributes:
      name: as lm_eval has it.
      loaded: its Group, or its Tasks.
      manager: lm_eval's index of its tasks, which takes seconds to make.
      fewshot: solved examples in front of each question; None: as the task has it.
    """

    name: str
    loaded: Sequence[Any]
    manager: Any
    fewshot: int | None

    @property
    def directory(self) -> str:
        """Its name in the output directory."""
        return HARNESS_DIRECTORY + re.sub(r"[^\w.-]", "_", self.name)

    def settings(self, limit: int | None, batch_size: int, seed: int) -> dict[str, Any]:
        """What the answers depend on besides the model; the data is compared as it is asked."""
        import lm_eval

        return {
            "task": self.directory,
            "lm_eval_task": self.name,
            "lm_eval": lm_eval.__version__,
            "limit": limit,
            "fewshot": self.fewshot,
            "batch_size": batch_size,
            "seed": seed,
        }

    def evaluate(
        self,
        settings: Mapping[str, Any],
        output: Path,
        model: str,
        backend: Callable[[], JaxBackend],
    ) -> dict[str, Any]:
        """As `eval.evaluation.evaluate`.

        Args:
          settings: from `settings`; `open_task` has accepted them.
          output: the evaluation's directory.
          model: directory or hub id, for its tokenizer.
          backend: loads the model; called only when an answer is missing.
        """
        import lm_eval

        from eval.harness.language_model import LanguageModel

        prompts, context = _prompts(model)
        path = output / self.directory
        answers = Answers(path, prompts, context, backend, settings["batch_size"], settings["seed"])
        found = lm_eval.simple_evaluate(
            LanguageModel(answers),
            tasks=list(self.loaded),
            task_manager=self.manager,
            num_fewshot=self.fewshot,
            limit=settings["limit"],
            bootstrap_iters=RESAMPLES,
        )
        samples = {name: of_task for name, of_task in found["samples"].items() if of_task}
        rows = _rows(samples)
        directory.write_file_atomically(path / ROWS, lambda file: _write_rows(file, rows))
        metrics = metrics_of(self.name, found, samples)
        result = {
            "model": directory.read_json(output / MODEL),
            "settings": {**settings, "examples": len(rows), "data": _data(samples)},
            "metrics": {name: asdict(metric) for name, metric in metrics.items()},
            "counts": {"shortened_prompts": answers.shortened},
        }
        directory.write_json(path / RESULT, result)
        return result


def check_installed(names: Sequence[str], backend: str) -> None:
    """Raises `UserError` when these tasks cannot run."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            f"--tasks {HARNESS}{names[0]}: needs lm-evaluation-harness: pip install lm_eval"
        )
    if backend != "jax":
        raise UserError(
            f"--tasks {HARNESS}{names[0]}: is decoded with jax only (for {backend} there is "
            "lm_eval's own command); leave --backend out"
        )


def load_tasks(
    names: Sequence[str], include: Path | None, fewshot: int | None
) -> list[HarnessTask]:
    """Reads tasks and their data.

    Args:
      names: lm_eval's.
      include: a directory with yaml files of more tasks.
      fewshot: solved examples in front of each question; None: the task's own number.

    Raises:
      UserError: there is no such task, its data cannot be read, or it runs programs.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include is None else str(include))
    return [_load(manager, name, fewshot) for name in names]


def _load(manager, name: str, fewshot: int | None) -> HarnessTask:
    if name not in manager.all_tasks:
        raise UserError(
            f"--tasks {HARNESS}{name}: lm_eval has no such task; did you mean "
            f"{nearest(name, manager.all_tasks)}?"
        )
    try:
        with _without_metrics_from_the_hub():
            loaded = manager.load([name])
    except Exception as error:  # of many unrelated types: data sets, yaml, missing packages
        hub = getattr(error, "name", None) == "evaluate"
        reason = "it needs code from the hub, which is not run" if hub else first_line(error)
        raise UserError(f"--tasks {HARNESS}{name}: lm_eval cannot load it: {reason}") from error
    for task_name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(
                f"--tasks {HARNESS}{name}: {task_name} runs programs that the model wrote, outside "
                "of a sandbox; use the tasks humaneval and mbpp instead"
            )
        if None in getattr(task, "_metric_fn_list", {}).values():
            raise UserError(
                f"--tasks {HARNESS}{name}: a metric of {task_name} is code from the hub, which is "
                "not run; leave the task out"
            )
    groups = loaded["groups"]
    members = [groups[name]] if name in groups else [*loaded["tasks"].values()]
    return HarnessTask(name, members, manager, fewshot)


@contextlib.contextmanager
def _without_metrics_from_the_hub() -> Iterator[None]:
    """lm_eval looks for a metric that it does not know on the hub, and would run what it finds."""
    module = sys.modules.get("evaluate")
    sys.modules["evaluate"] = None
    try:
        yield
    finally:
        del sys.modules["evaluate"]
        if module:
            sys.modules["evaluate"] = module


@functools.cache
def _prompts(model: str) -> tuple[Prompts, int]:
    source = open_source(model)
    return Prompts(load_tokenizer(str(source.files))), source.config.max_position_embeddings


def metrics_of(
    name: str, found: Mapping[str, Any], samples: Mapping[str, Sequence[Mapping]]
) -> dict[str, Metric]:
    """The metrics in lm_eval's results, a group's own or else those of each of its tasks.

    Where all rows' scores are between 0 and 1 it is a share, in percent; else as it is. The
    interval is 1.96 of lm_eval's standard errors to both sides, and empty where it gives none.
    """
    results, better = found["results"], found["higher_is_better"]
    own = dict(_values(results.get(name, {})))
    per_task = {name: own} if own else {task: dict(_values(results[task])) for task in samples}
    metrics = {}
    for task, values in per_task.items():
        for (metric, kind), value in values.items():
            scores = [
                sample[metric]
                for subtask in ([task] if task in samples else samples)
                for sample in samples[subtask]
                if sample["filter"] == kind and metric in sample
            ]
            error = results[task].get(f"{metric}_stderr,{kind}")
            error = error if isinstance(error, int | float) and math.isfinite(error) else 0.0
            scale = 100 if all(_is_share(score) for score in [value, *scores]) else 1
            key = _label(metric, kind) if len(per_task) == 1 else f"{task}/{_label(metric, kind)}"
            metrics[key] = Metric(
                float(scale * value),
                float(scale * (value - 1.96 * error)),
                float(scale * (value + 1.96 * error)),
                len(scores),
                # None: the members of a group do not agree.
                better.get(task, {}).get(metric) is not False,
            )
    return metrics


def _values(results: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], float]]:
    """((metric, filter), value) of a task's results."""
    for key, value in results.items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            yield (metric, kind), value


def _label(metric: str, kind: str) -> str:
    """As lm_eval writes it, without the name of the filter that does nothing."""
    return metric if kind == "none" else f"{metric},{kind}"


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 1


def _rows(samples: Mapping[str, Sequence[Mapping]]) -> list[dict[str, Any]]:
    """A line per row of the data: what was asked and answered, and its scores by all filters."""
    rows: dict[str, dict[str, Any]] = {}
    for task, of_task in samples.items():
        for sample in of_task:
            id_ = str(sample["doc_id"]) if len(samples) == 1 else f"{task}/{sample['doc_id']}"
            rows.setdefault(id_, {"id": id_, **_texts(sample)}).update(
                {
                    _label(metric, sample["filter"]): float(sample[metric])
                    for metric in sample["metrics"]
                    if isinstance(sample[metric], int | float)
                }
            )
    return list(rows.values())


def _texts(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Of several continuations, the most probable is what the model says."""
    prompt, *choices = (sample["arguments"][0][0], *(a[-1] for a in sample["arguments"]))
    answers, target = [of_request[0] for of_request in sample["resps"]], sample["target"]
    if isinstance(answers[0], str):
        return {
            "prompt": prompt,
            "output": answers[0],
            "answer": sample["filtered_resps"][0],
            "reference": target,
        }
    if not isinstance(answers[0], tuple):  # the likelihood of the whole text
        return {"prompt": prompt, "output": "", "answer": answers[0], "reference": target}
    best = max(range(len(answers)), key=lambda index: answers[index][0])
    is_index = isinstance(target, int) and len(choices) > target
    return {
        "prompt": prompt,
        "output": choices[best].strip(),
        "answer": [value for value, _ in answers],
        "reference": choices[target].strip() if is_index else target,
    }


def _data(samples: Mapping[str, Sequence[Mapping]]) -> str:
    """Tells data apart: rows of the same are compared in the report."""
    fields = ("doc_id", "doc_hash", "prompt_hash", "target_hash")
    content = [
        [task, *(str(sample[field]) for field in fields)]
        for task, of_task in samples.items()
        for sample in of_task
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with open(file, "w", encoding="utf-8", errors="backslashreplace") as opened:
        for row in rows:
            opened.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
