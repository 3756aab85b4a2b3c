"""The cost of the input pipeline per training step: python -m benchmarks.input_pipeline

Trains on generated rows as the run's loop does: next(iterator), transfer, accumulate, update, and
the numbers of a step are fetched while the next step runs. Then repeats the same steps with their
batches already on the devices. The two take turns, and the ratio of their times (the median over
the turns) should be below 1.02. On a busy machine the ratio of the CPU times says more.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.machine import machine
from olmoe_jax import data
from olmoe_jax.checkpoints import directory
from olmoe_jax.config import Config, DataOptions, ModelOptions, TrainOptions
from olmoe_jax.errors import ArgumentParser, run_command, whole_number
from olmoe_jax.parallel import sharding
from olmoe_jax.quickstart import write_inputs
from olmoe_jax.training.base_model import open_model
from olmoe_jax.training.datasets import load_datasets, training_data
from olmoe_jax.training.program import Program, build_program

MODEL = {
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_experts": 16,
    "num_experts_per_tok": 4,
}
"""Sizes in the place of the quickstart's. A step takes about half a second on two cores."""

AHEAD = 6
"""Untimed steps before a round, more than the iterator prepares ahead."""


def main(arguments: Sequence[str]) -> None:
    """Measures and prints the result. Raises `UserError` for bad usage."""
    parser = ArgumentParser(prog="python -m benchmarks.input_pipeline", description=__doc__)
    parser.add_argument("--rounds", type=whole_number(1), default=5)
    parser.add_argument("--steps", type=whole_number(1), default=8, help="timed steps in a round")
    parser.add_argument("--batch_size", type=whole_number(1), default=32, help="examples in a step")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as path:
        result = measure(Path(path), args)
    print(json.dumps(result) if args.json else f"{machine()}\n{report(result)}")


def measure(path: Path, args: argparse.Namespace) -> dict[str, float]:
    """Returns the result of `compare` for a small random model; writes inputs into `path`."""
    os.environ["OLMOE_JAX_CACHE"] = str(path / "cache")
    inputs = write_inputs(path / "inputs")
    config_json = inputs / "config.json"
    directory.write_json(config_json, json.loads(config_json.read_text()) | MODEL)
    config = Config(
        model=ModelOptions(
            path=str(inputs),
            init="random",
            config_path=str(inputs),
            compute_dtype="float32",
            remat="none",
        ),
        data=DataOptions(
            train_path=f"{inputs}/train.jsonl",
            eval_fraction=0.0,
            max_seq_length=128,
        ),
        train=TrainOptions(batch_size=args.batch_size, epochs=1000, rows_per_device=16),
    )
    mesh = sharding.make_mesh()
    model = open_model(config)
    steps = training_data(config, load_datasets(config, model), mesh)
    with jax.set_mesh(mesh):
        program = build_program(config, model, mesh, steps.total_steps)
        return compare(program, steps.iterator(), args)


def compare(
    program: Program, iterator: Iterator[data.Step], args: argparse.Namespace
) -> dict[str, float]:
    """Returns medians over the rounds: seconds per step, waiting time, and the ratios.

    A round is `args.steps` steps from the iterator, then the same steps from the devices.
    """
    run = _Loop(program)
    run.steps([next(iterator).batches])  # compiles
    piped, fixed, waits = [], [], []
    for _ in range(args.rounds):
        # The iterator prepared steps ahead while the devices were timed. Use those up: they would
        # make the timed steps look cheap.
        run.steps(next(iterator).batches for _ in range(AHEAD))
        seen: list[list[data.Batch]] = []

        def from_iterator(seen: list[list[data.Batch]] = seen) -> Iterator[list[data.Batch]]:
            for _ in range(args.steps):
                start = time.perf_counter()
                seen.append(next(iterator).batches)
                waits.append(time.perf_counter() - start)
                yield seen[-1]

        piped.append(run.steps(from_iterator()))
        placed = [[program.to_devices(batch) for batch in step] for step in seen]
        fixed.append(run.steps(jax.block_until_ready(placed), placed=True))
    piped, fixed = np.array(piped), np.array(fixed)
    ratio, cpu_ratio = np.median(piped / fixed, axis=0)
    return {
        "ratio": ratio,
        "cpu_ratio": cpu_ratio,
        "step_seconds": np.median(piped[:, 0]) / args.steps,
        "fixed_step_seconds": np.median(fixed[:, 0]) / args.steps,
        "waited_seconds": statistics.median(waits),
    }


class _Loop:
    """The loop of a run, without evaluation, checkpoints and reports."""

    def __init__(self, program: Program):
        self.program, self.state = program, program.state

    def steps(self, steps: Iterable[list[Any]], placed: bool = False) -> tuple[float, float]:
        """Runs the steps and returns their wall and CPU seconds, until the last numbers are there.

        Args:
          steps: the batches of each step.
          placed: whether the batches are on the devices already.
        """
        program, pending = self.program, None
        cpu, start = time.process_time(), time.perf_counter()
        for index, batches in enumerate(steps):
            on_devices = batches if placed else map(program.to_devices, batches)
            self.state, metrics = program.step(self.state, on_devices, index)
            jax.device_get(pending)  # of the step before, while this one runs
            pending = metrics
        jax.block_until_ready((self.state, pending))
        return time.perf_counter() - start, time.process_time() - cpu


def report(result: dict[str, float]) -> str:
    """Returns the result as text."""
    return f"""with the pipeline   {result["step_seconds"]:.4f} s a step
batches on device   {result["fixed_step_seconds"]:.4f} s a step
ratio               {result["ratio"]:.4f}; of the CPU time {result["cpu_ratio"]:.4f}
waiting for data    {result["waited_seconds"] * 1e3:.2f} ms a step"""


if __name__ == "__main__":
    run_command(main)
