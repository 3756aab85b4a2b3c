"""Writes a Hugging Face checkpoint from a training run or another checkpoint."""

import re
from collections.abc import Sequence
from pathlib import Path

from olmoe_jax.checkpoints.export import MAX_SHARD_BYTES, export_adapter, export_hf
from olmoe_jax.checkpoints.huggingface import DTYPES
from olmoe_jax.checkpoints.opening import RunCheckpoint, open_source
from olmoe_jax.errors import ArgumentParser, UserError, run_command, shorten, whole_number
from olmoe_jax.files import BASE, NEW_DIRECTORY, expand
from olmoe_jax.training.best import best_step

EXAMPLE = """example:
  python -m convert.to_hf --checkpoint runs/densemixer_gsm --output olmoe_gsm

The output loads with transformers' AutoModelForCausalLM and serves with vLLM: one tensor for each
expert, config.json, the generation config and the tokenizer, and an index if the weights need
several files. LoRA adapters are merged into the base: W + scale * B A.
"""

BEST = "best"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def main(arguments: Sequence[str]) -> None:
    """Runs the command."""
    parser = ArgumentParser(prog="python -m convert.to_hf", description=__doc__, epilog=EXAMPLE)
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=expand,
        metavar="DIR",
        help="a run's train.output_dir, convert.from_hf's output, or a Hugging Face checkpoint",
    )
    parser.add_argument("--output", **NEW_DIRECTORY)
    parser.add_argument("--base", **BASE)
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="write only what a LoRA or ESFT run trained, without the base",
    )
    parser.add_argument(
        "--step",
        type=_step,
        metavar="N|best",
        help="a run's checkpoint, by its number or by train.best_metric (default: the latest)",
    )
    parser.add_argument(
        "--dtype",
        choices=sorted(DTYPES),
        help="dtype of the weights (default: the base checkpoint's)",
    )
    parser.add_argument(
        "--max_shard_size",
        type=parse_size,
        default=MAX_SHARD_BYTES,
        metavar="SIZE",
        help=f"largest file of weights, e.g. 500MB (default: {MAX_SHARD_BYTES // 10**9}GB)",
    )
    add_allow_nonfinite(parser)
    args = parser.parse_args(arguments)
    step = best_step(Path(args.checkpoint)) if args.step == BEST else args.step
    source = open_source(args.checkpoint, step, args.base)
    if not args.adapter:
        export_hf(source, args.output, args.dtype, args.max_shard_size, args.allow_nonfinite)
    elif isinstance(source, RunCheckpoint):
        export_adapter(source, args.output, args.allow_nonfinite)
    else:
        raise UserError(f"{args.checkpoint}: --adapter needs the directory of a LoRA or ESFT run")
    print(f"wrote {args.output}")


def add_allow_nonfinite(parser: ArgumentParser) -> None:
    """Adds the flag that all commands have which write weights."""
    parser.add_argument(
        "--allow_nonfinite",
        action="store_true",
        help="write weights that are NaN or infinite, and those of a run whose loss is",
    )


def _step(text: str) -> int | str:
    return BEST if text == BEST else whole_number(0)(text)


def parse_size(text: str) -> int:
    """Returns the bytes of a size such as 5GB, 500MB or 1000000."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*([KMG]?B?)", text.strip().upper())
    if not match or float(match[1]) <= 0:
        raise UserError(f"{shorten(text)}: write a size such as 5GB or 500MB")
    unit = match[2] if match[2] in _UNITS else match[2].rstrip("B") + "B"
    return int(float(match[1]) * _UNITS.get(unit, 1))


if __name__ == "__main__":
    run_command(main)
