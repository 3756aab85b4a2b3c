"""Converts a Hugging Face OLMoE checkpoint to the layout that this project trains in."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

from olmoe_jax.checkpoints import directory, names
from olmoe_jax.checkpoints.huggingface import HFCheckpoint, write_config
from olmoe_jax.checkpoints.source import MODEL_DIRECTORY, PARAMETERS, item_name
from olmoe_jax.errors import ArgumentParser, run_command
from olmoe_jax.parallel.cpu import return_freed_memory

EXAMPLE = """example:
  python -m convert.from_hf --model allenai/OLMoE-1B-7B-0125 --output olmoe_1b_7b

Weights keep their dtype, bit for bit. One layer is in memory at a time. The output serves as
model.path of a training run and as --checkpoint of convert.to_hf. (train.py also reads Hugging
Face checkpoints as they are.)
"""


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = ArgumentParser(prog="python -m convert.from_hf", description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--model", required=True, metavar="DIR_OR_HUB_ID")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    args = parser.parse_args(arguments)
    checkpoint = HFCheckpoint(directory.resolve(args.model))
    with directory.new_directory(args.output) as partial:
        convert(checkpoint, partial)
    print(f"converted {args.model} to {args.output}")


def convert(checkpoint: HFCheckpoint, output: Path) -> None:
    """Writes the checkpoint into an existing directory, one Orbax item per layer."""
    (output / MODEL_DIRECTORY).mkdir()
    write_config(output / MODEL_DIRECTORY, checkpoint.files, None)
    rows = names.rows(checkpoint.config)

    def read(layer: int | None) -> dict[str, np.ndarray]:
        wanted = (row for row in rows if row.per_layer == (layer is not None))
        return {row.ours: checkpoint.read(row, layer) for row in wanted}

    with ocp.StandardCheckpointer() as checkpointer:
        for layer in [None, *range(checkpoint.config.num_layers)]:
            # No name keeps a layer alive while the next is read.
            checkpointer.save((output / PARAMETERS / item_name(layer)).absolute(), read(layer))
            checkpointer.wait_until_finished()
            # The buffers of one save: glibc would keep them and find no use for half of them.
            return_freed_memory()


if __name__ == "__main__":
    run_command(main)
