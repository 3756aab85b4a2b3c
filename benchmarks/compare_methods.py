"""All eight methods on one small model: it is pretrained on text, fine-tuned, and compared.

    python -m benchmarks.compare_methods --text BOOK.txt [BOOK.txt …] --task ROWS.jsonl \\
        --output runs/compare_methods

The model has about 7M parameters, 32 experts of which a token selects 4 (OLMoE: 8 of 64), and a
tokenizer trained on the text and the task. A tenth of the task's rows is held out. Without --task
the rows are the quickstart's word problems. Every cell (method, seed) runs in its own process and
is cached in OUTPUT: run the command again to continue. OUTPUT gets table.md, cosines.md and
comparison.png; --report only writes these again.
"""

import argparse
import dataclasses
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.comparison_report import write_report
from configs.table import ESFT, EXPERIMENTS, LORA, experiment
from olmoe_jax.checkpoints import directory
from olmoe_jax.config import Config, DataOptions, ModelOptions, TrainOptions
from olmoe_jax.errors import ArgumentParser, UserError, run_command
from olmoe_jax.files import read_json

# Chosen by a few short trials on a part of the training rows.
LEARNING_RATES = {"full": 3e-3, "lora": 1e-2, "esft": 1e-2}
MODEL = {
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.02,
    "torch_dtype": "float32",
}
VOCABULARY = 4096
ROW_LENGTH = 256  # tokens
ROWS = 8  # per step of pretraining
BATCH_SIZE = 32  # examples per step of fine-tuning
BATCH_ROWS = 6  # per micro-batch; the word problems of a step fit into 5 or 6 rows
LONGEST_ANSWER = 96  # tokens
WORD_PROBLEMS = 6000


def main(arguments: Sequence[str]) -> None:
    """Runs the cells that have no result yet, then reports."""
    args = parse(arguments)
    if args.cell:
        name, seed = args.cell
        cell = run_base(args) if name == "base" else run_cell(args, name, int(seed))
        directory.write_json(cell_file(args.output, name, seed), cell)
        return
    cells = [("base", 0), *((method, seed) for seed in range(args.seeds) for method in EXPERIMENTS)]
    if not args.report:
        (args.output / "cells").mkdir(parents=True, exist_ok=True)
        write_inputs(args.output / "inputs", args.text, args.task, args.examples)
        for name, seed in cells:
            if not cell_file(args.output, name, seed).exists():
                run_in_process(args.output, [*arguments, "--cell", name, str(seed)])
    files = {cell: cell_file(args.output, *cell) for cell in cells}
    found = {cell: read_json(dict[str, Any], file) for cell, file in files.items() if file.exists()}
    if not found:
        raise UserError(f"{args.output}: no cell to report; run without --report")
    write_report(found, args.output)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Returns the command line's values."""
    parser = ArgumentParser(prog="python -m benchmarks.compare_methods", description=__doc__)
    parser.add_argument("--text", nargs="+", type=Path, required=True, help="files to pretrain on")
    parser.add_argument("--task", type=Path, help="rows (.jsonl) to fine-tune on")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pretrain_steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=200, help="fine-tuning steps of every method")
    parser.add_argument("--examples", type=int, default=200, help="held-out rows to evaluate")
    parser.add_argument("--report", action="store_true", help="only report the cells in OUTPUT")
    parser.add_argument("--cell", nargs=2, metavar=("METHOD", "SEED"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def run_in_process(output: Path, arguments: Sequence[str]) -> None:
    """Runs this script in its own process. All such processes share a compilation cache."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(output / "compiled")}
    command = [sys.executable, "-m", "benchmarks.compare_methods", *arguments]
    if code := subprocess.run(command, env=environment, check=False).returncode:
        sys.exit(code)


def cell_file(output: Path, name: str, seed: int | str) -> Path:
    """Returns the path of a cell's result."""
    return output / "cells" / f"{name}_{seed}.json"


def write_inputs(path: Path, texts: Sequence[Path], task: Path | None, examples: int) -> None:
    """Writes the rows to pretrain on, the task's two parts, a tokenizer and config.json."""
    from olmoe_jax.data.formats import format_row
    from olmoe_jax.quickstart import examples as word_problems
    from olmoe_jax.quickstart import train_tokenizer

    if path.exists():
        return
    if task:
        rows = [json.loads(line) for line in task.read_text(encoding="utf-8").splitlines()]
    else:
        rows = word_problems(WORD_PROBLEMS, seed=0)
    order = np.random.default_rng(0).permutation(len(rows))
    held_out, trained = ([rows[i] for i in part] for part in np.split(order, [len(rows) // 10]))
    formatted = [format_row(row, "") for row in trained]
    text = "\n".join(file.read_text(encoding="utf-8") for file in texts)
    # The base reads the questions, without their answers, to know the task's characters.
    questions = "\n".join(row.text[: row.spans[0][0]] for row in formatted)
    with directory.new_directory(path) as partial:
        write_rows(partial / "text.jsonl", text_rows(text, 800) + text_rows(questions, 400))
        write_rows(partial / "eval.jsonl", held_out[:examples])
        write_rows(partial / "train.jsonl", trained)
        known = [text, *(row.text for row in formatted)]
        vocabulary = train_tokenizer(known, VOCABULARY, partial)
        directory.write_json(partial / "config.json", MODEL | vocabulary)


def text_rows(text: str, size: int) -> list[dict[str, str]]:
    """Returns plain text in rows of `size` characters, about ROW_LENGTH tokens."""
    starts = range(0, len(text), size)
    return [{"prompt": "", "completion": text[start : start + size]} for start in starts]


def write_rows(file: Path, rows: list[dict]) -> None:
    """Writes a .jsonl file."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.write_text(lines, encoding="utf-8")


def run_base(args: argparse.Namespace) -> dict[str, Any]:
    """Pretrains the model that all cells start from. Returns its numbers on the task."""
    import olmoe_jax
    from benchmarks.router_cosine import held_out_batches, held_out_loss, router_cosines

    inputs = args.output / "inputs"
    config = experiment("conventional", "gsm")
    config = dataclasses.replace(
        config,
        model=ModelOptions(
            path=str(inputs),
            init="random",
            config_path=str(inputs),
            compute_dtype="float32",
            remat="none",
        ),
        data=DataOptions(
            train_path=str(inputs / "text.jsonl"), eval_fraction=0.01, max_seq_length=ROW_LENGTH
        ),
        # The weight of the load-balancing loss in OLMoE's pretraining.
        method=dataclasses.replace(config.method, router_aux_loss_coefficient=0.01),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=3e-3, schedule="cosine"),
        train=train_options(
            config, args.output / "base", args.pretrain_steps, batch_size=ROWS, rows_per_device=ROWS
        ),
    )
    run = olmoe_jax.train(config).output_dir
    model = olmoe_jax.from_pretrained(run)
    batches, targets = held_out_batches(inputs, ROW_LENGTH, ROWS)
    return {
        "eval_loss": held_out_loss(model, batches, targets),
        **answer(args, run),
        "cosines": router_cosines(model, batches[len(batches) // 2]),
    }


def train_options(config: Config, output: Path, steps: int, **options: Any) -> TrainOptions:
    """Returns `config.train` for a run of `steps` steps that keeps its last checkpoint only."""
    return dataclasses.replace(
        config.train,
        output_dir=str(output),
        epochs=1000,
        max_steps=steps,
        checkpoint_every=steps,
        keep_checkpoints=1,
        **options,
    )


def cell_config(args: argparse.Namespace, method: str, seed: int) -> Config:
    """Returns the configuration that fine-tunes the base with one method and seed."""
    inputs, run = args.output / "inputs", args.output / "runs" / f"{method}_{seed}"
    config = experiment(method, "intent")
    family = "lora" if method in LORA else "esft" if method in ESFT else "full"
    details = {"full": {}, "lora": {"lora_rank": 8}, "esft": {"esft_score_tokens": 50_000}}
    return dataclasses.replace(
        config,
        model=ModelOptions(
            path=str(args.output / "base" / "hf"), compute_dtype="float32", remat="none"
        ),
        data=DataOptions(
            train_path=str(inputs / "train.jsonl"),
            eval_path=str(inputs / "eval.jsonl"),
            max_seq_length=ROW_LENGTH,
        ),
        method=dataclasses.replace(config.method, **details[family]),
        optimizer=dataclasses.replace(
            config.optimizer, learning_rate=LEARNING_RATES[family], warmup_ratio=0.05
        ),
        train=train_options(
            config,
            run,
            args.steps,
            batch_size=BATCH_SIZE,
            rows_per_device=BATCH_ROWS,
            seed=seed,
            export_hf=False,
        ),
    )


def run_cell(args: argparse.Namespace, method: str, seed: int) -> dict[str, Any]:
    """Fine-tunes with one method and seed; returns what the report needs."""
    import olmoe_jax
    from benchmarks.router_cosine import held_out_batches, router_cosines
    from olmoe_jax.checkpoints.opening import RunCheckpoint
    from olmoe_jax.training.run_directory import read_metrics

    config = cell_config(args, method, seed)
    run = olmoe_jax.train(config).output_dir
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
    lines = read_metrics(run)
    cell = {
        "eval_loss": next(line.eval_loss for line in lines[::-1] if line.eval_loss is not None),
        **answer(args, run),
        "trained_parameters": sum(value.size for value in RunCheckpoint(run).trained().values()),
        "seconds": [line.seconds for line in lines if line.seconds is not None],
        "peak_memory": peak,
    }
    if config.method.name in ("conventional", "densemixer"):
        batches, _ = held_out_batches(args.output / "inputs", ROW_LENGTH, ROWS)
        model = olmoe_jax.from_pretrained(run)
        cell["cosines"] = router_cosines(model, batches[len(batches) // 2])
    shutil.rmtree(run)  # The run is large, and the cell has all that the report needs.
    return cell


def answer(args: argparse.Namespace, checkpoint: Path) -> dict[str, Any]:
    """Generates answers to the held-out rows. Returns the share of right ones and ten examples."""
    import olmoe_jax
    from olmoe_jax.data import load_tokenizer
    from olmoe_jax.data.formats import format_row

    inputs = args.output / "inputs"
    lines = (inputs / "eval.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [format_row(json.loads(line), "") for line in lines]
    prompts = [row.text[: row.spans[0][0]] for row in rows]
    answers = olmoe_jax.generate(
        olmoe_jax.from_pretrained(checkpoint),
        load_tokenizer(str(inputs)),
        prompts,
        max_new_tokens=LONGEST_ANSWER,
        batch_size=len(prompts),
    )
    expected = [row.text[row.spans[0][0] :] for row in rows]
    return {**score(answers, expected), "answers": answers[:10]}


def score(answers: Sequence[str], expected: Sequence[str]) -> dict[str, Any]:
    """Returns the share of right answers and, for JSON objects, of right first fields."""
    pairs = [(answer_value(a), answer_value(b)) for a, b in zip(answers, expected, strict=True)]
    result = {"exact_match": sum(a == b for a, b in pairs) / len(pairs)}
    if all(isinstance(b, dict) and b for _, b in pairs):
        name = next(iter(pairs[0][1]))
        same = [isinstance(a, dict) and a.get(name) == b.get(name) for a, b in pairs]
        result |= {"first_field": name, "first_field_match": sum(same) / len(same)}
    return result


def answer_value(text: str) -> Any:
    """Returns what an answer says: the number after ####, JSON's value, or the stripped text.

    JSON may end with a full stop.
    """
    if number := re.search(r"####\s*(\S+)", text):
        return number[1]
    try:
        return json.loads(text.strip().removesuffix("。"))
    except ValueError:
        return text.strip()


if __name__ == "__main__":
    run_command(main)
