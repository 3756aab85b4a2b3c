"""Exports: a Hugging Face checkpoint of any source, and the adapter of a LoRA or ESFT run."""

from pathlib import Path

import numpy as np

from olmoe_jax.checkpoints import checksums, directory, names, overrides, safetensors_file
from olmoe_jax.checkpoints.card import write_card
from olmoe_jax.checkpoints.huggingface import (
    DTYPES,
    TooLargeError,
    serving_warnings,
    write_checkpoint,
    write_config,
)
from olmoe_jax.checkpoints.names import Weight
from olmoe_jax.checkpoints.opening import RunCheckpoint
from olmoe_jax.checkpoints.peft import write_adapter
from olmoe_jax.checkpoints.source import Source
from olmoe_jax.checkpoints.turn_ends import keep_turn_ends, read_turn_ends, write_turn_ends
from olmoe_jax.errors import UserError

MAX_SHARD_BYTES = 5 * 10**9


def export_hf(
    source: Source,
    output: Path,
    dtype: str | None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    allow_nonfinite: bool = False,
    adapter: Path | None = None,
) -> None:
    """Writes a directory that transformers loads. The directory appears when it is complete.

    Args:
      source: the weights.
      output: the directory to make.
      dtype: one of DTYPES. None: the source's own (`Source.export_dtype`); where that cannot hold
        the weights, float32, and a line says why.
      max_shard_bytes: no file of weights grows larger; several files get an index.
      allow_nonfinite: write weights that are not finite, and those of a run whose loss is not.
      adapter: the directory of the adapter that `source` has merged. The export gets tokenizer,
        chat template, ends of turns and model card from it, as far as it has them.

    Raises:
      UserError: a weight or a loss is not finite, or a weight is too large for `dtype`.
    """
    if not allow_nonfinite:
        source.check_losses()
    for warning in serving_warnings(source.config):
        print(f"warning: {warning}")

    def write(dtype: str | None) -> None:
        def stored(weight: Weight) -> np.dtype:
            return DTYPES[dtype] if dtype else source.dtype(weight)

        # numpy's warnings would be further lines.
        with directory.new_directory(output) as partial, np.errstate(all="ignore"):
            write_config(partial, source.files, dtype)
            if adapter:
                _take_format(adapter, partial)
            write_checkpoint(
                partial, source.config, source.read, stored, max_shard_bytes, allow_nonfinite
            )
            write_card(partial, source, adapter)
            # The other files are the user's to edit.
            checksums.write(partial, "*.safetensors")

    own = source.export_dtype()
    if not dtype and own and own not in DTYPES:
        print(f"note: exporting in float32, since dtype {own} of the base's config.json is unknown")
        own = "float32"
    try:
        write(dtype or own)
    except TooLargeError as error:
        if dtype:
            raise UserError(f"{error}; write --dtype float32") from None
        print(f"note: exporting in float32, since {error}")
        write("float32")


def export_adapter(run: RunCheckpoint, output: Path, allow_nonfinite: bool = False) -> None:
    """Writes what a LoRA or ESFT run trained, without the base.

    A LoRA run's is a PEFT directory, with the router beside the adapter if the router trained.
    An ESFT run's holds the trained tensors and their expert config
    (`olmoe_jax.checkpoints.overrides`).

    Raises:
      UserError: the run trained all weights; or one that it trained, or its loss, is not finite.
    """
    if not run.lora and not run.experts:
        raise UserError(f"{run.path}: this run trained all weights; leave --adapter out")
    if not allow_nonfinite:
        run.check_losses()
    trained = run.trained()
    with directory.new_directory(output) as partial, np.errstate(all="ignore"):
        if run.lora:
            write_adapter(partial, trained, run.lora, run.base)
        elif run.experts:
            tensors = [
                *names.tuned_to_hf(trained, run.experts.experts),
                *names.all_to_hf(trained, run.config),
            ]
            safetensors_file.save(partial / overrides.WEIGHTS_FILE, dict(tensors))
            directory.write_json(partial / overrides.CONFIG_FILE, run.experts.to_json())
        for file in [] if allow_nonfinite else sorted(partial.glob("*.safetensors")):
            for name, tensor in safetensors_file.read_header(file).items():
                safetensors_file.check_finite(name, tensor.read())
        directory.copy_files(run.files, partial, directory.TOKENIZER_FILES)
        keep_turn_ends(partial, read_turn_ends(run.files))
        write_card(partial, run)
        checksums.write(partial, "*.safetensors")


def _take_format(adapter: Path, output: Path) -> None:
    """Makes an export say what the prompts and answers of its adapter look like."""
    if (adapter / directory.TOKENIZER_FILES[0]).is_file():
        for name in directory.TOKENIZER_FILES:
            (output / name).unlink(missing_ok=True)
        directory.copy_files(adapter, output, directory.TOKENIZER_FILES)
    if ends := read_turn_ends(adapter):
        write_turn_ends(output, ends)
