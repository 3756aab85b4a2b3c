"""What a run says of itself before its first step."""

from collections.abc import Iterator
from pathlib import Path

import jax

from olmoe_jax import data
from olmoe_jax.config import Config
from olmoe_jax.methods.trained import parameter_table
from olmoe_jax.parallel import sharding
from olmoe_jax.training.setup import Datasets, Model, Program


def introduction(
    config: Config, model: Model, datasets: Datasets, steps: data.TrainingData, program: Program
) -> Iterator[str]:
    """Its lines: devices and backends, the method and what it trains, the data, the steps."""
    settings, mesh, count = model.settings, program.mesh, jax.process_count()
    processes = f" in {count} processes" if count > 1 else ""
    yield (
        f"devices: {mesh.size} x {jax.default_backend()}{processes} "
        f"(mesh {sharding.describe(mesh.shape)}), "
        f"grouped matmul: {settings.grouped_matmul}, attention: {settings.attention}, "
        f"compute {config.model.compute_dtype}"
    )
    yield f"method: {config.method.name}{_lora(config, model)}"
    yield from parameter_table(program.state.parameters, program.frozen)
    report, evaluation = data.describe(steps), datasets.evaluation
    yield (
        f"data: {report.examples:,} examples ({report.dropped_rows} rows dropped), "
        f"{report.tokens:,} tokens, rows of {report.row_length:,}, "
        f"padding {report.padding_share:.1%}, "
        f"{len(evaluation) if evaluation else 0:,} evaluation examples"
    )
    yield (
        f"steps: {report.total_steps:,} ({report.steps_per_epoch:,} per epoch of "
        f"{config.train.batch_size} examples each); output: {Path(config.train.output_dir)}"
    )


def _lora(config: Config, model: Model) -> str:
    lora, scheme = model.settings.lora, config.model.base_quantization
    if not lora:
        return ""
    base = f", base quantized to {scheme}" if scheme else ""
    return f" with LoRA: rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g}{base}"
