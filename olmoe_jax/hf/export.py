"""From weights on disk to a Hugging Face checkpoint, in bounded memory."""

from pathlib import Path

from olmoe_jax.hf import directory, names
from olmoe_jax.hf.checkpoint import DTYPES, write_checkpoint, write_config
from olmoe_jax.hf.source import Source

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
    dtype = dtype or source.export_dtype()

    def stored(row: names.Row):
        return DTYPES[dtype] if dtype else source.dtype(row)

    with directory.new_directory(output) as partial:
        write_config(partial, source.files, dtype)
        write_checkpoint(partial, source.config, source.read, stored, max_shard_bytes)
