"""Figures of runs, drawn with matplotlib, which is imported when a figure is drawn."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from olmoe_jax.errors import printable


def label(text: str) -> str:
    """Returns text that matplotlib draws as it is: it takes a $ for the beginning of a formula."""
    return printable(text).replace("$", r"\$")


def heat_maps(values: Mapping[str, np.ndarray], file: Path | IO[bytes]) -> None:
    """Writes a PNG with one map for each title's values [L, E]: layers from 0 down, experts across.

    TensorBoard shows a picture 400 pixels wide: the text is large for the figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 1.5 + 0.24 * sum(map(len, values.values()))))
    figure.set_layout_engine("constrained")
    for axes, (title, map_) in zip(
        figure.subplots(len(values), squeeze=False)[:, 0], values.items(), strict=True
    ):
        image = axes.imshow(map_, aspect="auto", cmap="viridis")
        axes.set_title(title, fontsize=12)
        axes.set_xlabel("expert", fontsize=12)
        axes.set_ylabel("layer", fontsize=12)
        axes.set_yticks(range(len(map_)))
        axes.tick_params(labelsize=11)
        figure.colorbar(image, ax=axes)
    figure.savefig(file, dpi=120, format="png")


def svg(figure: Any) -> bytes:
    """Returns a matplotlib figure as SVG whose text stays text; equal figures give equal bytes."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "olmoe_jax"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def curve(lines: Sequence[Any], field: str) -> tuple[list[int], list[float]]:
    """Returns steps and values of a field in the `Metrics` that have it."""
    points = [(m.step, getattr(m, field)) for m in lines if getattr(m, field) is not None]
    return [step for step, _ in points], [value for _, value in points]


def plot_losses(lines: Sequence[Any], title: str, file: Path) -> None:
    """Writes a figure of the training and evaluation losses in the `Metrics` of a run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, field, style in (("training", "loss", "-"), ("evaluation", "eval_loss", "o-")):
        steps, values = curve(lines, field)
        if steps:
            axes.plot(steps, values, style, linewidth=1, label=name)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=label(title))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)
