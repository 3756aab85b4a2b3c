"""The command line of `python -m olmoe_jax.generate`: continues prompts with a model."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from olmoe_jax.errors import SEED, ArgumentParser, UserError, data_output, whole_number
from olmoe_jax.files import BASE, PATH_OR_ID, expand, read_bytes, utf8
from olmoe_jax.parallel.compilation import keep_programs

EPILOG = """examples:
  python -m olmoe_jax.generate --model runs/quickstart/hf --prompt "Question: 2 + 3?
  Answer:"
  python -m olmoe_jax.generate --model allenai/OLMoE-1B-7B-0125 --prompts questions.txt \\
      --adapter runs/densemixer_lora_gsm --stop "Question:" --temperature 0.7 --top_p 0.9
  echo "Once upon a time" | python -m olmoe_jax.generate --model runs/quickstart/hf --prompts -

For one prompt the command prints its continuation, for several a line of JSON each.
"""


def main(arguments: Sequence[str]) -> None:
    """Runs the command."""
    args = parser().parse_args(arguments)
    prompts = _prompts(args)
    keep_programs()

    import jax
    import jax.numpy as jnp

    import olmoe_jax
    from olmoe_jax.checkpoints.opening import open_source
    from olmoe_jax.checkpoints.turn_ends import read_turn_ends
    from olmoe_jax.data import load_tokenizer
    from olmoe_jax.model.config import ModelSettings
    from olmoe_jax.parallel import sharding

    source = open_source(args.model)
    tokenizer = load_tokenizer(str(source.files))
    mesh = sharding.decoding_mesh(source.config.num_experts)
    settings = ModelSettings(compute_dtype=jnp.dtype(args.compute_dtype))
    model = olmoe_jax.from_pretrained(
        args.model, mesh, settings=settings, adapter=args.adapter, base=args.base
    )
    with jax.set_mesh(mesh):
        texts = olmoe_jax.generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            stop=args.stop,
            seed=args.seed,
            batch_size=args.batch_size,
            progress=len(prompts) > 1,
            allow_extrapolation=args.allow_extrapolation,
            ends={tokenizer.eos_token_id, *read_turn_ends(source.files)},
        )
    output = data_output()
    if len(prompts) == 1:
        print(texts[0], file=output)
        return
    for prompt, text in zip(prompts, texts, strict=True):
        print(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False), file=output)


def parser() -> ArgumentParser:
    """Returns the parser of the flags."""
    result = ArgumentParser(
        prog="python -m olmoe_jax.generate",
        description="Continues prompts with a model.",
        epilog=EPILOG,
    )
    add_model(result)
    add = result.add_argument
    add("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    add("--prompts", type=expand, metavar="FILE", help="a prompt per line; -: standard input")
    add(
        "--max_new_tokens",
        type=whole_number(1),
        metavar="N",
        help="default: 256, or fewer where the model's positions end",
    )
    add("--allow_extrapolation", action="store_true", help="decode beyond the model's positions")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 (default): greedy")
    add("--top_p", type=float, default=1.0, metavar="P", help="draw from the likeliest tokens only")
    add("--top_k", type=whole_number(0), default=0, metavar="K", help="draw from K tokens; 0: all")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends a text; may be repeated")
    add("--seed", type=SEED, default=0, metavar="N", help="seeds the draws")
    add("--batch_size", type=whole_number(1), default=16, metavar="N", help="prompts together (16)")
    add("--compute_dtype", choices=("float32", "bfloat16"), default="float32")
    return result


def add_model(parser: ArgumentParser) -> None:
    """Adds the flags that name a model to open: --model, --adapter and --base."""
    kinds = "a Hugging Face checkpoint, a training run or a converted checkpoint"
    parser.add_argument("--model", required=True, **PATH_OR_ID, help=kinds)
    kinds = "a PEFT adapter of this model, or the LoRA run that made it"
    parser.add_argument("--adapter", type=expand, metavar="DIR", help=kinds)
    parser.add_argument("--base", **BASE)


def _prompts(args: argparse.Namespace) -> list[str]:
    """Returns all prompts, those of the file last."""
    prompts = list(args.prompt)
    if args.prompts == "-":
        prompts += _lines(sys.stdin.buffer.read(), "standard input")
    elif args.prompts is not None:
        prompts += _lines(read_bytes(Path(args.prompts)), args.prompts)
    if not prompts:
        raise UserError("there is no prompt: write --prompt TEXT, or --prompts FILE")
    return prompts


def _lines(content: bytes, source: str) -> list[str]:
    """Returns the lines that are not empty. Only \\n and \\r\\n end one."""
    lines = utf8(content, source).split("\n")
    return [line for line in (line.removesuffix("\r") for line in lines) if line]
