"""Evaluates a model on tasks, and writes scores and predictions."""

import argparse
import dataclasses
import functools
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.backends import BACKENDS, DTYPES, Backend, Prompts, check_backend, open_backend
from eval.evaluation import (
    MODEL,
    PREDICTIONS,
    RESULT,
    SETTINGS,
    Decoding,
    digest,
    evaluate,
    settings_of,
)
from eval.outputs import open_output
from eval.predictions import begun
from eval.tasks import PROTOCOLS, TASKS, tasks_of
from eval.tasks.judged import JudgedTask
from eval.tasks.task import RunPrograms, Task, Tools, read_examples, source_of
from olmoe_jax.checkpoints import directory
from olmoe_jax.data.arguments import add_chat_template
from olmoe_jax.errors import SEED, ArgumentParser, UserError, run_command, whole_number
from olmoe_jax.files import PATH_OR_ID, absolute, expand, user_path
from olmoe_jax.generation.command import add_model, check_draws
from olmoe_jax.parallel.compilation import keep_programs
from olmoe_jax.parallel.cpu import restart_with_huge_pages, use_all_cores

if TYPE_CHECKING:
    from eval.judge.client import Server

EXAMPLE = """examples:
  python -m eval.run --model runs/densemixer_gsm --tasks gsm --output runs/densemixer_gsm/eval
  python -m eval.run --model runs/quickstart/hf --tasks gsm,intent,law --output results \\
      --data data --limit 20 --max_new_tokens 64
  JUDGE_API_KEY=… python -m eval.run --model olmoe_law --tasks law --output results_law \\
      --judge_url https://api.example.com/v1 --judge_model some-model

The same command continues an evaluation that was interrupted.
"""


def main(arguments: Sequence[str]) -> None:
    """Runs the command line."""
    keep_programs()
    args = parser().parse_args(arguments)
    directory.check_writable(args.output)
    tasks = tasks_of(args.tasks, args.protocol)
    decoding = _decoding(args, tasks)
    tools = Tools(run_programs=_sandbox(args, tasks))
    examples = {task.name: read_examples(task, args.data)[: args.limit] for task in tasks}
    check_backend(args.backend, args.model, args.adapter, args.base)
    judged = [task.name for task in tasks if isinstance(task, JudgedTask)]
    server, questions = _judge(args, judged)
    prompts = _prompts(args)
    decoding = dataclasses.replace(decoding, chat_template=prompts.template)
    if server and not all((args.output / name / RESULT).exists() for name in judged):
        server.check(questions.body(server.model, "Write yes."))
    # The same model and the same rows may lie elsewhere the next time. Other values are refused,
    # unless nothing was decoded with the former ones, e.g. for want of memory.
    any_begun = any(begun(file) for file in args.output.glob(f"*/{PREDICTIONS}"))
    open_output(args.output, MODEL, _model(args), ["model", "adapter"], any_begun)
    settings = {
        task.name: settings_of(task, examples[task.name], decoding, args.limit)
        | {
            "source": source_of(task, args.data)[0],
            # In every protocol that of our own examples.
            "data": digest(read_examples(TASKS[task.name], args.data)[: args.limit]),
        }
        for task in tasks
    }
    for name, asked in settings.items():
        path = args.output / name
        open_output(path, SETTINGS, asked, ["source"], begun(path / PREDICTIONS))
    if server:
        from eval.judge.judge import Judge

        cache = args.output / "judge.jsonl"
        judge = Judge(server, questions, cache, args.judge_workers)
        tools = Tools(tools.run_programs, judge)
    if prompts.note:
        print(prompts.note)
    loaded: dict[str, Backend] = {}

    def model(dtype: str) -> Backend:
        if dtype not in loaded:
            loaded.clear()  # one model is in memory at a time
            loaded[dtype] = open_backend(
                args.backend,
                args.model,
                dtype,
                args.adapter,
                args.base,
                args.tokenizer,
                args.chat_template,
            )
        return loaded[dtype]

    scores: dict[str, dict[str, float]] = {}
    for task in tasks:
        asked = settings[task.name]
        backend = functools.partial(model, asked["decode_dtype"])
        result = evaluate(task, examples[task.name], asked, args.output, backend, tools)
        _print_result(task.name, result)
        how = [f"protocol {task.protocol}"] * (task.protocol != "ours")
        how += ["chat template"] * (args.chat_template != "none")
        label = task.name + (f" ({', '.join(how)})" if how else "")
        scores[label] = {name: score["value"] for name, score in result["metrics"].items()}
    print(f"wrote {args.output}")
    from olmoe_jax.checkpoints.card import add_results

    place = Path(args.adapter or args.model)
    for export in (place, place / "hf", place / "adapter"):  # an export, or a run's
        if args.limit is None and add_results(export, scores):
            print(f"added the scores to the model card in {export}")


def parser() -> ArgumentParser:
    """Returns the parser of all flags."""
    result = ArgumentParser(prog="python -m eval.run", description=__doc__, epilog=EXAMPLE)
    add_model(result)
    add = result.add_argument
    add("--tasks", required=True, metavar="NAMES", help=f"some of {','.join(TASKS)}")
    add("--output", required=True, type=user_path, metavar="DIR")
    add("--backend", choices=BACKENDS, default="jax")
    add(
        "--data",
        type=expand,
        metavar="DIR",
        help="local data files (docs/evaluation.md); default: the hub",
    )
    add("--limit", type=whole_number(1), metavar="N", help="only the first N rows of each task")
    add(
        "--protocol",
        choices=PROTOCOLS,
        default="ours",
        help="reference: prompts, decoding, cutting and scoring of the published evaluation",
    )
    add(
        "--decode_dtype",
        "--compute_dtype",
        choices=DTYPES,
        help="default: float32; with --protocol reference each task's own",
    )
    add("--tokenizer", **PATH_OR_ID, help="default: the model's")
    add_chat_template(
        result,
        "none",
        "make a user's turn of each prompt, by the model's template or a file's; default: none",
    )
    add("--batch_size", type=whole_number(1), default=16, metavar="N", help="prompts together (16)")
    add(
        "--max_new_tokens",
        type=whole_number(1, 2**20),
        metavar="N",
        help="default: each task's own",
    )
    add("--allow_extrapolation", action="store_true", help="read beyond the model's positions")
    add("--temperature", type=float, metavar="T", help="0: greedy; default: each task's own")
    add("--top_p", type=float, metavar="P", help="draw from the likeliest tokens only")
    add("--top_k", type=whole_number(0), metavar="K", help="draw from K tokens only; 0: all")
    add("--seed", type=SEED, default=0, help="of the draws")
    code = result.add_argument_group("humaneval and mbpp")
    code.add_argument(
        "--allow_code_execution", action="store_true", help="run what the model wrote, in a sandbox"
    )
    code.add_argument(
        "--samples", type=whole_number(1, 10_000), default=1, metavar="N", help="for pass@k, k <= N"
    )
    judge = result.add_argument_group(
        "judge of law, summary and translation", "JUDGE_API_KEY holds the key"
    )
    judge.add_argument("--judge_model", metavar="NAME", help="default: $JUDGE_MODEL, else no judge")
    judge.add_argument(
        "--judge_url",
        metavar="URL",
        help="an OpenAI-compatible server, up to /v1; default: $JUDGE_BASE_URL",
    )
    judge.add_argument(
        "--judge_prompts",
        type=user_path,
        metavar="DIR",
        help="system.txt, law.txt, summary.txt, translation.txt (--protocol reference)",
    )
    judge.add_argument(
        "--judge_workers", type=whole_number(1), default=8, metavar="N", help="requests at once (8)"
    )
    return result


def _model(args: argparse.Namespace) -> dict[str, str | None]:
    """Returns the content of model.json: what names the model, and how it computes."""
    from olmoe_jax.checkpoints.fingerprint import adapter_fingerprint, model_fingerprint

    return {
        "model": absolute(args.model),
        "fingerprint": model_fingerprint(args.model),
        "adapter": args.adapter and absolute(args.adapter),
        "adapter_fingerprint": adapter_fingerprint(args.adapter) if args.adapter else None,
        "backend": args.backend,
        "compute_dtype": args.decode_dtype or (None if args.protocol != "ours" else DTYPES[0]),
        "tokenizer": args.tokenizer and absolute(args.tokenizer),
    }


def _prompts(args: argparse.Namespace) -> Prompts:
    """Opens the tokenizer; a wrong model or template shows before anything is written."""
    from olmoe_jax.checkpoints.opening import open_source

    files = open_source(args.model, base=args.base).files
    prompts = Prompts(files, args.adapter, args.tokenizer, args.chat_template)
    prompts.text("Hello!")
    return prompts


def _decoding(args: argparse.Namespace, tasks: Sequence[Task]) -> Decoding:
    if args.temperature is not None and args.temperature < 0:
        raise UserError(f"--temperature={args.temperature}: must be 0 or more")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise UserError(f"--top_p={args.top_p}: must be above 0 and at most 1")
    if args.samples > 1 and not args.temperature:
        raise UserError(
            f"--samples={args.samples}: greedy samples are all the same; add e.g. --temperature 0.8"
        )
    own = max(task.temperature for task in tasks)
    check_draws(args, own if args.temperature is None else args.temperature)
    if args.allow_extrapolation and args.backend == "vllm":
        raise UserError("--allow_extrapolation: --backend vllm cannot; leave one of them out")
    asked = vars(args) | {"chat_template": None}  # known when the tokenizer is open
    return Decoding(**{field.name: asked[field.name] for field in dataclasses.fields(Decoding)})


def _sandbox(args: argparse.Namespace, tasks: Sequence[Task]) -> RunPrograms | None:
    """Returns the sandbox if a task needs it, and makes sure that it is allowed and works here."""
    code = [task.name for task in tasks if task.runs_code]
    if not code:
        return None
    if not args.allow_code_execution:
        raise UserError(
            f"--tasks {','.join(code)}: runs programs that the model wrote; add "
            "--allow_code_execution (they run in a sandbox, docs/evaluation.md), or leave the "
            "task out"
        )
    from eval import sandbox

    sandbox.check()
    return sandbox.run_all


def _judge(args: argparse.Namespace, tasks: Sequence[str]) -> "tuple[Server | None, Any]":
    """Returns the judge's server and the questions to it; None if no judge is named."""
    server = _judge_server(args)
    if args.protocol == "ours" and args.judge_prompts:
        raise UserError("--judge_prompts: add --protocol reference, or leave the flag out")
    if args.judge_prompts and not server:
        raise UserError("--judge_prompts: name a judge too (--judge_url), or leave the flag out")
    if not server or not tasks:
        return None, None
    if args.protocol == "ours":
        from eval.judge.prompts import OWN_QUESTIONS

        return server, OWN_QUESTIONS
    if not args.judge_prompts:
        raise UserError(
            "--protocol reference: the judge's words are not part of this project; add "
            "--judge_prompts DIR (docs/evaluation.md says where they are), or name no judge"
        )
    from eval.judge.prompts import ReferenceQuestions

    return server, ReferenceQuestions(args.judge_prompts, tasks)


def _judge_server(args: argparse.Namespace) -> "Server | None":
    """Returns the judge's server, or None if no judge is named."""
    model = args.judge_model or os.environ.get("JUDGE_MODEL")
    url = args.judge_url or os.environ.get("JUDGE_BASE_URL")
    if args.protocol == "reference" and url and not model:
        from eval.judge.prompts import REFERENCE_JUDGE

        model = REFERENCE_JUDGE
    if not model:
        if args.judge_url:
            raise UserError("--judge_url: name a model of that server too, with --judge_model")
        return None
    if not url:
        raise UserError(
            "--judge_model: its server is missing; add --judge_url URL (or set JUDGE_BASE_URL), "
            "e.g. http://localhost:8000/v1"
        )
    from eval.judge.client import Server

    return Server(url, model, os.environ.get("JUDGE_API_KEY", ""))


def _print_result(name: str, result: Mapping[str, Any]) -> None:
    for metric, value in result["metrics"].items():
        interval = "no interval: all rows score the same"
        if value["low"] is not None:
            interval = f"95% interval {value['low']:.2f} to {value['high']:.2f}"
        print(f"{name:12} {metric:12} {value['value']:6.2f}  ({interval}, {value['rows']} rows)")
    counts = {what: count for what, count in result["counts"].items() if count}
    if counts:
        print(f"{name:12} " + ", ".join(f"{what} {count}" for what, count in counts.items()))
    sys.stdout.flush()


if __name__ == "__main__":
    restart_with_huge_pages()
    use_all_cores()
    run_command(main)
