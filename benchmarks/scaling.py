"""The growth of the time per token: python -m benchmarks.scaling --output docs/scaling.png

Times forward and backward of a small model while its tokens, experts, layers, adapters' rank, m or
(virtual CPU) devices grow, for conventional training, DenseMixer, and DenseMixer with m experts per
token. Each round runs each of the different steps once, and the best time of a step counts wherever
the curves have it. Draws six curves and prints them as a Markdown table. The first round compiles
41 steps: a quarter of an hour on two cores. The others take a minute.
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

BASE = {"shape": "mid", "layers": 2, "hidden": 256, "intermediate": 128, "heads": 4}
BASE |= {"experts": 32, "vocab": 512, "rows": 4, "length": 128}


class Step(NamedTuple):
    """Names what is timed. Points of several series may have the same step."""

    devices: int  # they share the cores
    flags: tuple[str, ...]


class Point(NamedTuple):
    """A point of all curves, with other values of BASE."""

    values: tuple[tuple[str, int], ...] = ()
    m: int = 16
    devices: int = 1

    def steps(self) -> dict[str, Step]:
        """Returns the step of each curve."""
        methods = {
            "conventional": {"method": "conventional"},
            "densemixer": {"method": "densemixer"},
            "densemixer, m": {"method": "densemixer", "router_gradient_experts": self.m},
        }
        steps = {}
        for name, method in methods.items():
            flags = BASE | dict(self.values) | method
            steps[name] = Step(self.devices, tuple(f"--{n}={value}" for n, value in flags.items()))
        return steps


METHODS = tuple(Point().steps())
SERIES = {
    "tokens": {tokens: Point((("rows", tokens // 128),)) for tokens in (128, 512, 2048)},
    "experts": {experts: Point((("experts", experts),)) for experts in (16, 32, 64, 128)},
    "layers": {layers: Point((("layers", layers),)) for layers in (1, 2, 4)},
    "rank": {rank: Point((("lora_rank", rank),)) for rank in (4, 16, 64)},
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
    parser.add_argument("--steps", type=whole_number(1), default=3, help="runs of one in a round")
    parser.add_argument("--series", nargs="+", choices=SERIES, default=list(SERIES))
    args = parser.parse_args(arguments)
    jax.config.update("jax_num_cpu_devices", 4)
    start = time.monotonic()
    points = [point for name in args.series for point in SERIES[name].values()]
    best: dict[Step, float] = {}
    for turn in range(args.rounds):
        for steps in distinct(points):
            for step, seconds in measure(steps, args.steps).items():
                best[step] = min(seconds, best.get(step, seconds))
        taken = time.monotonic() - start
        print(f"round {turn + 1} of {args.rounds}: done after {taken:.0f} s", flush=True)
    curves: Curves = {
        name: {
            value: {method: best[step] for method, step in point.steps().items()}
            for value, point in SERIES[name].items()
        }
        for name in args.series
    }
    print(f"{machine()}\n\n{table(curves)}")
    plot(curves, args.output)


def distinct(points: Sequence[Point]) -> list[list[Step]]:
    """Returns the steps of each point that no point before it has."""
    seen: set[Step] = set()
    of_points = []
    for point in points:
        of_points.append([step for step in point.steps().values() if step not in seen])
        seen.update(of_points[-1])
    return of_points


def measure(steps: Sequence[Step], count: int) -> dict[Step, float]:
    """Returns the seconds per token of each step, the best of `count` runs."""
    # The steps take turns, so that a slow moment of the machine hits all of them.
    programs = {step: program(step) for step in steps}
    rounds = [{step: timed(run)[0] for step, run in programs.items()} for _ in range(count)]
    return {
        step: min(turn[step] for turn in rounds)
        / shape_of(make_parser().parse_args(step.flags)).tokens
        for step in steps
    }


@functools.cache
def program(step: Step) -> Callable[[], Any]:
    """Returns a function that runs the step, which is compiled."""
    mesh = sharding.make_mesh(devices=jax.devices()[: step.devices])
    with jax.set_mesh(mesh):
        compiled = make_step(make_parser().parse_args(step.flags), mesh)[0]

    def run() -> Any:
        with jax.set_mesh(mesh):
            return compiled()

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
