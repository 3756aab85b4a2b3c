"""Converts a Hugging Face OLMoE checkpoint to the layout that this project trains in."""

from collections.abc import Sequence

from convert.to_hf import add_allow_nonfinite
from olmoe_jax.checkpoints import checksums, directory
from olmoe_jax.checkpoints.huggingface import HFCheckpoint, write_config
from olmoe_jax.checkpoints.orbax import write_weights
from olmoe_jax.checkpoints.source import MODEL_DIRECTORY
from olmoe_jax.errors import ArgumentParser, run_command
from olmoe_jax.files import NEW_DIRECTORY, PATH_OR_ID

EXAMPLE = """example:
  python -m convert.from_hf --model allenai/OLMoE-1B-7B-0125 --output olmoe_1b_7b

Weights keep their dtype, bit for bit. Two layers are in memory at a time. The output serves as
model.path of a training run and as --checkpoint of convert.to_hf. train.py also reads Hugging
Face checkpoints directly: converting first is a choice.
"""


def main(arguments: Sequence[str]) -> None:
    """Runs the command."""
    parser = ArgumentParser(prog="python -m convert.from_hf", description=__doc__, epilog=EXAMPLE)
    accepted = "Hugging Face checkpoint, with one tensor per expert or fused ones"
    parser.add_argument("--model", required=True, **PATH_OR_ID, help=accepted)
    parser.add_argument("--output", **NEW_DIRECTORY)
    add_allow_nonfinite(parser)
    args = parser.parse_args(arguments)
    checkpoint = HFCheckpoint(directory.resolve(args.model))
    with directory.new_directory(args.output) as partial:
        (partial / MODEL_DIRECTORY).mkdir()
        write_config(partial / MODEL_DIRECTORY, checkpoint.files, dtype=None)
        directory.copy_files(
            checkpoint.files, partial / MODEL_DIRECTORY, (directory.CARD, *directory.LICENSE_FILES)
        )
        write_weights(checkpoint, partial, args.allow_nonfinite)
        checksums.write(partial)
    print(f"converted {args.model} to {args.output}")


if __name__ == "__main__":
    run_command(main)
