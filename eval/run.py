"""Evaluates a model on tasks, and writes scores and predictions."""

import argparse
import functools
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.backends import BACKENDS, DTYPES, check_backend, open_backend
from eval.evaluation import MODEL, RESULT, SETTINGS, Decoding, evaluate, settings_of
from eval.outputs import open_output
from eval.tasks import TASKS, tasks_of
from eval.tasks.judged import JudgedTask
from eval.tasks.task import RunPrograms, Task, Tools, read_examples, source_of
from olmoe_jax.checkpoints import directory
from olmoe_jax.errors import SEED, ArgumentParser, UserError, run_command, whole_number
from olmoe_jax.files import absolute, expand, user_path
from olmoe_jax.generation.command import add_model
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
    tasks = tasks_of(args.tasks)
    decoding = _decoding(args)
    tools = Tools(run_programs=_sandbox(args, tasks))
    examples = {task.name: read_examples(task, args.data)[: args.limit] for task in tasks}
    check_backend(args.backend, args.model, args.adapter, args.base)
    server = _judge_server(args)
    judged = [task.name for task in tasks if isinstance(task, JudgedTask)]
    if server and not all((args.output / name / RESULT).exists() for name in judged):
        server.check()
    # The same content under another path is the same model.
    open_output(args.output, MODEL, _model(args), free=["model", "adapter"])
    settings = {
        task.name: settings_of(task, examples[task.name], decoding, args.limit)
        | {"source": source_of(task, args.data)[0]}
        for task in tasks
    }
    for name, asked in settings.items():
        # The same rows may come from elsewhere.
        open_output(args.output / name, SETTINGS, asked, free=["source"])
    if server:
        from eval.judge.judge import Judge

        judge = Judge(server, args.output / "judge.jsonl", args.judge_workers)
        tools = Tools(tools.run_programs, judge)
    backend = functools.cache(
        functools.partial(
            open_backend, args.backend, args.model, args.compute_dtype, args.adapter, args.base
        )
    )
    scores: dict[str, dict[str, float]] = {}
    for task in tasks:
        result = evaluate(
            task, examples[task.name], settings[task.name], args.output, backend, tools
        )
        _print_result(task.name, result)
        scores[task.name] = {name: score["value"] for name, score in result["metrics"].items()}
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
    add("--compute_dtype", choices=DTYPES, default="float32")
    add("--batch_size", type=whole_number(1), default=16, metavar="N", help="prompts together (16)")
    add("--max_new_tokens", type=whole_number(1), metavar="N", help="default: each task's own")
    add("--allow_extrapolation", action="store_true", help="read beyond the model's positions")
    code = result.add_argument_group("humaneval and mbpp")
    code.add_argument(
        "--allow_code_execution", action="store_true", help="run what the model wrote, in a sandbox"
    )
    code.add_argument(
        "--samples", type=whole_number(1, 10_000), default=1, metavar="N", help="for pass@k, k <= N"
    )
    code.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0: greedy")
    code.add_argument("--seed", type=SEED, default=0, help="of the samples")
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
        "compute_dtype": args.compute_dtype,
    }


def _decoding(args: argparse.Namespace) -> Decoding:
    if args.temperature < 0:
        raise UserError(f"--temperature={args.temperature}: must be 0 or more")
    if args.samples > 1 and args.temperature == 0:
        raise UserError(
            f"--samples={args.samples}: greedy samples are all the same; add e.g. --temperature 0.8"
        )
    if args.allow_extrapolation and args.backend == "vllm":
        raise UserError("--allow_extrapolation: --backend vllm cannot; leave one of them out")
    return Decoding(
        args.batch_size,
        args.max_new_tokens,
        args.samples,
        args.temperature,
        args.seed,
        args.allow_extrapolation,
    )


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


def _judge_server(args: argparse.Namespace) -> "Server | None":
    """Returns the judge's server, or None if no judge is named."""
    model = args.judge_model or os.environ.get("JUDGE_MODEL")
    url = args.judge_url or os.environ.get("JUDGE_BASE_URL")
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
