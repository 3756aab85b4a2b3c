"""The growth of the time per token: python -m benchmarks.scaling --output docs/scaling.png

Times forward and backward of a small model while its tokens, experts, layers, adapters' rank, m or
(virtual CPU) devices grow, for conventional training, DenseMixer, and DenseMixer with m experts per
token. Each round measures every point once, and a point's best step counts. Draws six curves and
prints them as a Markdown table. Takes minutes on two cores.
"""

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks.machine import machine
from benchmarks.shapes import shape_of
from benchmarks.step import make_parser, make_step
from benchmarks.timing import timed
from olmoe_jax.errors import ArgumentParser, run_command, whole_number
from olmoe_jax.files import user_path
from olmoe_jax.parallel import sharding

BASE = ("--shape=mid", "--layers=2", "--hidden=256", "--intermediate=128", "--heads=4")
BASE += ("--experts=32", "--vocab=512", "--rows=4", "--length=128")


class Point(NamedTuple):
    """A point of a curve: `flags` override BASE, and the devices share the cores."""

    flags: tuple[str, ...] = ()
    m: int = 16
    devices: int = 1

    def steps(self) -> dict[str, tuple[str, ...]]:
        """Returns the flags of each curve's step."""
        densemixer = ("--method=densemixer",)
        methods = {
            "conventional": ("--method=conventional",),
            "densemixer": densemixer,
            "densemixer, m": (*densemixer, f"--router_gradient_experts={self.m}"),
        }
        return {name: (*BASE, *self.flags, *method) for name, method in methods.items()}


METHODS = tuple(Point().steps())
SERIES = {
    "tokens": {tokens: Point((f"--rows={tokens // 128}",)) for tokens in (128, 512, 2048)},
    "experts": {experts: Point((f"--experts={experts}",)) for experts in (16, 32, 64, 128)},
    "layers": {layers: Point((f"--layers={layers}",)) for layers in (1, 2, 4)},
    "rank": {rank: Point((f"--lora_rank={rank}",)) for rank in (4, 16, 64)},
    "m": {m: Point(m=m) for m in (8, 16, 24)},
    "devices": {devices: Point(devices=devices) for devices in (1, 2, 4)},
}
"""SERIES[what grows][value]."""

Curves = dict[str, dict[int, dict[str, float]]]
"""Seconds per token: curves[what grows][value][method]."""


def main(arguments: Sequence[str]) -> None:
    """Measures the series that the arguments ask for, then prints and draws them."""
    parser = ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--output", type=user_path, required=True, help="PNG file to write")
    parser.add_argument("--rounds", type=whole_number(1), default=3)
    parser.add_argument("--steps", type=whole_number(1), default=3, help="of a point in a round")
    parser.add_argument("--series", nargs="+", choices=SERIES, default=list(SERIES))
    args = parser.parse_args(arguments)
    jax.config.update("jax_num_cpu_devices", 4)
    start = time.monotonic()
    curves: Curves = {name: {value: {} for value in SERIES[name]} for name in args.series}
    for turn in range(args.rounds):
        for name, points in curves.items():
            for value, best in points.items():
                for method, seconds in measure(SERIES[name][value], args.steps).items():
                    best[method] = min(seconds, best.get(method, seconds))
        taken = time.monotonic() - start
        print(f"round {turn + 1} of {args.rounds}: done after {taken:.0f} s", flush=True)
    print(f"{machine()}\n\n{table(curves)}")
    plot(curves, args.output)


def measure(point: Point, steps: int) -> dict[str, float]:
    """Returns the seconds per token of each method, the best of `steps`."""
    # The methods take turns, so that a slow moment of the machine hits all of them.
    programs = {name: program(point.devices, flags) for name, flags in point.steps().items()}
    rounds = [{name: timed(step)[0] for name, step in programs.items()} for _ in range(steps)]
    tokens = shape_of(make_parser().parse_args([*BASE, *point.flags])).tokens
    return {name: min(turn[name] for turn in rounds) / tokens for name in METHODS}


@functools.cache
def program(devices: int, flags: tuple[str, ...]) -> Callable[[], Any]:
    """Returns a step that is compiled."""
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    with jax.set_mesh(mesh):
        step = make_step(make_parser().parse_args(flags), mesh)[0]

    def run() -> Any:
        with jax.set_mesh(mesh):
            return step()

    jax.block_until_ready(run())
    return run


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

    figure = Figure(figsize=(2.8 * len(curves), 3.2), layout="constrained")
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
