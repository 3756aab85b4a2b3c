"""The comparison's tables and picture, made from results.jsonl and base_K.json."""

import collections
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.comparison.base import EXPERTS_PER_TOKEN
from benchmarks.comparison.cells import ABLATION, LIMITED, Cell, Result, Study, read
from benchmarks.comparison.intervals import Interval, interval, paired_p
from benchmarks.comparison.tasks import TARGETS, TASKS
from configs.table import EXPERIMENTS, FULL
from eval.statistics import holm, wilson
from olmoe_jax.errors import UserError
from olmoe_jax.files import read_json
from olmoe_jax.plots import svg

Results = Mapping[Cell, Result]
Bases = Mapping[int, dict[str, Any]]  # by K
FROZEN, CONVENTIONAL, DENSE = FULL
MARKERS = "osD^v<>P"
FEWEST_PAIRS = 6
"""Fewer pairs cannot give a p below 0.05."""


def write_report(output: Path, report: Path, study: Study) -> None:
    """Writes the tables and the picture of the results in `output` to `report`."""
    results, bases = read(output), read_bases(output)
    if not results or not bases:
        raise UserError(f"{output}: no result to report; run without --report")
    report.mkdir(parents=True, exist_ok=True)
    texts = {
        "table.md": f"{method_table(results, bases)}\n{extent(results, bases, study)}\n",
        "rates.md": rate_table(results),
        "targets.md": target_table(results, bases),
        "effects.md": effect_table(results, bases, study),
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

    def mean(
        self,
        number: Callable[[Result], float | None],
        of: Callable[[list[float]], float] = statistics.mean,
    ) -> float | None:
        """Returns the mean over the targets of the runs' mean (or `of`); None if a run has none."""
        rows = [[number(result) for result in seeds.values()] for seeds in self.by_target.values()]
        if any(value is None for row in rows for value in row):
            return None
        return statistics.mean(of(row) for row in rows)  # type: ignore[arg-type]


def target_right(result: Result) -> np.ndarray:
    return bits(result.right)


def known_right(result: Result) -> np.ndarray:
    return np.concatenate([bits(right) for right in result.known.values()])


def target_loss(result: Result) -> np.ndarray:
    """Returns the mean loss as one row [1]; its interval is one over the seeds."""
    return np.array([result.loss])


TASK_COUNT = {target_right: 0, known_right: len(TASKS)}
"""How many tasks the answers of one run are of that all runs have in common."""


def accuracy(runs: Runs, right: Callable[[Result], np.ndarray]) -> Interval:
    """Returns the share of right answers; the targets count equally."""
    tables = [np.stack([*map(right, seeds.values())]) for seeds in runs.by_target.values()]
    found = interval(tables, tasks=TASK_COUNT[right])
    if found.high - found.low < 1e-9:  # all right or all wrong: resamples do not differ
        rows = tables[0].shape[1] * (1 if TASK_COUNT[right] else len(tables))
        low, high = wilson(round(found.value * rows), rows)
        return Interval(found.value, low / 100, high / 100)
    return found


class Effect(NamedTuple):
    """The difference between two methods' runs with the same targets and seeds."""

    mean: Interval
    p: float | None  # of no difference; None: too few pairs for a small one
    pairs: int


def difference(
    first: Runs, second: Runs, number: Callable[[Result], np.ndarray], targets: Sequence[str] = ()
) -> Effect | None:
    """Returns first - second over their common targets (or those given) and seeds."""
    tables, pairs = [], 0
    for target in targets or first.by_target:
        ours, theirs = first.by_target.get(target, {}), second.by_target.get(target, {})
        if seeds := sorted(ours.keys() & theirs.keys()):
            tables.append(np.stack([number(ours[s]) - number(theirs[s]) for s in seeds]))
            pairs += len(seeds)
    if not tables:
        return None
    p = paired_p(tables) if pairs >= FEWEST_PAIRS else None
    return Effect(interval(tables, tasks=TASK_COUNT.get(number, 0)), p, pairs)


def adjusted(effects: Sequence[Effect]) -> list[str]:
    """Returns the effects' p, corrected for their number by Holm's method; "": there is none."""
    values = iter(holm([effect.p for effect in effects if effect.p is not None]))
    return ["" if effect.p is None else f"{next(values):.3f}" for effect in effects]


def extent(results: Results, bases: Bases, study: Study) -> str:
    """Returns how many runs there are, what they took, and which are missing."""
    wanted = study.cells()
    gaps: dict[int, collections.Counter[str]] = {}
    for cell in wanted:
        if cell not in results:
            gaps.setdefault(cell.experts_per_token, collections.Counter())[cell.method] += 1
    count = len(wanted) - sum(methods.total() for methods in gaps.values())
    hours = sum(result.cpu_seconds for result in results.values()) / 3600
    pretraining = sum(facts["wall_seconds"] for facts in bases.values()) / 3600
    text = f"{count} of {len(wanted)} runs, {hours:.1f} hours of CPU time; the bases took "
    text += f"{pretraining:.1f} hours."
    for k, methods in gaps.items():
        missing = ", ".join(f"{number} of {name}" for name, number in methods.items())
        text += f" Missing at K = {k}: {missing}."
    return text


def method_table(results: Results, bases: Bases) -> str:
    """Returns the table of the methods at K = 4, with tests against conventional training."""
    base = bases[EXPERTS_PER_TOKEN]
    runs = {m: found for m in EXPERIMENTS if (found := Runs(results, m))}
    targets = [target for target in TARGETS if any(target in r.by_target for r in runs.values())]
    tests = {
        (method, right): test
        for method, found in runs.items()
        for right in TASK_COUNT
        if method != CONVENTIONAL and CONVENTIONAL in runs
        if (test := difference(found, runs[CONVENTIONAL], right))
    }
    p = dict(zip(tests, adjusted([*tests.values()]), strict=True))
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
        for right in TASK_COUNT:
            columns += [percent(accuracy(found, right)), p.get((method, right), "")]
        cosine = found.mean(lambda r: r.router_cosine)
        # The fastest run of a target was disturbed least.
        step = found.mean(lambda r: r.step_seconds, of=min)
        # A process's peak is that of its first run, of which this target is.
        peaks = [result.peak_memory for result in found.by_target.get(targets[0], {}).values()]
        rows.append(
            [
                *columns,
                f"{found.mean(lambda r: r.loss):.3f}",
                f"{100 * found.mean(lambda r: r.changed_routing):.1f}%",
                "–" if cosine is None else f"{cosine:.3f}",
                f"{found.mean(lambda r: r.trained) / 1e6:.2f}M",
                f"{step:.2f} s",
                f"{statistics.median(peaks) / 2**30:.1f} GiB" if peaks else "",
                str(len(found.all)),
            ]
        )
    return markdown(head, rows)


def target_table(results: Results, bases: Bases) -> str:
    """Returns right answers and loss of each method on each target, means over the seeds."""
    losses = bases[EXPERTS_PER_TOKEN]["targets"]
    targets = sorted(losses, key=lambda target: losses[target]["loss"])
    before = [
        f"{100 * bits(losses[t]['right']).mean():.0f} / {losses[t]['loss']:.2f}" for t in targets
    ]
    rows = [["before", *before]]
    for method in (*EXPERIMENTS, *LIMITED, *ABLATION):
        if found := Runs(results, method).by_target:
            cells = []
            for target in targets:
                runs = [*found.get(target, {}).values()]
                right = [100 * target_right(result).mean() for result in runs]
                loss = [result.loss for result in runs]
                text = f"{np.mean(right):.0f} / {np.mean(loss):.2f}" if runs else ""
                cells.append(text)
            rows.append([f"`{method}`", *cells])
    return markdown(["target right, % / target loss", *targets], rows)


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


def effect_table(results: Results, bases: Bases, study: Study) -> str:
    """Returns what the router's gradient does: by K, by target, by m, and for the router alone.

    K and m are compared on `study.some_targets`, which all of them have.
    """
    some = study.some_targets
    frozen, conventional, dense = (Runs(results, method) for method in FULL)
    frozen_lora, lora, dense_lora = (Runs(results, f"{method}_lora") for method in FULL)
    more, learns = f"`{DENSE}` − `{CONVENTIONAL}`", f"`{CONVENTIONAL}` − `{FROZEN}`"
    effects: list[tuple[str, str, Runs, Runs, Sequence[str]]] = [
        ("all targets", more, dense, conventional, ()),
        ("all targets", learns, conventional, frozen, ()),
        ("all targets, LoRA", more, dense_lora, lora, ()),
        ("all targets, LoRA", learns, lora, frozen_lora, ()),
    ]
    losses = {name: facts["loss"] for name, facts in bases[EXPERTS_PER_TOKEN]["targets"].items()}
    for target in sorted(losses, key=losses.__getitem__):
        where = f"{target}, {losses[target]:.2f} nats before"
        effects.append((where, more, dense, conventional, [target]))
    two = " and ".join(some)
    for k in sorted(bases):
        frozen, conventional, dense = (Runs(results, method, k) for method in FULL)
        effects += [
            (f"K = {k}, {two}", more, dense, conventional, some),
            (f"K = {k}, {two}", learns, conventional, frozen, some),
        ]
    for method, m in LIMITED.items():
        of_m = Runs(results, method)
        effects.append((f"m = {m}, {two}", more, of_m, Runs(results, CONVENTIONAL), some))
    first, second = (Runs(results, method) for method in ABLATION)
    effects.append((f"router alone, {two}", "dense − conventional gradient", second, first, some))
    found = [
        (where, what, right, loss)
        for where, what, first, second, targets in effects
        if (right := difference(first, second, target_right, targets))
        and (loss := difference(first, second, target_loss, targets))
    ]
    p = adjusted([right for *_, right, _ in found])
    loss_p = adjusted([loss for *_, loss in found])
    rows = [
        [where, what, percent(right.mean, True), p[i], nats(loss.mean), loss_p[i], str(right.pairs)]
        for i, (where, what, right, loss) in enumerate(found)
    ]
    head = ["where", "difference", "target right, points", "p", "target loss, nats", "p", "pairs"]
    return markdown(head, rows)


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
    return value if np.isnan(found.low) else f"{value} ({low} to {high})"


def nats(found: Interval) -> str:
    """Returns a difference with its interval, "+0.027 (-0.010 to +0.064)"."""
    if np.isnan(found.low):
        return f"{found.value:+.3f}"
    return f"{found.value:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


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
    right.set_xticks(ticks := (10, 5, 3, 2, 1, 0.5, 0.3, 0.2), map(str, ticks))
    right.minorticks_off()
    right.invert_xaxis()  # better ones to the right, as on the left
    for number, method in enumerate(EXPERIMENTS):
        if not (found := Runs(results, method)):
            continue
        colour = f"C{number}"
        crosses = [accuracy(found, answers) for answers in (target_right, known_right)]
        x, y = ([100 * value for value in cross] for cross in crosses)
        errors = [[[max(0, v - low)], [max(0, high - v)]] for v, low, high in (x, y)]
        left.errorbar(
            x[0], y[0], xerr=errors[0], yerr=errors[1], fmt=MARKERS[number], markersize=5,
            elinewidth=1.2, color=colour, label=method,
        )  # fmt: skip
        line = [(loss, 100 * kept) for _, kept, loss in by_rate(results, method).values()]
        right.plot(
            *np.array(line).reshape(-1, 2).T,
            f"{MARKERS[number]}-",
            markersize=5,
            linewidth=1,
            color=colour,
        )
    figure.legend(*left.get_legend_handles_labels(), loc="outside right", frameon=False)
    return svg(figure)
