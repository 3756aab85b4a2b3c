"""The comparison's tables and picture, made from results.jsonl and base_K.json."""

import collections
import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.comparison.base import EXPERTS_PER_TOKEN
from benchmarks.comparison.cells import ABLATION, LIMITED, Cell, Result, Study, read
from benchmarks.comparison.intervals import Interval, interval, paired_p
from benchmarks.comparison.tasks import TASKS
from configs.table import EXPERIMENTS, FULL
from eval.statistics import holm
from olmoe_jax.errors import UserError
from olmoe_jax.files import read_json

Results = Mapping[Cell, Result]
Bases = Mapping[int, dict[str, Any]]  # by K
FROZEN, CONVENTIONAL, DENSE = FULL


def write_report(output: Path, report: Path, study: Study) -> None:
    """Writes the tables and the picture of the results in `output` to `report`."""
    results, bases = read(output), read_bases(output)
    if not results or not bases:
        raise UserError(f"{output}: no result to report; run without --report")
    report.mkdir(parents=True, exist_ok=True)
    texts = {
        "table.md": f"{method_table(results, bases)}\n{extent(results, study)}\n",
        "rates.md": rate_table(results),
        "effects.md": effect_tables(results, bases),
        "base.md": base_tables(bases),
    }
    for name, text in texts.items():
        (report / name).write_text(text, encoding="utf-8")
        print(text)
    (report / "comparison.svg").write_bytes(picture(results, bases))


def read_bases(folder: Path) -> dict[int, dict[str, Any]]:
    """Returns what is known of each base, by its experts per token."""
    found = (read_json(dict[str, Any], file) for file in sorted(folder.glob("base_*.json")))
    return {facts["experts_per_token"]: facts for facts in found}


def bits(text: str) -> np.ndarray:
    """Returns right and wrong answers as numbers [N]."""
    return np.array(list(text), np.float64)


class Runs:
    """The measured runs of a method on bases of one K, by target and seed."""

    def __init__(self, results: Results, method: str, k: int = EXPERTS_PER_TOKEN):
        self.by_target: dict[str, dict[int, Result]] = {}
        for cell, result in sorted(results.items(), key=lambda item: item[0][:4]):
            if (cell.method, cell.experts_per_token, cell.rate) == (method, k, None):
                self.by_target.setdefault(cell.target, {})[cell.seed] = result

    def __bool__(self) -> bool:
        return bool(self.by_target)

    @property
    def all(self) -> list[Result]:
        return [result for runs in self.by_target.values() for result in runs.values()]

    def values(self, number: Callable[[Result], float | None]) -> list[float]:
        """Returns a number of every run that has it."""
        return [value for value in map(number, self.all) if value is not None]


def target_right(result: Result) -> np.ndarray:
    return bits(result.right)


def known_right(result: Result) -> np.ndarray:
    return np.concatenate([bits(right) for right in result.known.values()])


def accuracy(runs: Runs, right: Callable[[Result], np.ndarray]) -> Interval:
    """Returns the share of right answers; the targets count equally."""
    tables = [np.stack([*map(right, seeds.values())]) for seeds in runs.by_target.values()]
    return interval(tables, same_rows=right is known_right)


def difference(
    first: Runs, second: Runs, right: Callable[[Result], np.ndarray], targets: Sequence[str] = ()
) -> tuple[Interval, float, int] | None:
    """Returns first - second over their common targets and seeds, its p, and how many pairs."""
    tables, pairs = [], 0
    for target in targets or first.by_target:
        ours, theirs = first.by_target.get(target, {}), second.by_target.get(target, {})
        if seeds := sorted(ours.keys() & theirs.keys()):
            tables.append(np.stack([right(ours[s]) - right(theirs[s]) for s in seeds]))
            pairs += len(seeds)
    if not tables:
        return None
    return interval(tables, same_rows=right is known_right), paired_p(tables), pairs


def extent(results: Results, study: Study) -> str:
    """Returns how many runs there are, what they took, and which are missing."""
    wanted = study.cells()
    gaps: dict[int, collections.Counter[str]] = {}
    for cell in wanted:
        if cell not in results:
            gaps.setdefault(cell.experts_per_token, collections.Counter())[cell.method] += 1
    count = len(wanted) - sum(methods.total() for methods in gaps.values())
    hours = sum(result.cpu_seconds for result in results.values()) / 3600
    text = f"{count} of {len(wanted)} runs, {hours:.1f} hours of CPU time."
    for k, methods in gaps.items():
        missing = ", ".join(f"{number} of {name}" for name, number in methods.items())
        text += f" Missing at K = {k}: {missing}."
    return text


def method_table(results: Results, bases: Bases) -> str:
    """Returns the table of the methods at K = 4, with tests against conventional training."""
    base = bases[EXPERTS_PER_TOKEN]
    runs = {m: found for m in EXPERIMENTS if (found := Runs(results, m))}
    targets = sorted({target for found in runs.values() for target in found.by_target})
    tests = {
        (method, right): test
        for method, found in runs.items()
        for right in (target_right, known_right)
        if method != CONVENTIONAL and CONVENTIONAL in runs
        if (test := difference(found, runs[CONVENTIONAL], right))
    }
    adjusted = dict(zip(tests, holm([test[1] for test in tests.values()]), strict=True))
    head = ["method", "target right, %", "p", "known right, %", "p", "target loss"]
    head += ["experts that are new", "router cosine", "trained", "step", "memory", "runs"]
    before = np.mean([bits(base["targets"][t]["right"]).mean() for t in targets])
    known = np.concatenate([bits(text) for text in base["known"].values()]).mean()
    loss = statistics.mean(base["targets"][target]["loss"] for target in targets)
    k = str(EXPERTS_PER_TOKEN)
    cosine = statistics.mean(base["router_cosines"][target][k] for target in targets)
    first = ["before", f"{100 * before:.1f}", "", f"{100 * known:.1f}", "", f"{loss:.3f}", ""]
    rows = [[*first, f"{cosine:.3f}", "", "", "", ""]]
    for method, found in runs.items():
        columns = [f"`{method}`"]
        for right in (target_right, known_right):
            p = adjusted.get((method, right))
            columns += [percent(accuracy(found, right)), "" if p is None else f"{p:.3f}"]
        cosines = found.values(lambda r: r.router_cosine)
        rows.append(
            [
                *columns,
                f"{statistics.mean(found.values(lambda r: r.loss)):.3f}",
                f"{100 * statistics.mean(found.values(lambda r: r.changed_routing)):.1f}%",
                f"{statistics.mean(cosines):.3f}" if cosines else "–",
                f"{statistics.mean(found.values(lambda r: r.trained)) / 1e6:.2f}M",
                f"{min(found.values(lambda r: r.step_seconds)):.2f} s",
                f"{min(found.values(lambda r: r.peak_memory)) / 2**30:.2f} GiB",
                str(len(found.all)),
            ]
        )
    return markdown(head, rows)


def by_rate(results: Results, method: str) -> dict[float, tuple[float, float, float]]:
    """Returns rate -> (target right, known right, target loss) of the runs that chose a rate.

    They are means over the targets, with one seed, on the targets' validation rows.
    """
    found = collections.defaultdict(list)
    for cell, result in results.items():
        if cell.method == method and cell.rate is not None:
            right = target_right(result).mean(), known_right(result).mean()
            found[cell.rate].append((*right, result.loss))
    return {rate: tuple(np.mean(found[rate], axis=0)) for rate in sorted(found)}


def rate_table(results: Results) -> str:
    """Returns what each method does at each rate; the chosen rate is bold."""
    tables = {m: found for m in (*EXPERIMENTS, *ABLATION) if (found := by_rate(results, m))}
    rates = sorted({rate for found in tables.values() for rate in found})
    rows = []
    for method, found in tables.items():
        chosen = min(found, key=lambda rate: found[rate][2])
        cells = {
            rate: f"{100 * right:.0f} / {100 * known:.0f} / {loss:.2f}"
            for rate, (right, known, loss) in found.items()
        }
        cells[chosen] = f"**{cells[chosen]}**"
        rows.append([f"`{method}`", *(cells.get(rate, "") for rate in rates)])
    return markdown(["target right, % / known right, % / target loss", *map(str, rates)], rows)


def effect_tables(results: Results, bases: Bases) -> str:
    """Returns what the router's gradient does: by K, by target, by m, and for the router alone."""
    effects: list[tuple[str, str, Runs, Runs, list[str]]] = []
    for k in sorted(bases):
        frozen, conventional, dense = (Runs(results, method, k) for method in FULL)
        effects += [
            (f"K = {k}", f"`{DENSE}` − `{CONVENTIONAL}`", dense, conventional, []),
            (f"K = {k}", f"`{CONVENTIONAL}` − `{FROZEN}`", conventional, frozen, []),
        ]
    conventional, dense = Runs(results, CONVENTIONAL), Runs(results, DENSE)
    losses = {name: facts["loss"] for name, facts in bases[EXPERTS_PER_TOKEN]["targets"].items()}
    for target in sorted(losses, key=losses.__getitem__):
        where = f"{target}, {losses[target]:.2f} nats before"
        effects.append((where, f"`{DENSE}` − `{CONVENTIONAL}`", dense, conventional, [target]))
    for method, m in LIMITED.items():
        what = f"`{DENSE}` − `{CONVENTIONAL}`"
        effects.append((f"m = {m}", what, Runs(results, method), conventional, []))
    first, second = (Runs(results, method) for method in ABLATION)
    effects.append(("router alone", "dense − conventional gradient", second, first, []))
    found = [
        (where, what, *test)
        for where, what, a, b, targets in effects
        if (test := difference(a, b, target_right, targets))
    ]
    adjusted = holm([p for _, _, _, p, _ in found])
    rows = [
        [where, what, percent(found_, signed=True), f"{p:.3f}", str(pairs)]
        for (where, what, found_, _, pairs), p in zip(found, adjusted, strict=True)
    ]
    return markdown(["where", "difference", "target right, points", "p", "pairs"], rows)


def base_tables(bases: Bases) -> str:
    """Returns the bases' right answers, and what a task loses without its or others' experts."""
    accuracies = [
        [name, *(f"{100 * bits(facts['known'][name]).mean():.0f}" for facts in bases.values())]
        for name in TASKS
    ]
    head = ["task", *(f"K = {k}, right %" for k in bases)]
    facts = bases[EXPERTS_PER_TOKEN]
    for row in accuracies:
        task = row[0]
        others = [facts["without"][other][task] for other in TASKS if other != task]
        heaviest = np.sort(np.array(facts["load"][task]), axis=1)[:, -4:].sum(1)
        row += [
            " ".join(f"{100 * share:.0f}" for share in heaviest),
            f"{100 * facts['without'][task][task]:.0f}",
            f"{100 * statistics.mean(others):.0f}",
        ]
    head += ["load of its top 4 experts, % by layer", "right without them, %"]
    tables = [markdown([*head, "without another task's, %"], accuracies)]
    # The cosine of the router gradient of m experts with the full one, by K.
    for k, facts in bases.items():
        cosines = facts["router_cosines"]
        limits = list(next(iter(cosines.values())))
        rows = [[target, *(f"{of_m[m]:.3f}" for m in limits)] for target, of_m in cosines.items()]
        tables.append(markdown([f"cosine, K = {k}", *(f"m = {m}" for m in limits)], rows))
    return "\n".join(tables)


def percent(found: Interval, signed: bool = False) -> str:
    """Returns an interval of shares in percent."""
    form = "{:+.1f}" if signed else "{:.1f}"
    value, low, high = (form.format(100 * number) for number in found)
    return f"{value} ({low} to {high})"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def picture(results: Results, bases: Bases) -> bytes:
    """Draws target against known accuracy as SVG.

    On the left each method at its own rate, a cross of intervals. On the right at every rate, with
    one seed, on the validation rows of the targets that choose the rate: there by the target's
    loss, which tells methods apart that give no right answer.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    known = np.concatenate([bits(text) for text in bases[EXPERTS_PER_TOKEN]["known"].values()])
    for axes in (left, right):
        axes.axhline(100 * known.mean(), color="grey", linewidth=0.8, linestyle=":")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    where = {"transform": left.get_yaxis_transform(), "va": "bottom"}
    left.text(0.01, 100 * known.mean(), "before", **where)
    left.set(
        xlabel="right on the target tasks, %",
        ylabel="right on the tasks of pretraining, %",
        title="at each method's own rate",
    )
    right.set(
        xlabel="loss on the target tasks, nats", xscale="log", title="at every rate, one seed"
    )
    right.set_xticks(ticks := (3, 2, 1, 0.5, 0.3, 0.2, 0.1), map(str, ticks))
    right.minorticks_off()
    right.set_xlim(3.5, 0.12)  # better ones to the right, as on the left
    for number, method in enumerate(EXPERIMENTS):
        if not (found := Runs(results, method)):
            continue
        colour = f"C{number}"
        crosses = [accuracy(found, answers) for answers in (target_right, known_right)]
        x, y = ([100 * value for value in cross] for cross in crosses)
        errors = [[[v - low], [high - v]] for v, low, high in (x, y)]
        left.errorbar(
            x[0], y[0], xerr=errors[0], yerr=errors[1], fmt="o", markersize=4, elinewidth=1.2,
            color=colour, label=method,
        )  # fmt: skip
        line = [(loss, 100 * kept) for _, kept, loss in by_rate(results, method).values()]
        right.plot(*np.array(line).reshape(-1, 2).T, "o-", markersize=4, linewidth=1, color=colour)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right", frameon=False)
    buffer = io.BytesIO()
    # Text stays text, and the same results give the same bytes.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "olmoe_jax"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
