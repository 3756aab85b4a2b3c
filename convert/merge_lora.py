"""Merges a PEFT LoRA adapter, or an ESFT run's trained tensors, into the base model."""

from collections.abc import Sequence

from convert.to_hf import add_allow_nonfinite
from olmoe_jax.checkpoints import directory
from olmoe_jax.checkpoints.export import export_hf
from olmoe_jax.checkpoints.huggingface import DTYPES
from olmoe_jax.checkpoints.merging import MergedSource
from olmoe_jax.checkpoints.opening import check_adapter, open_source
from olmoe_jax.checkpoints.overrides import WEIGHTS_FILE, OverriddenSource
from olmoe_jax.checkpoints.peft import adapter_directory
from olmoe_jax.checkpoints.source import Source
from olmoe_jax.errors import ArgumentParser, run_command
from olmoe_jax.files import NEW_DIRECTORY, PATH_OR_ID, expand

EXAMPLE = """example:
  python -m convert.merge_lora --model allenai/OLMoE-1B-7B-0125 \\
      --adapter runs/densemixer_lora_gsm/adapter --output olmoe_gsm

The output is a full Hugging Face checkpoint. Each adapted weight W is rounded to --dtype, becomes
W + scale * B A in float32, and is rounded to --dtype again, as PEFT merges. A router.safetensors
in the adapter's directory (a router that trained at full rank) replaces the base's router. The
tensors that `convert.to_hf --adapter` wrote for an ESFT run replace the base's. The tokenizer, the
chat template and the ids that end a turn are the adapter's, if its directory has them. One layer is
in memory at a time.
"""


def main(arguments: Sequence[str]) -> None:
    """Runs the command."""
    parser = ArgumentParser(
        prog="python -m convert.merge_lora", description=__doc__, epilog=EXAMPLE
    )
    changed = "the base that the adapter changes"
    parser.add_argument("--model", required=True, **PATH_OR_ID, help=changed)
    parser.add_argument(
        "--adapter",
        required=True,
        type=expand,
        metavar="DIR",
        help="a PEFT adapter, a LoRA run that has ended, or an ESFT run's trained tensors",
    )
    parser.add_argument("--output", **NEW_DIRECTORY)
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), help="dtype of the weights (default: the base's)"
    )
    add_allow_nonfinite(parser)
    args = parser.parse_args(arguments)
    dtype = DTYPES[args.dtype] if args.dtype else None
    base, adapter = open_source(args.model), directory.resolve(args.adapter)
    merged: Source
    if (adapter / WEIGHTS_FILE).exists():
        merged = OverriddenSource(base, adapter)
    else:
        check_adapter(base, args.model, adapter)
        merged, adapter = MergedSource(base, adapter, dtype), adapter_directory(str(adapter))
    export_hf(
        merged, args.output, args.dtype, allow_nonfinite=args.allow_nonfinite, adapter=adapter
    )
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run_command(main)
