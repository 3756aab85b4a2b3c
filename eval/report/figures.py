"""The plots of a report: losses, right answers, router entropy and load, as SVG with text."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from configs.table import EXPERIMENTS
from eval.report.inputs import TrainingRun
from olmoe_jax.files import check_regular
from olmoe_jax.plots import curve, label, svg

_POINTS = 150
"""Points of a curve at most; each is the mean over a stretch of steps."""

Curve = tuple[Sequence[float], Sequence[float]]
"""Steps and values."""
Named = Sequence[tuple[str, TrainingRun]]
"""Names of methods and their runs."""
Colors = Mapping[str, str]
"""{method: matplotlib's name of its color}."""


def colors_of(names: Iterable[str]) -> Colors:
    """Returns a color for each method, those of the configs' table first."""
    return {name: f"C{place}" for place, name in enumerate(dict.fromkeys([*EXPERIMENTS, *names]))}


def loss_curves(runs: Named, colors: Colors) -> bytes | None:
    """Draws training loss (lines) and evaluation loss (points) of runs on one data set."""
    training = {name: curve(run.metrics, "loss") for name, run in runs}
    evaluation = {name: curve(run.metrics, "eval_loss") for name, run in runs}
    return _draw("loss (nats per token)", colors, training, evaluation)


def match_curves(runs: Named, colors: Colors) -> bytes | None:
    """Draws the share of right answers while training; None if no run decoded any."""
    found = {}
    for name, run in runs:
        steps, shares = curve(run.metrics, "exact_match")
        found[name] = steps, [100 * share for share in shares]
    return _draw("right answers (%)", colors, {}, found)


def router_curves(runs: Named, colors: Colors) -> dict[str, bytes]:
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
        "router_entropy": _draw("router's entropy (nats, mean of layers)", colors, entropy, {}),
        "router_load": _draw("heaviest load of an expert (1: even)", colors, load, {}),
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


def _draw(
    title: str, colors: Colors, lines: Mapping[str, Curve], points: Mapping[str, Curve]
) -> bytes | None:
    """Returns one panel with a line, points or both for each name; None if all are empty."""
    from matplotlib.figure import Figure

    lines, points = (
        {name: curve for name, curve in curves.items() if len(curve[0])}
        for curves in (lines, points)
    )
    if not (lines or points):
        return None
    # Small: a telephone scales the text down only a little.
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys([*lines, *points]):
        # matplotlib leaves out names that begin with an underscore.
        style = {"color": colors[name], "label": f"\N{ZERO WIDTH SPACE}{label(name)}"}
        if name in lines:
            axes.plot(*_thinned(lines[name]), linewidth=1.3, **style)
            style["label"] = None
        if name in points:
            axes.plot(*points[name], "o--", linewidth=0.8, markersize=3.5, **style)
    axes.set(xlabel="step", ylabel=title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="small", frameon=False)
    return svg(figure)


def _thinned(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Returns the means over at most _POINTS stretches of the curve."""
    steps, values = (np.asarray(part, float) for part in curve)
    stretches = np.array_split(np.arange(len(steps)), min(_POINTS, len(steps)))
    return tuple(np.array([part[s].mean() for s in stretches]) for part in (steps, values))
