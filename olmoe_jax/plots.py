"""Figures of runs, drawn with matplotlib, which is imported when a figure is drawn."""

from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np


def heat_maps(values: Mapping[str, np.ndarray], file: Path | IO[bytes]) -> None:
    """Writes a PNG with one map for each title's values [L, E]: layers down, experts across."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.5 + 0.3 * sum(map(len, values.values()))))
    figure.set_layout_engine("constrained")
    for axes, (title, map_) in zip(
        figure.subplots(len(values), squeeze=False)[:, 0], values.items(), strict=True
    ):
        image = axes.imshow(map_, aspect="auto", cmap="viridis")
        axes.set(title=title, xlabel="expert", ylabel="layer")
        axes.set_yticks(range(len(map_)), [str(layer + 1) for layer in range(len(map_))])
        figure.colorbar(image, ax=axes)
    figure.savefig(file, dpi=120, format="png")


def plot_losses(lines: list[dict], title: str, file: Path) -> None:
    """Writes a figure of the training and evaluation losses in the lines of a metrics.jsonl."""
    from matplotlib.figure import Figure

    train = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    evaluation = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if train:
        axes.plot(*zip(*train, strict=True), linewidth=1, color="tab:blue", label="training")
    if evaluation:
        axes.plot(*zip(*evaluation, strict=True), "o-", color="tab:orange", label="evaluation")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)
