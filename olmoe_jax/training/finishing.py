"""What a run leaves when it is over: the loss curve and the exports."""

from pathlib import Path

from olmoe_jax.checkpoints.export import export_adapter, export_hf
from olmoe_jax.checkpoints.opening import RunCheckpoint
from olmoe_jax.config import Config
from olmoe_jax.plots import plot_losses
from olmoe_jax.training import run_directory
from olmoe_jax.training.best import best_step


def finish(config: Config, output: Path, step: int) -> None:
    """The loss curve and the exports of a finished run, from its checkpoints."""
    lines = run_directory.read_metrics(output)
    plot_losses(lines, output.name, output / run_directory.LOSS_PLOT)
    options = config.train
    wanted = {"": step} if options.export_hf else {}
    if options.export_best:
        wanted["_best"] = best_step(output)
    for suffix, wanted_step in wanted.items():
        run = RunCheckpoint(output, wanted_step)
        target = output / f"{'adapter' if run.lora else 'hf'}{suffix}"
        # A directory under its final name is complete: see hf.directory.new_directory.
        if target.exists():
            print(f"{target} is there already; remove it to export again")
            continue
        if run.lora:
            export_adapter(run, target)
        else:
            export_hf(run, target, None)
        print(f"exported step {wanted_step} to {target}")
