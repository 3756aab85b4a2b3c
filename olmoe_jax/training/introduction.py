"""The lines that a run prints before its first step."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import jax

from olmoe_jax import data
from olmoe_jax.checkpoints.turn_ends import read_turn_ends
from olmoe_jax.config import Config
from olmoe_jax.data.counts import source_table
from olmoe_jax.data.reading import in_both
from olmoe_jax.model.lora import is_adapter
from olmoe_jax.model.parameters import Parameters, count_parameters
from olmoe_jax.parallel import sharding
from olmoe_jax.training.base_model import BaseModel
from olmoe_jax.training.datasets import Datasets
from olmoe_jax.training.program import Program


def introduction(
    config: Config, model: BaseModel, datasets: Datasets, steps: data.TrainingData, program: Program
) -> Iterator[str]:
    """Yields lines: devices and backends, the method and what it trains, the data, the steps."""
    settings, mesh, count = model.settings, program.mesh, jax.process_count()
    processes = f" in {count} processes" if count > 1 else ""
    scheme = config.model.base_quantization
    yield (
        f"devices: {mesh.size} x {jax.default_backend()}{processes} "
        f"(mesh {sharding.describe(mesh.shape)}), "
        f"grouped matmul: {settings.grouped_matmul}, attention: {settings.attention}, "
        f"compute {config.model.compute_dtype}"
    )
    base = f", base quantized to {scheme}" if scheme else ""
    yield f"method: {model.method.describe()}{base}"
    yield from parameter_table(program.state.parameters, program.frozen)
    train, evaluation = steps.first_epoch, datasets.evaluation
    length = config.data.max_seq_length
    yield (
        f"data: {len(train):,} examples ({train.counts.describe(length)}), "
        f"{train.lengths.sum():,} tokens ({train.target_counts.sum():,} train), "
        f"rows of {steps.row_length:,}, "
        f"padding {steps.first_epoch_padding_share():.1%}, "
        f"{len(evaluation) if evaluation else 0:,} evaluation examples"
    )
    yield from source_table(train.sources, train.source_counts)
    given = evaluation.sources if evaluation and config.data.eval_path else ()
    if both := in_both(train.sources, given):
        more = f" (and {len(both) - 1} more)" if len(both) > 1 else ""
        yield (
            f"note: {both[0]}{more} is in data.train_path and in data.eval_path, so that the eval "
            "loss does not show what the model makes of other rows"
        )
    if train.counts.templated:
        yield f"conversations: {datasets.rules.describe()}"
    named = read_turn_ends(model.files)
    if named != set(datasets.ends):
        yield (
            f"note: examples end with token {_ids(datasets.ends)}, where the base's config names "
            f"{_ids(named) or 'none'}: config.json and generation_config.json of the exports name "
            f"{_ids(datasets.ends)}"
        )
    yield (
        f"steps: {steps.total_steps:,} ({steps.steps_per_epoch:,} per epoch of "
        f"{config.train.batch_size} examples each); output: {Path(config.train.output_dir)}"
    )


def _ids(ids: Iterable[int]) -> str:
    return " and ".join(map(str, sorted(ids)))


def parameter_table(trained: Parameters, frozen: Parameters) -> list[str]:
    """Returns lines that count the trained and frozen parameters of each part of the model."""
    counts: dict[str, list[int]] = {}
    for name, count in count_parameters(trained | frozen).items():
        for part in (_part_of(name), "all"):
            counts.setdefault(part, [0, 0])[name not in trained] += count
    counts["all"] = counts.pop("all")
    lines = [f"{'parameters':20}{'trained':>16}{'frozen':>16}"]
    return lines + [f"  {part:18}{a:16,}{b:16,}" for part, (a, b) in counts.items()]


def _part_of(name: str) -> str:
    """Returns the part of the model that a parameter belongs to."""
    if is_adapter(name):
        return "expert adapters" if ".experts." in name else "attention adapters"
    if name.startswith("tuned."):
        return "tuned experts"
    for part, words in (
        (".experts.", "experts"),
        (".router", "router"),
        ("norm", "norms"),
        (".attention.", "attention"),
    ):
        if part in name:
            return words
    return {"embed": "embedding", "lm_head": "head"}[name]
