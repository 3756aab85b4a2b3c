"""The numbers of a report: one metric per task, scores of rows, tests between methods."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from eval.report.inputs import Inputs
from eval.report.results import Metric, Result
from eval.statistics import Difference, holm, paired_difference
from olmoe_jax.errors import UserError

_ROW_SCORES = {"pass@1": "passed"}
"""{metric: the name of a row's score in rows.jsonl}, if the names differ."""
_UNREMARKED = (
    *("task", "source", "examples", "batch_size", "seed"),
    *("limit", "data", "protocol", "chat_template"),  # have remarks of their own
)
"""Settings of which no remark says that they differ."""

OURS = "ours"
MARK, TEMPLATE_MARK = "†", "‡"
"""The marks of a result by another protocol than ours, and of one by a chat template."""


@dataclass(frozen=True)
class Pair:
    """Two methods on the same rows of a task: the first's scores minus the second's.

    `adjusted` is p after Holm's method for the pairs of the task.
    """

    first: str
    second: str
    difference: Difference
    adjusted: float


def main_metric(task: str, results: Mapping[str, Result]) -> str:
    """Returns the first metric that all results have: no judge if one result has none.

    Raises:
      UserError: the results have no metric in common.
    """
    first, *others = results.values()
    for metric in first.metrics:
        if all(metric in other.metrics for other in others):
            return metric
    raise UserError(
        f"the results of {task} have no metric in common ({', '.join(map(str, results))}); leave "
        "one out"
    )


def unit(inputs: Inputs, task: str, metric: str) -> float:
    """Returns how much a row's score of 1 is in the metric's unit: 100 of a share, in percent.

    lm_eval does not say which of its metrics are shares. A metric is one if all results look so: a
    poor model may have less than one of a hundred points on every row.
    """
    shares = (result.metrics[metric].is_share for result in inputs.results[task].values())
    return 100.0 if all(shares) else 1.0


def column(inputs: Inputs, task: str, metric: str) -> dict[str, Metric]:
    """Returns {method: the task's metric}, all in one unit.

    The interval of what only looked like a share is left out.
    """
    found = {name: result.metrics[metric] for name, result in inputs.results[task].items()}
    if unit(inputs, task, metric) == 100:
        return found
    return {
        name: replace(cell, value=cell.value / 100, low=None, high=None) if cell.is_share else cell
        for name, cell in found.items()
    }


def row_scores(result: Result, metric: str) -> dict[str, float]:
    """Returns {row id: the mean score of its samples}, without the rows that have no score.

    The dictionary is empty for a metric that only a whole set has.
    """
    name = _ROW_SCORES.get(metric, metric)
    scores = {}
    for row, samples in result.rows.items():
        values = [sample.scores[name] for sample in samples if name in sample.scores]
        if values:
            scores[row] = sum(values) / len(values)
    return scores


def pairs(inputs: Inputs, task: str, metric: str) -> list[Pair]:
    """Returns all pairs of methods of a task with the same data and rules, smallest p first."""
    results = inputs.results[task]
    methods = [name for name in inputs.methods if name in results]
    scores = {name: row_scores(results[name], metric) for name in methods}
    found: list[tuple[str, str, Difference]] = []
    # The later method minus the earlier: a gain over the base is positive.
    for second, first in itertools.combinations(methods, 2):
        common = scores[first].keys() & scores[second].keys()
        if not common or _rules(results[first]) != _rules(results[second]):
            continue
        rows = sorted(common)
        a, b = ([scores[name][row] for row in rows] for name in (first, second))
        found.append((first, second, paired_difference(a, b, unit(inputs, task, metric))))
    adjusted = holm([difference.p for *_, difference in found])
    result = [Pair(*pair, p) for pair, p in zip(found, adjusted, strict=True)]
    return sorted(result, key=lambda pair: pair.difference.p)


def _data(result: Result) -> Any:
    return result.settings.get("data")


def protocol(result: Result) -> str:
    """Returns by whose rules a task was evaluated; lm_eval's tasks are by lm_eval's."""
    return str(result.settings.get("protocol", OURS))


def template(result: Result) -> str | None:
    """Returns the hash of the chat template that made user turns of the prompts, or None."""
    return result.settings.get("chat_template")


def _rules(result: Result) -> tuple[Any, str, str | None]:
    return _data(result), protocol(result), template(result)


def remarks(inputs: Inputs) -> Iterator[str]:
    """Yields sentences on how the results were made, which a reader must know."""
    for path in inputs.unfinished:
        yield f"{path} was begun and has no result yet: the same eval.run command ends the task."
    for task, results in inputs.results.items():
        names, values = list(results), list(results.values())
        if len({_data(result) for result in values}) > 1:
            groups = _grouped(names, [_data(result) for result in values])
            yield (
                f"{task}: not all methods were evaluated on the same rows ({groups}); only those "
                "on the same rows are tested against each other."
            )
        if len({protocol(result) for result in values}) > 1:
            yield (
                f"{task}: results by the protocol of the published evaluation have the mark "
                f"{MARK}. They do not compare with the others: no test and no bold number does so."
            )
        elif {protocol(result) for result in values} == {"reference"}:
            yield f"{task}: by the protocol of the published evaluation."
        templates = [template(result) for result in values]
        if len(set(templates)) > 1:
            groups = _grouped(names, [f"chat template {t}" if t else "none" for t in templates])
            yield (
                f"{task}: the prompts of results with the mark {TEMPLATE_MARK} are user turns of a "
                f"chat template, not the same everywhere ({groups}). No test and no bold number "
                "compares results whose prompts differ."
            )
        elif templates[0]:
            yield f"{task}: the prompts are user turns of the chat template {templates[0]}."
        limits = [result.settings.get("limit") for result in values]
        if len(set(limits)) > 1:
            groups = _grouped(names, [f"the first {n}" if n else "all" for n in limits])
            yield f"{task}: not all rows were evaluated with every method ({groups})."
        elif limits[0]:
            yield f"{task}: only the first {limits[0]} rows were evaluated."
        for setting in dict.fromkeys(name for value in values for name in value.settings):
            found = [result.settings.get(setting) for result in values]
            if setting not in _UNREMARKED and len(set(map(str, found))) > 1:
                yield f"{task}: {setting} is not the same everywhere: {_grouped(names, found)}."
    for field in ("backend", "compute_dtype"):
        found = [getattr(evaluation.model, field) for _, evaluation in inputs.evaluations]
        if len(set(found)) > 1:
            names = [name for name, _ in inputs.evaluations]
            yield f"Not all were decoded with the same {field}: {_grouped(names, found)}."


def _grouped(names: Sequence[str], values: Sequence[Any]) -> str:
    """Returns who has which value, in words: "a, b: 1; c: 2"."""
    groups: dict[Any, list[str]] = {}
    for name, value in zip(names, values, strict=True):
        groups.setdefault(value, []).append(name)
    texts = (f"{', '.join(dict.fromkeys(group))}: {value}" for value, group in groups.items())
    return "; ".join(texts)
