"""Times the whole job against transformers' Trainer: python -m benchmarks.whole_job --help

A model of random weights (the shape `mid` of benchmarks.step) is fine-tuned for some steps on rows
of GSM8K's format, on the same examples by both sides: by train.py, which packs them, and by
pytorch_trainer, which pads them. A side's time is that from the command to the end of its process,
tokenisation and the model's export included. Ours runs twice in a round: without compiled programs
(cold), and with those of the first run (warm).
"""

import argparse
import functools
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.compare_pytorch import VENVS, make_venv
from benchmarks.machine import machine
from benchmarks.shapes import add_shape_flags, shape_of
from benchmarks.timing import in_rounds
from olmoe_jax.errors import ArgumentParser, UserError, run_command, whole_number
from olmoe_jax.files import user_path
from olmoe_jax.root import ROOT

RATE = 1e-4
VENV = "transformers5"


def main(arguments: Sequence[str]) -> None:
    parser = ArgumentParser(prog="python -m benchmarks.whole_job", description=__doc__)
    add_shape_flags(parser)
    parser.set_defaults(vocab=50304)  # that of OLMoE's tokenizer
    parser.add_argument("--data", type=user_path, required=True, help="GSM8K's train.jsonl")
    parser.add_argument("--tokenizer", type=user_path, required=True, help="its directory")
    parser.add_argument("--steps", type=whole_number(1), default=20)
    parser.add_argument("--batch_size", type=whole_number(1), default=8, help="examples per step")
    parser.add_argument("--rounds", type=whole_number(1), default=3)
    parser.add_argument("--venvs", type=user_path, default=ROOT / "build" / "pytorch")
    args = parser.parse_args(arguments)
    venv = args.venvs.absolute() / VENV
    make_venv(venv, VENVS[VENV])
    with tempfile.TemporaryDirectory() as temporary:
        inputs = Path(temporary)
        write_inputs(inputs, args)
        warm = functools.partial(run, ours(inputs, args), inputs)

        def cold() -> tuple[float, float]:
            shutil.rmtree(inputs / "compiled", ignore_errors=True)
            return warm()

        trainer = functools.partial(run, theirs(venv, inputs, args), inputs)
        sides = {"ours, cold": cold, "ours, warm": warm, "Trainer": trainer}
        runs = in_rounds(sides, args.rounds)
    seconds = {side: [taken for taken, _ in of_side] for side, of_side in runs.items()}
    median_of_warm = statistics.median(seconds["ours, warm"])
    print(f"{machine()}\n")
    print("| side | seconds | times ours, warm | loss at the end |\n| --- | --- | --- | --- |")
    for side, times in seconds.items():
        each = ", ".join(f"{value:.1f}" for value in times)
        ratio, loss = statistics.median(times) / median_of_warm, runs[side][-1][1]
        print(f"| {side} | {each} | {ratio:.2f} | {loss:.3f} |")


def write_inputs(path: Path, args: argparse.Namespace) -> None:
    """Writes rows.jsonl and model/, random weights with their tokenizer, to `path`."""
    count = args.steps * args.batch_size
    with open(args.data, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in itertools.islice(lines, count)]
    if len(rows) < count:
        raise UserError(f"{args.data}: has {len(rows)} rows; write fewer --steps")
    with open(path / "rows.jsonl", "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({"prompt": row["question"], "completion": row["answer"]}) + "\n")
    shutil.copytree(args.tokenizer, path / "start")
    config = shape_of(args).hf_config() | {"architectures": ["OlmoeForCausalLM"]}
    (path / "start" / "config.json").write_text(json.dumps(config))
    start = path / "start"
    once = ("--config.model.init=random", f"--config.model.config_path={start}")
    run(
        [*ours(path, args), *once, f"--config.model.path={start}", "--config.train.max_steps=1"],
        path,
    )
    (path / "output" / "hf").rename(path / "model")


def ours(inputs: Path, args: argparse.Namespace) -> list[str | Path]:
    """Returns the command that trains with train.py."""
    fields = {
        "model.path": inputs / "model",
        "model.compute_dtype": "float32",
        "model.remat": "selective",
        "data.train_path": inputs / "rows.jsonl",
        "data.eval_path": None,
        "data.eval_fraction": 0.0,
        "optimizer.learning_rate": RATE,
        "train.output_dir": inputs / "output",
        "train.batch_size": args.batch_size,
        "train.microbatch_examples": args.batch_size,
        "train.max_steps": args.steps,
    }
    command = [sys.executable, ROOT / "train.py", "--config", ROOT / "configs/conventional_gsm.py"]
    return [*command, *(f"--config.{name}={value}" for name, value in fields.items())]


def theirs(venv: Path, inputs: Path, args: argparse.Namespace) -> list[str | Path]:
    """Returns the command that trains with transformers."""
    flags = {
        "model": inputs / "model",
        "data": inputs / "rows.jsonl",
        "output": inputs / "output",
        "batch_size": args.batch_size,
        "steps": args.steps,
        "learning_rate": RATE,
    }
    command = [venv / "bin" / "python", "-m", "benchmarks.pytorch_trainer"]
    return [*command, *(f"--{name}={value}" for name, value in flags.items())]


def run(command: Sequence[str | Path], inputs: Path) -> tuple[float, float]:
    """Runs a side that trains; returns the seconds it took and the last loss that it printed."""
    for left in ("output", "cache"):  # cache: tokens
        shutil.rmtree(inputs / left, ignore_errors=True)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(inputs / "compiled"),
        "OLMOE_JAX_CACHE": str(inputs / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    started = time.perf_counter()
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - started
    losses = re.findall(r"loss (?:of the last step: )?([0-9.]+)", result.stdout)
    if result.returncode or not losses:
        raise UserError(f"{command[1]}: {(result.stderr or result.stdout)[-500:]}")
    return seconds, float(losses[-1])


if __name__ == "__main__":
    run_command(main)
