"""The parts of a report, in their order: scores, published scores, tests, curves, outputs."""

import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from eval.published import EVALUATIONS, is_published_data, published
from eval.report.comparison import (
    MARK,
    OURS,
    TEMPLATE_MARK,
    Pair,
    column,
    main_metric,
    pairs,
    protocol,
    remarks,
    row_scores,
    template,
    unit,
)
from eval.report.document import (
    Block,
    Heading,
    Items,
    Output,
    Paragraph,
    Picture,
    Pictures,
    Strong,
    Table,
)
from eval.report.figures import Named, colors_of, loss_curves, match_curves, router_curves
from eval.report.harness import PREFIX
from eval.report.inputs import Inputs
from eval.report.results import Evaluation, Metric
from olmoe_jax.files import read_bytes

SIGNIFICANT = 0.05
OTHER_DATA = "other data"
"""The mark of a score that is not compared with the published one."""
_PROMPT_END = 600
"""How many of a prompt's last characters are shown: the end holds the question."""


def report(inputs: Inputs, samples: int) -> list[Block]:
    """Returns the whole report, with the methods' outputs for `samples` rows of each task."""
    metrics = {task: main_metric(task, results) for task, results in inputs.results.items()}
    return [
        Heading(1, "Evaluation report"),
        *_scores(inputs, metrics),
        *_published(inputs, metrics),
        *_tests(inputs, metrics),
        *_models(inputs),
        *_training(inputs),
        *_outputs(inputs, metrics, samples),
    ]


def _scores(inputs: Inputs, metrics: dict[str, str]) -> Iterator[Block]:
    if not metrics:
        return
    yield Heading(2, "Scores")
    text = (
        "In percent, with the 95% interval over the rows: Wilson's if rows are right or wrong, "
        "else a bootstrap interval; none where all rows score the same. The best of a task are "
        "bold."
    )
    if any(task.startswith(PREFIX) for task in metrics):
        text += (
            " The interval of lm_eval's other metrics is 1.96 standard errors to both sides. A "
            "metric that is no share of the rows is in lm_eval's own unit; a ↓ says that less is "
            "better."
        )
    yield Paragraph(text)
    columns = {task: column(inputs, task, metric) for task, metric in metrics.items()}
    marks = {task: _marks(inputs, task) for task in metrics}
    head = ["method"]
    for task, metric in metrics.items():
        head.append(f"{task} ({metric}{'' if _higher_is_better(columns[task]) else ' ↓'})")
    rows = [[name, *_score_cells(columns, marks, name)] for name in inputs.methods]
    yield Table(head, rows)
    if notes := list(remarks(inputs)):
        yield Items(notes)


def _higher_is_better(cells: Mapping[str, Metric]) -> bool:
    return all(cell.higher_is_better for cell in cells.values())


def _marks(inputs: Inputs, task: str) -> dict[str, str]:
    """Returns {method: the marks of its result}.

    A task that has results of two protocols marks those that are not by ours. A task whose prompts
    differ by their chat template has one mark for the first template, two for the next.
    """
    results = inputs.results[task]
    protocols = {name: protocol(result) for name, result in results.items()}
    templates = {name: template(result) for name, result in results.items()}
    order = [*filter(None, dict.fromkeys(templates.values()))]
    marks = dict.fromkeys(results, "")
    for name in results:
        if len(set(protocols.values())) > 1 and protocols[name] != OURS:
            marks[name] += MARK
        if len(set(templates.values())) > 1 and templates[name]:
            marks[name] += TEMPLATE_MARK * (order.index(templates[name]) + 1)
    return marks


def _score_cells(
    columns: Mapping[str, Mapping[str, Metric]], marks: Mapping[str, Mapping[str, str]], name: str
) -> Iterator[str]:
    for task, cells in columns.items():
        if name not in cells:
            yield "–"
            continue
        cell, mark = cells[name], marks[task]
        rivals = [other.value for n, other in cells.items() if mark[n] == mark[name]]
        shown = f"{cell.value:.2f}"
        text = shown + mark[name]
        if cell.low is not None:
            text += f" ({cell.low:.1f} to {cell.high:.1f})"
        best = max if _higher_is_better(cells) else min
        best_value = best(rivals)
        # Values that read the same are equal.
        is_best = len(rivals) > 1 and shown == f"{best_value:.2f}"
        yield Strong(text) if is_best else text


def _published(inputs: Inputs, metrics: dict[str, str]) -> Iterator[Block]:
    rows, other_data = [], {}
    for name in inputs.methods:
        cells = []
        for task, metric in metrics.items():
            result, known = inputs.results[task].get(name), published(name, task, metric)
            cell = "–"
            if result and known is not None and is_published_data(task, result.settings):
                mark = _marks(inputs, task)[name]
                cell = f"{result.metrics[metric].value - known:+.2f}{mark} ({known:.2f})"
            elif result and known is not None:
                cell = OTHER_DATA
                other_data.setdefault(task, []).append(name)
            cells.append(cell)
        if set(cells) != {"–"}:
            rows.append([name, *cells])
    if not rows:
        return
    yield Heading(2, "Difference to the published scores")
    compared = any(set(cells) - {"–", OTHER_DATA} for _, *cells in rows)
    if compared:
        yield Paragraph(
            "The score here minus the published score, which is in brackets. The README of "
            "DenseMixer (yaof20/DenseMixer) has the published scores of OLMoE-1B-7B-0125; law, "
            "summary and translation depend on the judge. The published scores are by the protocol "
            "reference (docs/differences.md), whose results --protocol reference makes."
        )
        yield Table(["method", *(f"{task} ({metric})" for task, metric in metrics.items())], rows)
    for task, names in other_data.items():
        yield Paragraph(
            f"{task}: {', '.join(names)} not compared, evaluated on {OTHER_DATA}: the published "
            f"scores are of {EVALUATIONS[task].rows:,} rows, the hub's."
        )
    other = [t for t, m in metrics.items() if t in EVALUATIONS and EVALUATIONS[t].metric != m]
    if compared and other:
        yield Paragraph(f"Without a judge there is nothing to compare for {', '.join(other)}.")


def _tests(inputs: Inputs, metrics: dict[str, str]) -> Iterator[Block]:
    found = {task: pairs(inputs, task, metric) for task, metric in metrics.items()}
    if not any(found.values()):
        return
    yield Heading(2, "Differences between methods")
    yield Paragraph(
        "On the same rows: the first method's mean score minus the second's, with the 95% "
        "bootstrap interval. The two-sided p is from McNemar's exact test if rows are right or "
        "wrong, else from a permutation test with random signs; Holm's method adjusts p for the "
        f"pairs of the task. Differences with an adjusted p below {SIGNIFICANT} are bold."
    )
    for task, metric in metrics.items():
        if found[task]:
            mean = " (mean over the rows, not of the whole set)" if metric == "chrf" else ""
            yield Heading(3, f"{task}: {metric}{mean}")
            head = ["methods", "difference", "95% interval", "p", "p (Holm)", "test", "rows"]
            yield Table(head, list(map(_pair_row, found[task])))


def _pair_row(pair: Pair) -> list[str]:
    found = pair.difference
    value = f"{found.value:+.2f}"
    return [
        f"{pair.first} − {pair.second}",
        Strong(value) if pair.adjusted < SIGNIFICANT else value,
        "–" if found.low is None else f"{found.low:+.2f} to {found.high:+.2f}",
        _p(found.p),
        _p(pair.adjusted),
        found.test,
        str(found.rows),
    ]


def _p(value: float) -> str:
    return f"{value:.4f}" if value >= 0.0001 else "< 0.0001"


def _models(inputs: Inputs) -> Iterator[Block]:
    """Yields the table of what every row of the other tables stands for."""
    if not inputs.evaluations:
        return
    yield Heading(2, "Models")
    rows = sorted(inputs.evaluations, key=lambda pair: inputs.methods.index(pair[0]))
    head = ["method", "tasks", "model", "evaluation", "decoded with"]
    yield Table(head, [[name, *_names(evaluation)] for name, evaluation in rows], wraps=True)


def _names(evaluation: Evaluation) -> list[str]:
    """Returns the tasks, the model and its adapter, the directory, and how the model computed."""
    model, settings = evaluation.model, [r.settings for r in evaluation.results.values()]
    dtypes = dict.fromkeys(s.get("decode_dtype", model.compute_dtype) for s in settings)
    protocols = dict.fromkeys(s["protocol"] for s in settings if "protocol" in s)
    templates = dict.fromkeys(s["chat_template"] for s in settings if s.get("chat_template"))
    how = [model.backend, *dtypes, *(f"protocol {name}" for name in protocols)]
    how += [f"chat template {name}" for name in templates]
    if model.tokenizer:
        how.append(f"tokenizer {model.tokenizer}")
    return [
        ", ".join(evaluation.results),
        model.model + (f" with the adapter {model.adapter}" if model.adapter else ""),
        str(evaluation.path),
        ", ".join(filter(None, how)),
    ]


def _training(inputs: Inputs) -> Iterator[Block]:
    by_data: dict[str, Named] = {}
    for name, run in inputs.runs:
        by_data.setdefault(run.data, []).append((name, run))
    if by_data:
        yield Heading(2, "Training")
    colors = colors_of(name for name, _ in inputs.runs)
    for data, runs in by_data.items():
        yield Heading(3, data)
        drawn = {"loss": loss_curves(runs, colors), "right_answers": match_curves(runs, colors)}
        drawn |= router_curves(runs, colors)
        pictures = [
            Picture(_file_name(what, data, "svg"), content, f"{what.replace('_', ' ')}, {data}")
            for what, content in drawn.items()
            if content
        ]
        pictures += _expert_scores(data, runs)
        if pictures:
            yield Pictures(pictures)
        else:
            yield Paragraph("No step has been reported yet.")


def _expert_scores(data: str, runs: Named) -> list[Picture]:
    """Returns the scores by which ESFT runs selected; methods that share scores show them once."""
    shared: dict[Path, list[str]] = {}
    for name, run in runs:
        if run.scores:
            shared.setdefault(run.scores.resolve(), []).append(name)
    return [
        Picture(
            _file_name(f"experts_{'_'.join(names)}", data, "png"),
            read_bytes(file),
            f"scores of the experts, {', '.join(names)}, {data}",
        )
        for file, names in shared.items()
    ]


def _file_name(what: str, data: str, suffix: str) -> str:
    """Returns a name that is safe in a path and in a link, another one for another text."""
    text = f"{what}_{data}"
    name = re.sub(r"[^A-Za-z0-9_-]", "-", text)[:100]
    if name != text:
        name += f"-{zlib.crc32(text.encode(errors='replace')):08x}"
    return f"{name}.{suffix}"


def _outputs(inputs: Inputs, metrics: dict[str, str], samples: int) -> Iterator[Block]:
    if not (samples and metrics):
        return
    yield Heading(2, "Sample outputs")
    for task, metric in metrics.items():
        results = inputs.results[task]
        names = [name for name in inputs.methods if name in results]
        marks = _marks(inputs, task)
        scores = {name: row_scores(results[name], metric) for name in names}
        in_percent = unit(inputs, task, metric) == 100
        # The methods' common rows; if there are none, the rows of the first.
        common = set.intersection(*(set(results[name].rows) for name in names))
        ids = [id_ for id_ in results[names[0]].rows if id_ in common or not common]
        for id_ in _spread(ids, samples):
            first = results[names[0]].rows[id_][0]
            yield Heading(3, f"{task}, row {id_}")
            yield Output("prompt (its end)", first.prompt[-_PROMPT_END:])
            yield Output("expected", _text(first.reference))
            for name in names:
                if id_ in results[name].rows:
                    score = scores[name].get(id_)
                    label = name + marks[name]
                    if score is not None:
                        shown = f"{100 * score:.0f}%" if in_percent else f"{score:.2f}"
                        label += f" ({metric} {shown})"
                    yield Output(label, results[name].rows[id_][0].output.strip())


def _spread(ids: Sequence[str], count: int) -> list[str]:
    """Returns at most `count` of the ids, spread evenly."""
    count = min(count, len(ids))
    return [ids[place * len(ids) // count] for place in range(count)]


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
