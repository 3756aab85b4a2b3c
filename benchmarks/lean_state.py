"""The accuracy cost of a lean optimizer state: loss curves against float32.

    python -m benchmarks.lean_state --steps 200 --seeds 0 1 2

The quickstart's model learns its word problems with DenseMixer, computed in bfloat16, in 8
micro-batches a step. "scratch" trains from random weights, where updates are large. "fine-tuning"
continues from what float32 trained, with a learning rate so small that a bfloat16 weight moves once
in many updates, as in the experiments on OLMoE (`configs/table.py`). All runs of a seed see the
same batches and start from the same weights.
"""

import dataclasses
import functools
import json
import sys
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from olmoe_jax import data
from olmoe_jax.config import Config, OptimizerOptions, apply_overrides
from olmoe_jax.config.load import load_config
from olmoe_jax.errors import SEED, ArgumentParser, run_command, whole_number
from olmoe_jax.model.parameters import Parameters
from olmoe_jax.parallel import sharding
from olmoe_jax.quickstart import CONFIG
from olmoe_jax.training.base_model import open_model
from olmoe_jax.training.datasets import Datasets, load_datasets, row_layout, training_data
from olmoe_jax.training.program import Program, build_program
from olmoe_jax.training.step import TrainState

VARIANTS: dict[str, dict[str, str]] = {
    "float32": {},
    "bfloat16 moments": {"moments_dtype": "bfloat16"},
    "int8 moments": {"moments_dtype": "int8"},
    "and gradients": {"moments_dtype": "bfloat16", "gradients_dtype": "bfloat16"},
    "and master": dict.fromkeys(("moments_dtype", "gradients_dtype", "master_dtype"), "bfloat16"),
}
SCRATCH_RATE, FINE_TUNING_RATE = 3e-3, 1e-5


class Curve(NamedTuple):
    """The losses of one run."""

    losses: list[float]  # one per step
    eval_before: float
    eval_after: float
    weights: Parameters  # at the end, on the host


def main(arguments: Sequence[str]) -> None:
    parser = ArgumentParser(prog="python -m benchmarks.lean_state", description=__doc__)
    parser.add_argument("--steps", type=whole_number(1), default=200)
    parser.add_argument("--seeds", type=SEED, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch_size", type=whole_number(1), default=64, help="examples per step")
    parser.add_argument(
        "--states",
        nargs="+",
        choices=VARIANTS,
        default=list(VARIANTS),
        help="states to compare with float32",
    )
    parser.add_argument("--json", action="store_true", help="print all curves as one line")
    args = parser.parse_args(arguments)
    # Runs differ only in the update: a cache compiles what they share once.
    with tempfile.TemporaryDirectory() as compiled:
        jax.config.update("jax_compilation_cache_dir", compiled)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        variants = {n: o for n, o in VARIANTS.items() if n in ("float32", *args.states)}
        curves = measure(args.steps, args.seeds, args.batch_size, variants)
    print(json.dumps(curves) if args.json else report(curves))


def measure(
    steps: int,
    seeds: Sequence[int],
    batch_size: int,
    variants: dict[str, dict[str, str]],
) -> dict[str, dict[str, list[dict]]]:
    """Returns a `Curve`'s numbers as a dict, by experiment, variant and seed."""
    curves: dict[str, dict[str, list[dict]]] = {
        name: {v: [] for v in variants} for name in ("scratch", "fine-tuning")
    }
    for seed in seeds:
        base = None
        for experiment, rate in (("scratch", SCRATCH_RATE), ("fine-tuning", FINE_TUNING_RATE)):
            for variant, options in variants.items():
                config = _config(steps, seed, batch_size, rate, options)
                start = base if experiment == "fine-tuning" else None
                curve = run(config, start)
                if experiment == "scratch" and variant == "float32":
                    base = curve.weights
                numbers = curve._asdict()
                del numbers["weights"]
                curves[experiment][variant].append(numbers)
                print(
                    f"seed {seed}, {experiment}, {variant}: {json.dumps(numbers)}", file=sys.stderr
                )
    return curves


def _config(steps: int, seed: int, batch_size: int, rate: float, options: dict) -> Config:
    config = load_config(str(CONFIG))
    overrides = {
        "model.compute_dtype": "bfloat16",
        "train.max_steps": str(steps),
        "train.epochs": "1000",
        "train.seed": str(seed),
        "train.batch_size": str(batch_size),
        "train.rows_per_device": str(max(1, batch_size // 16)),
    }
    config = dataclasses.replace(config, optimizer=OptimizerOptions(learning_rate=rate, **options))
    return apply_overrides(config, overrides)


def run(config: Config, start: Parameters | None) -> Curve:
    """Trains from random weights, or from `start` rounded to bfloat16 like a published base."""
    mesh, model = sharding.make_mesh(devices=jax.devices()[:1]), open_model(config)
    datasets = load_datasets(config, model)
    steps = training_data(config, datasets, mesh)
    with jax.set_mesh(mesh):
        program = build_program(config, model, mesh, steps.total_steps)
        state = program.state
        if start:
            weights = {
                name: jax.device_put(value.astype("bfloat16"), state.parameters[name].sharding)
                for name, value in start.items()
            }
            weights = {n: w.astype(state.parameters[n].dtype) for n, w in weights.items()}
            state = state._replace(parameters=weights)
        evaluate = functools.partial(_evaluate, config, datasets, program)
        before, losses, iterator = evaluate(state), [], steps.iterator()
        for index in range(steps.total_steps):
            batches = map(program.to_devices, next(iterator).batches)
            state, metrics = program.step(state, batches, index)
            losses.append(metrics.loss)
        losses = list(map(float, losses))
        return Curve(losses, before, evaluate(state), jax.device_get(state.parameters))


def _evaluate(config: Config, datasets: Datasets, program: Program, state: TrainState) -> float:
    """Returns the mean loss per target of the held-out word problems."""
    evaluation = datasets.evaluation
    total = sum(
        float(program.evaluate(state.parameters, program.frozen, program.to_devices(batch))[0])
        for batch in data.evaluation_batches(
            evaluation, **row_layout(config, datasets, program.mesh)
        )
    )
    return total / int(evaluation.target_counts.sum())


def report(curves: dict[str, dict[str, list[dict]]]) -> str:
    """Returns a Markdown table per experiment; ± is a seed's largest distance from the mean."""
    lines = []
    for experiment, variants in curves.items():
        reference = variants["float32"]
        lines += [
            f"\n{experiment} ({len(reference)} seeds, {len(reference[0]['losses'])} steps)\n",
            "| state | training loss, last 20 steps | held-out loss, before | after "
            "| after - float32 |",
            "| --- | --- | --- | --- | --- |",
        ]
        for variant, runs in variants.items():
            last = [np.mean(run["losses"][-20:]) for run in runs]
            before, after = ([run[f"eval_{when}"] for run in runs] for when in ("before", "after"))
            paired = np.subtract(after, [run["eval_after"] for run in reference])
            cells = [f"{np.mean(last):.4f}", f"{np.mean(before):.4f}", f"{np.mean(after):.4f}"]
            spread = np.abs(paired - paired.mean()).max()
            cells.append(f"{paired.mean():+.4f} ± {spread:.4f}" if paired.any() else "-")
            lines.append(f"| {' | '.join([variant, *cells])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
