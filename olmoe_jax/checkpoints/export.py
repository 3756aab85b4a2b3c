"""Exports: a Hugging Face checkpoint of any source, and the adapter of a LoRA or ESFT run."""

from pathlib import Path

import numpy as np

from olmoe_jax.checkpoints import directory, names
from olmoe_jax.checkpoints.huggingface import (
    DTYPES,
    serving_warnings,
    write_checkpoint,
    write_config,
)
from olmoe_jax.checkpoints.names import Weight
from olmoe_jax.checkpoints.opening import RunCheckpoint
from olmoe_jax.checkpoints.overrides import write_overrides
from olmoe_jax.checkpoints.peft import write_adapter
from olmoe_jax.checkpoints.source import Source
from olmoe_jax.errors import UserError

MAX_SHARD_BYTES = 5 * 10**9


def export_hf(
    source: Source, output: Path, dtype: str | None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes a directory that transformers loads. The directory appears when it is complete.

    Args:
      source: the weights.
      output: the directory to make.
      dtype: "bfloat16" or "float32"; None: the source's own (`Source.export_dtype`).
      max_shard_bytes: no file of weights grows larger; several files get an index.
    """
    for warning in serving_warnings(source.config):
        print(f"warning: {warning}")
    dtype = dtype or source.export_dtype()

    def stored(weight: Weight) -> np.dtype:
        return DTYPES[dtype] if dtype else source.dtype(weight)

    with directory.new_directory(output) as partial:
        write_config(partial, source.files, dtype)
        write_checkpoint(partial, source.config, source.read, stored, max_shard_bytes)


def export_adapter(run: RunCheckpoint, output: Path) -> None:
    """Writes what a LoRA or ESFT run trained, without the base.

    A LoRA run's is a PEFT directory, with the router beside the adapter if the router trained.
    An ESFT run's holds the trained tensors and their expert config
    (`olmoe_jax.checkpoints.overrides`).

    Raises:
      UserError: the run trained all weights.
    """
    if not run.lora and not run.experts:
        raise UserError(f"{run.path}: this run trained all weights; leave --adapter out")
    trained = run.trained()
    with directory.new_directory(output) as partial:
        if run.lora:
            write_adapter(partial, trained, run.lora, run.base)
        elif run.experts:
            tensors = [
                *names.tuned_to_hf(trained, run.experts.experts),
                *names.all_to_hf(trained, run.config),
            ]
            write_overrides(partial, tensors, run.experts)
        directory.copy_files(run.files, partial, directory.TOKENIZER_FILES)
