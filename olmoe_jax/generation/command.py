"""The command line of `python -m olmoe_jax.generate`: continues prompts with a model."""

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from olmoe_jax.data.arguments import add_chat_template
from olmoe_jax.errors import SEED, ArgumentParser, UserError, data_output, whole_number
from olmoe_jax.files import BASE, PATH_OR_ID, expand, read_bytes, utf8
from olmoe_jax.parallel.compilation import keep_programs
from olmoe_jax.sources import SUFFIXES

EPILOG = """examples:
  python -m olmoe_jax.generate --model runs/quickstart/hf --prompt "Question: 2 + 3?
  Answer:"
  python -m olmoe_jax.generate --model allenai/OLMoE-1B-7B-0125 --prompts questions.txt \\
      --adapter runs/densemixer_lora_gsm --stop "Question:" --temperature 0.7 --top_p 0.9
  echo "Once upon a time" | python -m olmoe_jax.generate --model runs/quickstart/hf --prompts -
  python -m olmoe_jax.generate --model runs/chat/hf --chat --system "Be brief."
  python -m olmoe_jax.generate --model runs/chat/hf --chat --prompts conversations.jsonl

For one prompt the command prints its continuation, for several a line of JSON each.

With --chat a prompt is a user's message, and the model's answer is printed. --prompts FILE is then
a data file with a conversation a row, {"messages": [{"role": "user", "content": "Hello!"}]}; each
is printed as a line of JSON with the answer behind its messages. Without prompts, a line of the
standard input is a message, and each answer knows those before it: Ctrl-C stops an answer, Ctrl-C
or Ctrl-D at the prompt ends the session.
"""


def main(arguments: Sequence[str]) -> None:
    """Runs the command."""
    args = parser().parse_args(arguments)
    for flag in ("system", "chat_template"):
        if getattr(args, flag) is not None and not args.chat:
            raise UserError(f"--{flag} is for chats: add --chat, or leave the flag out")
    check_draws(args, args.temperature)
    _note_escapes(args)
    prompts = [] if args.chat else _prompts(args)
    keep_programs()

    import jax
    import jax.numpy as jnp

    import olmoe_jax
    from olmoe_jax.checkpoints.opening import open_source
    from olmoe_jax.generation import chat
    from olmoe_jax.model.config import ModelSettings
    from olmoe_jax.parallel import sharding

    source = open_source(args.model)
    spec = (args.chat_template or "auto") if args.chat else "none"
    format = chat.open_format(spec, source.files, args.adapter)
    conversations = []
    if args.chat:
        conversations = chat.read_conversations(args.prompt, args.prompts, args.system, format)
    mesh = sharding.decoding_mesh(source.config.num_experts)
    settings = ModelSettings(compute_dtype=jnp.dtype(args.compute_dtype))
    model = olmoe_jax.from_pretrained(
        args.model, mesh, settings=settings, adapter=args.adapter, base=args.base
    )
    generate = functools.partial(
        olmoe_jax.generate,
        model,
        format.tokenizer,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        stop=args.stop,
        seed=args.seed,
        batch_size=args.batch_size,
        allow_extrapolation=args.allow_extrapolation,
        ends=format.ends,
    )
    with jax.set_mesh(mesh):
        if not args.chat:
            _print_texts(prompts, generate(prompts, progress=len(prompts) > 1))
        elif conversations:
            turns = chat.answer(conversations, format, generate)
            for conversation, turn in zip(conversations, turns, strict=True):
                alone = len(turns) == 1 and args.prompts is None
                line = turn["content"] if alone else chat.as_json(conversation, turn)
                print(line, file=data_output())
        else:
            positions = source.config.max_position_embeddings
            room = positions - (args.max_new_tokens or min(256, positions // 2))
            room = sys.maxsize if args.allow_extrapolation else room
            chat.converse(chat.Session(format, generate, args.system, room), args.stop)


def _print_texts(prompts: Sequence[str], texts: Sequence[str]) -> None:
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
        description="Continues prompts with a model, or chats with it.",
        epilog=EPILOG,
    )
    add_model(result)
    add = result.add_argument
    add("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    add(
        "--prompts",
        type=expand,
        metavar="FILE",
        help="a prompt per line, or rows for --chat; -: standard input",
    )
    add(
        "--max_new_tokens",
        type=whole_number(1, 2**20),
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
    chat = result.add_argument_group("chat")
    chat.add_argument(
        "--chat",
        action="store_true",
        help="answer messages: those of --prompt, the conversations of --prompts, or what you type",
    )
    chat.add_argument("--system", metavar="TEXT", help="a system turn before each conversation")
    add_chat_template(
        chat, None, "default: auto, the model's own; none: turns are joined as without a template"
    )
    return result


def add_model(parser: ArgumentParser) -> None:
    """Adds the flags that name a model to open: --model, --adapter and --base."""
    kinds = "a Hugging Face checkpoint, a training run or a converted checkpoint"
    parser.add_argument("--model", required=True, **PATH_OR_ID, help=kinds)
    kinds = "a PEFT adapter of this model, or the LoRA run that made it"
    parser.add_argument("--adapter", type=expand, metavar="DIR", help=kinds)
    parser.add_argument("--base", **BASE)


def check_draws(args: argparse.Namespace, temperature: float) -> None:
    """Raises a `UserError` if a flag says how to draw, and decoding at `temperature` is greedy."""
    for flag, neutral in (("top_p", 1), ("top_k", 0)):
        value = getattr(args, flag)
        if not temperature and value not in (None, neutral):
            raise UserError(
                f"--{flag}={value}: greedy decoding draws no token; add e.g. --temperature 0.8, or "
                f"leave --{flag} out"
            )


def _note_escapes(args: argparse.Namespace) -> None:
    """Prints a line if a text of a flag has a backslash and an n, where a shell keeps both."""
    for flag in ("prompt", "stop", "system"):
        if "\\n" in "".join(getattr(args, flag) or ()):
            print(
                f"note: --{flag} holds \\n, a backslash and an n; where it is to end a line, write "
                f"--{flag} $'...\\n...'",
                file=sys.stderr,
            )


def _prompts(args: argparse.Namespace) -> list[str]:
    """Returns all prompts, those of the file last."""
    prompts = list(args.prompt)
    if args.prompts == "-":
        prompts += _lines(sys.stdin.buffer.read(), "standard input")
    elif args.prompts is not None:
        if args.prompts.endswith(SUFFIXES):
            raise UserError(
                f"--prompts {args.prompts}: holds rows, where a prompt is a line of a text file; "
                "write the prompts to one, or add --chat to answer rows of messages"
            )
        prompts += _lines(read_bytes(Path(args.prompts)), args.prompts)
    if not prompts:
        raise UserError("there is no prompt: write --prompt TEXT, or --prompts FILE")
    return prompts


def _lines(content: bytes, source: str) -> list[str]:
    """Returns the lines that are not empty. Only \\n and \\r\\n end one."""
    lines = utf8(content, source).split("\n")
    return [line for line in (line.removesuffix("\r") for line in lines) if line]
