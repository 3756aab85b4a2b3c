"""Reproduces the table of the paper: trains and evaluates every method on every data set.

Every step is a command of its own, which is printed. A step whose result is there is not done
again, and one that was interrupted continues: start the same command again.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from configs.table import DATASETS, EXPERIMENTS, FULL
from eval.outputs import open_output
from eval.reproduce import small
from eval.reproduce.cells import Reproduction, Runner, check_data
from eval.run import parser as eval_parser
from eval.tasks import PROTOCOLS
from olmoe_jax.config import ModelOptions
from olmoe_jax.errors import ArgumentParser, UserError, run_command
from olmoe_jax.files import PATH_OR_ID, absolute, user_path

ASKED = "reproduce.json"
_OWN_FLAGS = ("model", "tasks", "output", "data", "protocol")
_OWN_FIELDS = ("model.path", "train.output_dir", "train.export_hf", "method.experts_path")
"""Flags of eval.run and fields of a run that this command sets itself."""

EXAMPLE = f"""examples:
  python -m eval.reproduce --output runs/small --small
  python -m eval.reproduce --output runs/paper --eval.allow_code_execution --eval.batch_size=64
  python -m eval.reproduce --output runs/gsm --datasets gsm --methods {",".join(FULL)} \\
      --config.train.epochs=2 --eval.limit=200

--config.FIELD=VALUE goes to train.py, --eval.NAME[=VALUE] to eval.run as --NAME VALUE; a judge is
named by its variables (docs/evaluation.md). docs/reproduce.md says what it takes.
"""


def main(arguments: Sequence[str]) -> None:
    """Runs the command line."""
    args, rest = parser().parse_known_args(arguments)
    table = _reproduction(args, *_forwarded(rest))
    # Every mistake shows before the first command runs.
    table.check_fields()
    eval_parser().parse_args(["--model", "m", "--tasks", "gsm", "--output", "o", *table.evaluation])
    if "codealpaca" in table.datasets and "--allow_code_execution" not in table.evaluation:
        raise UserError(
            "codealpaca is evaluated by running programs that a model wrote: add "
            "--eval.allow_code_execution (they run in a sandbox, docs/evaluation.md), or name the "
            "other data sets with --datasets"
        )
    if args.data:
        check_data(args.data, table.datasets)
    if not (args.small or args.model):
        _check_accelerator()
    data = args.data or table.data
    asked = {
        # --small is yet to make its model.
        "model": os.path.abspath(table.model) if args.small else absolute(table.model),
        "data": os.path.abspath(data) if data else None,
        "config": dict(table.config),
        "evaluation": list(table.evaluation),
    }
    open_output(args.output, ASKED, asked)

    runner = Runner(args.output)
    if args.small:
        small.write_inputs(table, args.data, runner.run)
    commands = list(table.commands())
    for number, command in enumerate(commands, 1):
        if not command.done():
            print(f"[{number}/{len(commands)}] {command.name}", flush=True)
            runner.run(command)
        for path in filter(Path.exists, command.weights if args.discard_weights else ()):
            shutil.rmtree(path)
    runner.run(table.report())


def parser() -> ArgumentParser:
    """Returns the parser of this command's own flags."""
    result = ArgumentParser(prog="python -m eval.reproduce", description=__doc__, epilog=EXAMPLE)
    add = result.add_argument
    add("--output", required=True, type=user_path, metavar="DIR")
    add("--methods", metavar="NAMES", help=f"some of {','.join(EXPERIMENTS)}; default: all")
    add("--datasets", metavar="NAMES", help=f"some of {','.join(DATASETS)}; default: all")
    add("--model", **PATH_OR_ID, help=f"to start from; default: {ModelOptions().path}")
    add(
        "--data",
        type=user_path,
        metavar="DIR",
        help="local data files (docs/reproduce.md); default: the hub",
    )
    add(
        "--small",
        action="store_true",
        help="a small model, minutes on a CPU; without --data generated word problems for gsm "
        f"alone, with --data what lies there; by default {' and '.join(small.METHODS)}",
    )
    add("--protocol", choices=PROTOCOLS, default="ours", help="of the evaluations, see eval.run")
    add(
        "--discard_weights",
        action="store_true",
        help="delete a cell's checkpoints and export once it is evaluated: all hold terabytes",
    )
    return result


def _reproduction(
    args: argparse.Namespace, config: dict[str, str], evaluation: list[str]
) -> Reproduction:
    default = small.METHODS if args.small else EXPERIMENTS
    if args.protocol != "ours":
        evaluation = [f"--protocol={args.protocol}", *evaluation]
    methods = _names(args.methods, EXPERIMENTS, default, "methods")
    there = small.datasets(args.data) if args.small else list(DATASETS)
    datasets = _names(args.datasets, DATASETS, there, "datasets")
    if args.small and args.model:
        raise UserError("--model: --small makes its own; leave one of the two out")
    if args.small and not args.data and datasets != ["gsm"]:
        raise UserError(
            f"--datasets={args.datasets}: --small makes rows of gsm only; add --data DIR, or leave "
            "the flag out"
        )
    if not args.small and args.protocol == "ours":
        dtype = config.get("model.compute_dtype", ModelOptions().compute_dtype)
        evaluation = [f"--decode_dtype={dtype}", *evaluation]
    model = args.model or ModelOptions().path
    table = Reproduction(args.output, methods, datasets, model, args.data, config, evaluation)
    return small.small_reproduction(table) if args.small else table


def _names(
    text: str | None, known: Collection[str], default: Collection[str], flag: str
) -> list[str]:
    """Returns the names in a comma-separated list, each once."""
    names = dict.fromkeys(default if text is None else map(str.strip, text.split(",")))
    for name in names:
        if name not in known:
            raise UserError(f"--{flag}: there is no {name!r}; write some of {','.join(known)}")
    return list(names)


def _forwarded(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Returns the fields for train.py as {field: text}, and the flags for eval.run."""
    config, evaluation = {}, []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        field, flag = name.removeprefix("--config."), name.removeprefix("--eval.")
        if field != name and equals and field not in _OWN_FIELDS:
            config[field] = value
        elif flag != name and flag not in _OWN_FLAGS:
            evaluation.append(f"--{flag}{equals}{value}")
        else:
            raise UserError(
                f"{argument}: unknown, or set by this command; flags of others are "
                "--config.FIELD=VALUE and --eval.NAME=VALUE (see python -m eval.reproduce --help)"
            )
    return config, evaluation


def _check_accelerator() -> None:
    """Raises `UserError` if there is no GPU or TPU.

    A process of its own looks: this one must leave the devices to the commands.
    """
    command = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    if found == "cpu":
        raise UserError(
            "jax sees no GPU or TPU here, and OLMoE-1B-7B needs them: add --small to see all steps "
            "with a small model, or name one with --model"
        )


if __name__ == "__main__":
    run_command(main)
