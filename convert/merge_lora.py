"""Merges a PEFT LoRA adapter, or ESFT's trained tensors, into the base: a full checkpoint."""

from collections.abc import Sequence
from pathlib import Path

from olmoe_jax.checkpoints import directory, overrides
from olmoe_jax.checkpoints.export import export_hf
from olmoe_jax.checkpoints.huggingface import DTYPES
from olmoe_jax.checkpoints.opening import open_source
from olmoe_jax.checkpoints.peft import MergedSource
from olmoe_jax.errors import ArgumentParser, run_command

EXAMPLE = """example:
  python -m convert.merge_lora --model allenai/OLMoE-1B-7B-0125 \\
      --adapter runs/densemixer_lora_gsm/adapter --output olmoe_gsm

Each weight, in --dtype, becomes W + scale * B A, computed in float32 and rounded to --dtype. A
router.safetensors in the adapter's directory (a router trained at full rank) replaces the base's.
For ESFT (what `convert.to_hf --adapter` wrote), the trained tensors replace the base's.
One layer is in memory at a time.
"""


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = ArgumentParser(
        prog="python -m convert.merge_lora", description=__doc__, epilog=EXAMPLE
    )
    parser.add_argument("--model", required=True, metavar="DIR_OR_HUB_ID")
    parser.add_argument("--adapter", required=True, metavar="DIR")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default: the base's")
    args = parser.parse_args(arguments)
    dtype = DTYPES[args.dtype] if args.dtype else None
    base, adapter = open_source(args.model), directory.resolve(args.adapter)
    if (adapter / overrides.WEIGHTS).exists():
        merged = overrides.OverriddenSource(base, adapter)
    else:
        merged = MergedSource(base, adapter, dtype)
    export_hf(merged, args.output, args.dtype)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run_command(main)
