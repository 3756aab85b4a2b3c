"""The growth of the time per token: python -m benchmarks.scaling --output docs/scaling.png

Times forward and backward of a small model while its tokens, experts, layers or (virtual CPU)
devices grow, for conventional training, DenseMixer, and DenseMixer with 2K experts per token. Draws
four curves and prints them as a Markdown table. Takes minutes on two cores.
"""

import functools
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from benchmarks.shapes import shape_of
from benchmarks.step import make_parser, make_step, timed
from olmoe_jax.errors import ArgumentParser, run_command
from olmoe_jax.parallel import sharding

BASE = ("--shape=mid", "--layers=2", "--hidden=256", "--intermediate=128", "--heads=4")
BASE += ("--experts=32", "--vocab=512", "--rows=4", "--length=128")
METHODS = {
    "conventional": ("--method=conventional",),
    "densemixer": ("--method=densemixer",),
    "densemixer, m=2K": ("--method=densemixer", "--router_gradient_experts=16"),
}
UNCHANGED = (1, ())
SERIES = {
    "tokens": {
        128: (1, ("--rows=1",)),
        512: UNCHANGED,
        2048: (1, ("--rows=16",)),
    },
    "experts": {
        16: (1, ("--experts=16",)),
        32: UNCHANGED,
        64: (1, ("--experts=64",)),
        128: (1, ("--experts=128",)),
    },
    "layers": {1: (1, ("--layers=1",)), 2: UNCHANGED, 4: (1, ("--layers=4",))},
    "devices": {1: UNCHANGED, 2: (2, ()), 4: (4, ())},
}
"""SERIES[what grows][value] = (devices, flags that override BASE). Devices share the cores."""

Curves = dict[str, dict[int, dict[str, float]]]
"""Seconds per token: curves[what grows][value][method]."""


def main(arguments: Sequence[str]) -> None:
    """Measures the series that the arguments ask for, then prints and draws them."""
    parser = ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="PNG file to write")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each point")
    parser.add_argument("--series", nargs="+", choices=SERIES, default=list(SERIES))
    args = parser.parse_args(arguments)
    jax.config.update("jax_num_cpu_devices", 4)
    start = time.monotonic()
    curves: Curves = {}
    for name in args.series:
        points = {value: measure(*SERIES[name][value], args.steps) for value in SERIES[name]}
        curves[name] = points
        print(f"{name}: done after {time.monotonic() - start:.0f} s", flush=True)
    print(table(curves))
    plot(curves, args.output)


@functools.cache
def measure(devices: int, flags: tuple[str, ...], steps: int) -> dict[str, float]:
    """Returns the seconds per token of each method, the best of `steps`."""
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    parsed = {
        name: make_parser().parse_args([*BASE, *flags, *method]) for name, method in METHODS.items()
    }
    # The methods take turns, so that a slow moment of the machine hits all of them.
    with jax.set_mesh(mesh):
        functions = {name: make_step(args, mesh)[0] for name, args in parsed.items()}
        for step in functions.values():
            timed(step)  # compiles
        rounds = [{name: timed(step)[0] for name, step in functions.items()} for _ in range(steps)]
    tokens = shape_of(parsed["conventional"]).tokens
    return {name: min(turn[name] for turn in rounds) / tokens for name in METHODS}


def table(curves: Curves) -> str:
    """Returns the microseconds per token as a Markdown table."""
    lines = ["| | | " + " | ".join(METHODS) + " |", "| --- " * (2 + len(METHODS)) + "|"]
    for what, points in curves.items():
        for value, seconds in points.items():
            cells = " | ".join(f"{seconds[method] * 1e6:.0f}" for method in METHODS)
            lines.append(f"| {what} | {value} | {cells} |")
    return "\n".join(lines)


def plot(curves: Curves, file: Path) -> None:
    """Draws a panel for each series, its times relative to its first conventional point."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for panel, (what, points) in zip(panels, curves.items(), strict=True):
        values = list(points)
        unit = points[values[0]]["conventional"]
        for method, marker in zip(METHODS, "os^", strict=False):
            times = [points[value][method] / unit for value in values]
            panel.plot(values, times, marker=marker, label=method)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.set_xticks(values, map(str, values))
        panel.set_xlabel("virtual devices on the same cores" if what == "devices" else what)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("time per token, relative")
    panels[0].yaxis.set_major_formatter("{x:g}")
    panels[0].legend(fontsize="small")
    figure.savefig(file, dpi=100)


if __name__ == "__main__":
    run_command(main)
