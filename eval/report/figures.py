"""The plots of a report: losses, right answers, router entropy and load, as SVG with text."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from configs.table import EXPERIMENTS
from eval.report.inputs import TrainingRun
from olmoe_jax.files import check_regular
from olmoe_jax.plots import curve, label

_POINTS = 150
"""Points of a curve at most; each is the mean over a stretch of steps."""

Curve = tuple[Sequence[float], Sequence[float]]
"""Steps and values."""
Named = Sequence[tuple[str, TrainingRun]]
"""Names of methods and their runs."""


def loss_curves(runs: Named) -> bytes | None:
    """Draws training loss (lines) and evaluation loss (points) of runs on one data set."""
    training = {name: curve(run.metrics, "loss") for name, run in runs}
    evaluation = {name: curve(run.metrics, "eval_loss") for name, run in runs}
    return _draw("loss (nats per token)", training, evaluation)


def match_curves(runs: Named) -> bytes | None:
    """Draws the share of right answers while training; None if no run decoded any."""
    found = {}
    for name, run in runs:
        steps, shares = curve(run.metrics, "exact_match")
        found[name] = steps, [100 * share for share in shares]
    return _draw("right answers (%)", {}, found)


def router_curves(runs: Named) -> dict[str, bytes]:
    """Returns {what: picture} of the routers over the steps, from the runs' TensorBoard files."""
    entropy, load = {}, {}
    for name, run in runs:
        scalars = _scalars(run.path / "tensorboard")
        entropy[name] = scalars.get("router/entropy_mean", ((), ()))
        heaviest = [curve for tag, curve in scalars.items() if tag.startswith("router_load_max/")]
        if heaviest:
            steps = min((curve[0] for curve in heaviest), key=len)
            values = np.max([curve[1][: len(steps)] for curve in heaviest], axis=0)
            load[name] = (steps, values)
    drawn = {
        "router_entropy": _draw("router's entropy (nats, mean of layers)", entropy, {}),
        "router_load": _draw("heaviest load of an expert (1: even)", load, {}),
    }
    return {what: picture for what, picture in drawn.items() if picture}


def _scalars(path: Path) -> dict[str, Curve]:
    """Reads the router's scalars in a directory of event files."""
    if not path.is_dir():
        return {}
    for file in path.glob("*tfevents*"):
        check_regular(file)  # TensorBoard would wait for ever for a FIFO
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path), {"scalars": 0})
    events.Reload()
    return {
        tag: tuple(zip(*((event.step, event.value) for event in events.Scalars(tag)), strict=True))
        for tag in events.Tags()["scalars"]
        if tag.startswith("router")
    }


def _draw(title: str, lines: Mapping[str, Curve], points: Mapping[str, Curve]) -> bytes | None:
    """Returns one panel with a color for each name; None if there is nothing to draw."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names = [n for n in dict.fromkeys([*lines, *points]) if any(map(len, _of(n, lines, points)))]
    if not names:
        return None
    # Small: a telephone scales the text down only a little.
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.subplots()
    for name in names:
        color = _color(name, names)
        line, dots = _of(name, lines, points)
        # matplotlib leaves out names that begin with an underscore.
        shown = f"\N{ZERO WIDTH SPACE}{label(name)}"
        if len(line):
            axes.plot(*_thinned(line), color=color, linewidth=1.3, label=shown)
            shown = None
        if len(dots):
            axes.plot(*dots, "o--", color=color, linewidth=0.8, markersize=3.5, label=shown)
    axes.set(xlabel="step", ylabel=title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="small", frameon=False)
    buffer = io.BytesIO()
    # Text stays text, and the same data gives the same bytes.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "olmoe_jax"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _of(name: str, lines: Mapping[str, Curve], points: Mapping[str, Curve]) -> list[Curve]:
    """Returns the name's line and points, each empty if there is none."""
    curves = (lines.get(name, ((), ())), points.get(name, ((), ())))
    return [curve if len(curve[0]) else () for curve in curves]


def _color(name: str, names: Sequence[str]) -> str:
    """Returns a method's color, the same in every plot."""
    known = name in EXPERIMENTS
    return f"C{EXPERIMENTS.index(name) if known else len(EXPERIMENTS) + names.index(name)}"


def _thinned(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Returns the means over at most _POINTS stretches of the curve."""
    steps, values = (np.asarray(part, float) for part in curve)
    stretches = np.array_split(np.arange(len(steps)), min(_POINTS, len(steps)))
    return tuple(np.array([part[s].mean() for s in stretches]) for part in (steps, values))
