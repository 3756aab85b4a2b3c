"""From weights on disk to a Hugging Face checkpoint or adapter."""

from pathlib import Path

from olmoe_jax.checkpoints import directory, names, peft
from olmoe_jax.checkpoints.huggingface import (
    DTYPES,
    serving_warnings,
    write_checkpoint,
    write_config,
)
from olmoe_jax.checkpoints.opening import RunCheckpoint
from olmoe_jax.checkpoints.overrides import write_overrides
from olmoe_jax.checkpoints.source import Source
from olmoe_jax.errors import UserError

MAX_SHARD_BYTES = 5 * 10**9


def export_hf(
    source: Source, output: Path, dtype: str | None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes a directory that transformers loads; it appears when it is complete.

    Args:
      source: the weights.
      dtype: "bfloat16" or "float32"; None: the source's preference (`export_dtype`).
      max_shard_bytes: a file of weights is at most this large; above one file there is an index.
    """
    for warning in serving_warnings(source.config):
        print(f"warning: {warning}")
    dtype = dtype or source.export_dtype()

    def stored(row: names.Row):
        return DTYPES[dtype] if dtype else source.dtype(row)

    with directory.new_directory(output) as partial:
        write_config(partial, source.files, dtype)
        write_checkpoint(partial, source.config, source.read, stored, max_shard_bytes)


def export_adapter(run: RunCheckpoint, output: Path) -> None:
    """Writes what a LoRA or ESFT run trained, without the base.

    LoRA: a PEFT directory, the trained router beside it. ESFT: the trained tensors and their
    expert config (see `olmoe_jax.checkpoints.overrides`).

    Raises:
      UserError: the run trained everything.
    """
    if not run.lora and not run.experts:
        raise UserError(f"{run.path}: this run trained all weights; leave --adapter out")
    trained = run.trained()
    with directory.new_directory(output) as partial:
        if run.lora:
            peft.write_adapter(partial, trained, run.lora, run.base)
        else:
            tensors = [
                *names.tuned_to_hf(trained, run.experts.experts),
                *names.all_to_hf(trained, run.config),
            ]
            write_overrides(partial, tensors, run.experts)
        directory.copy_files(run.files, partial, directory.TOKENIZER_FILES)
