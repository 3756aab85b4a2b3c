"""The Markdown tables and the figure of compare_methods."""

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from configs.table import ESFT, EXPERIMENTS, LORA

Cells = Mapping[tuple[str, int], dict]
"""The results of `run_cell` by (method, seed); ("base", 0) is the model before fine-tuning."""


def write_report(cells: Cells, output: Path) -> None:
    """Writes table.md, cosines.md and comparison.png from the cells that exist."""
    (output / "table.md").write_text(method_table(cells), encoding="utf-8")
    (output / "cosines.md").write_text(cosine_table(cells), encoding="utf-8")
    draw(cells).savefig(output / "comparison.png", dpi=110)
    print(method_table(cells), cosine_table(cells), sep="\n")


def method_table(cells: Cells) -> str:
    """Returns a table with a row per method: the mean, the lowest and the highest of the seeds."""
    field = first_field(cells)
    head = ["method", "eval loss", *([f"`{field}` right"] if field else []), "exact match"]
    head += ["router cosine", "trained", "step time", "peak memory"]
    lines = [_row(head), _row(["---"] * len(head))]
    conventional = step_seconds(cells, "conventional")
    for method in ("base", *EXPERIMENTS):
        if not (found := of_method(cells, method)):
            continue
        columns = ["before fine-tuning" if method == "base" else f"`{method}`"]
        columns.append(spread([cell["eval_loss"] for cell in found], "{:.3f}"))
        for share in (["first_field_match"] if field else []) + ["exact_match"]:
            columns.append(spread([100 * cell[share] for cell in found], "{:.1f}", "%"))
        columns.append(own_cosine(method, found))
        if method == "base":
            columns += ["–", "–", "–"]
        else:
            seconds = step_seconds(cells, method)
            relative = f" ({seconds / conventional:.2f}x)" if conventional else ""
            columns += [
                spread([cell["trained_parameters"] / 1e6 for cell in found], "{:.2f}", "M"),
                f"{seconds:.2f} s{relative}",
                f"{min(cell['peak_memory'] for cell in found) / 2**30:.2f} GiB",
            ]
        lines.append(_row(columns))
    return "\n".join(lines) + "\n"


def first_field(cells: Cells) -> str | None:
    """Returns the name of the first field of the task's answers if they are JSON, else None."""
    return next(iter(cells.values())).get("first_field")


def _row(columns: list[str]) -> str:
    return f"| {' | '.join(columns)} |"


def cosine_table(cells: Cells) -> str:
    """Returns a table of the cosines of the router gradient of m experts with the full one."""
    known = next((cell["cosines"] for cell in cells.values() if "cosines" in cell), {})
    limits = [int(limit) for limit in known]
    head = " | ".join(f"m = {limit}" for limit in limits)
    lines = [f"| at the weights of | {head} |", "| --- |" + " --- |" * len(limits)]
    for method in ("base", *EXPERIMENTS):
        found = [cell["cosines"] for cell in of_method(cells, method) if "cosines" in cell]
        if found:
            means = (spread([c[str(limit)] for c in found], "{:.3f}") for limit in limits)
            name = "the base" if method == "base" else f"`{method}`"
            lines.append(f"| {name} | {' | '.join(means)} |")
    return "\n".join(lines) + "\n"


def of_method(cells: Cells, method: str) -> list[dict]:
    return [cell for (name, _), cell in cells.items() if name == method]


def spread(values: list[float], form: str, unit: str = "") -> str:
    """Returns the mean, with the lowest and the highest value in brackets where they differ."""
    low, mean, high = map(form.format, (min(values), statistics.mean(values), max(values)))
    return f"{mean}{unit}" if low == high else f"{mean}{unit} ({low}–{high})"


def own_cosine(method: str, found: list[dict]) -> str:
    """Returns the cosine of the router gradient that trained the method with the full one."""
    if "conventional" in method:
        return spread([next(iter(cell["cosines"].values())) for cell in found], "{:.3f}")
    return "1 (full)" if "densemixer" in method else "–"


def step_seconds(cells: Cells, method: str) -> float | None:
    """Returns the 10th percentile of the steps of all seeds, or None without steps.

    Other work on the machine can only add time to a step.
    """
    seconds = [s for cell in of_method(cells, method) for s in cell["seconds"]]
    return float(np.quantile(seconds, 0.1)) if seconds else None


def draw(cells: Cells) -> Figure:
    """Draws eval loss, right answers and step time: a dot per seed, a bar at the mean."""
    methods = [method for method in EXPERIMENTS if of_method(cells, method)]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    conventional = step_seconds(cells, "conventional") or 1.0
    share = "first_field_match" if (field := first_field(cells)) else "exact_match"
    panels: list[tuple[str, Callable[[str], list[float]]]] = [
        ("eval loss, nats per token", lambda m: [c["eval_loss"] for c in of_method(cells, m)]),
        (f"{field or 'answer'} right, %", lambda m: [100 * c[share] for c in of_method(cells, m)]),
        ("step time / conventional", lambda m: [step_seconds(cells, m) / conventional]),
    ]
    for axis, (title, values_of) in zip(axes, panels, strict=True):
        for row, method in enumerate(methods):
            color = (
                "tab:green" if method in ESFT else "tab:orange" if method in LORA else "tab:blue"
            )
            values = values_of(method)
            axis.barh(row, statistics.mean(values), color=color, alpha=0.35, height=0.7)
            axis.plot(values, [row] * len(values), "o", color=color, markersize=4)
        axis.set_xlabel(title)
        axis.set_xlim(left=0)
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(methods)), methods)
    axes[0].invert_yaxis()
    return figure
