"""The end of a run: the loss curve and the exports."""

from pathlib import Path

from olmoe_jax.checkpoints.metrics import read_metrics
from olmoe_jax.checkpoints.opening import RunCheckpoint
from olmoe_jax.config import Config
from olmoe_jax.methods import Method
from olmoe_jax.plots import plot_losses
from olmoe_jax.training import run_directory
from olmoe_jax.training.best import best_step


def finish(config: Config, method: Method, output: Path, step: int) -> None:
    """Draws the loss curve and writes the exports of a finished run, from its checkpoints."""
    plot_losses(read_metrics(output), output.name, output / run_directory.LOSS_PLOT)
    options = config.train
    wanted = {"": step} if options.export_hf else {}
    if options.export_best:
        wanted["_best"] = best_step(output)
    for suffix, wanted_step in wanted.items():
        target = output / f"{method.export_name}{suffix}"
        # A directory under its final name is complete: see checkpoints.directory.new_directory.
        if target.exists():
            print(f"{target} is there already; remove it to export again")
            continue
        method.export(RunCheckpoint(output, wanted_step), target)
        print(f"exported step {wanted_step} to {target}")
