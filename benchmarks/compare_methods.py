"""All eight methods on one small model: pretrains it on text, fine-tunes it, compares.

    python benchmarks/compare_methods.py --text BOOK.txt [BOOK.txt …] --task ROWS.jsonl \\
        --output runs/compare_methods

The model has about 7M parameters, a tokenizer trained on the text and the task, and OLMoE's ratio
of experts to active experts. A tenth of the task's rows is held out. Every cell (method, seed)
runs in a process of its own and is cached in OUTPUT: run the command again to continue. Writes
table.md, cosines.md and comparison.png there; --report only writes these again.
"""

import argparse
import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.comparison_report import write_report
from configs.table import ESFT, LORA, METHODS, experiment
from olmoe_jax.config import Config, DataOptions, ModelOptions
from olmoe_jax.errors import run_command
from olmoe_jax.hf import directory

# One per family of methods, the same for all its members.
LEARNING_RATES = {"full": 1e-3, "lora": 3e-3, "esft": 1e-3}
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
CHARACTERS_PER_ROW = 800
BATCH_SIZE = 32
ROW_LENGTH = 256
ROWS = 8
LONGEST_ANSWER = 96


def main(arguments: Sequence[str]) -> None:
    """Runs the cells that are not there yet, then reports."""
    args = parse(arguments)
    if args.cell:
        name, seed = args.cell
        cell = run_base(args) if name == "base" else run_cell(args, name, int(seed))
        directory.write_json(cell_file(args.output, name, seed), cell)
        return
    cells = [("base", 0), *((method, seed) for seed in range(args.seeds) for method in METHODS)]
    if not args.report:
        (args.output / "cells").mkdir(parents=True, exist_ok=True)
        write_inputs(args.output / "inputs", args.text, args.task)
        for name, seed in cells:
            if not cell_file(args.output, name, seed).exists():
                run_in_process(args.output, [*arguments, "--cell", name, str(seed)])
    files = {cell: cell_file(args.output, *cell) for cell in cells}
    write_report({c: directory.read_json(f) for c, f in files.items() if f.exists()}, args.output)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", nargs="+", type=Path, required=True, help="to pretrain on")
    parser.add_argument("--task", type=Path, required=True, help="rows (.jsonl) to fine-tune on")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pretrain_steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=80, help="of fine-tuning, of every method")
    parser.add_argument("--examples", type=int, default=200, help="held-out rows to answer")
    parser.add_argument("--report", action="store_true", help="only report the cells in OUTPUT")
    parser.add_argument("--cell", nargs=2, metavar=("METHOD", "SEED"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def run_in_process(output: Path, arguments: Sequence[str]) -> None:
    """This script in a process of its own; all of them share what they compile."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(output / "compiled")}
    command = [sys.executable, __file__, *arguments]
    if code := subprocess.run(command, env=environment, check=False).returncode:
        sys.exit(code)


def cell_file(output: Path, name: str, seed: int | str) -> Path:
    return output / "cells" / f"{name}_{seed}.json"


def write_inputs(path: Path, texts: Sequence[Path], task: Path) -> None:
    """The rows to pretrain on, the task's two parts, a tokenizer and config.json."""
    from olmoe_jax.data.formats import format_row
    from olmoe_jax.quickstart import train_tokenizer

    if path.exists():
        return
    lines = task.read_text(encoding="utf-8").splitlines()
    order = np.random.default_rng(0).permutation(len(lines))
    held_out, trained = np.split(order, [max(1, len(lines) // 10)])
    rows = [format_row(json.loads(lines[i]), "") for i in trained]
    text = "\n".join(file.read_text(encoding="utf-8") for file in texts)
    # The questions too, without their answers: the base should know the task's characters.
    questions = "\n".join(row.boundaries[0] for row in rows)
    chunks = [
        part[start : start + size]
        for part, size in ((text, CHARACTERS_PER_ROW), (questions, CHARACTERS_PER_ROW // 2))
        for start in range(0, len(part), size)
    ]
    with directory.new_directory(path) as partial:
        write_rows(partial / "text.jsonl", [{"prompt": "", "completion": c} for c in chunks])
        write_rows(partial / "eval.jsonl", [json.loads(lines[i]) for i in held_out])
        write_rows(partial / "train.jsonl", [json.loads(lines[i]) for i in trained])
        vocabulary = train_tokenizer([text, *(row.text for row in rows)], VOCABULARY, partial)
        directory.write_json(partial / "config.json", MODEL | vocabulary)


def write_rows(file: Path, rows: list[dict]) -> None:
    dump = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.write_text(dump, encoding="utf-8")


def run_config(config: Config, output: Path, max_steps: int, **options) -> Config:
    """`config` as a run that keeps its last checkpoint only."""
    train = dataclasses.replace(
        config.train,
        **options,
        output_dir=str(output),
        epochs=1000,
        max_steps=max_steps,
        rows_per_device=ROWS,
        checkpoint_every=max_steps,
        keep_checkpoints=1,
    )
    return dataclasses.replace(config, train=train)


def run_base(args: argparse.Namespace) -> dict:
    """Pretrains the model that all cells start from."""
    import olmoe_jax

    inputs, config = str(args.output / "inputs"), experiment("conventional", "gsm")
    config = dataclasses.replace(
        run_config(config, args.output / "base", args.pretrain_steps, batch_size=ROWS),
        model=ModelOptions(
            path=inputs, init="random", config_path=inputs, compute_dtype="float32", remat="none"
        ),
        data=DataOptions(
            train_path=f"{inputs}/text.jsonl", eval_fraction=0.01, max_seq_length=ROW_LENGTH
        ),
        # OLMoE's own weight of the load-balancing loss.
        method=dataclasses.replace(config.method, router_aux_loss_coefficient=0.01),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=3e-3, schedule="cosine"),
    )
    run = olmoe_jax.train(config).output_dir
    model, (batches, targets) = olmoe_jax.from_pretrained(run), held_out_batches(Path(inputs))
    return {
        "eval_loss": held_out_loss(model, batches, targets),
        **answer(args, run),
        "cosines": router_cosines(model, batches[len(batches) // 2]),
        "trained_parameters": trained_parameters(run),
    }


def cell_config(args: argparse.Namespace, method: str, seed: int) -> Config:
    """Fine-tuning of the base with one method and seed."""
    inputs, config = args.output / "inputs", experiment(method, "intent")
    family = "lora" if method in LORA else "esft" if method in ESFT else "full"
    details = {
        "full": {},
        "lora": {"lora_rank": 8, "lora_alpha": 16.0},
        "esft": {"esft_score_tokens": 50_000},
    }
    run = args.output / "runs" / f"{method}_{seed}"
    return dataclasses.replace(
        run_config(config, run, args.steps, batch_size=BATCH_SIZE, seed=seed, export_hf=False),
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
    )


def run_cell(args: argparse.Namespace, method: str, seed: int) -> dict:
    """Fine-tunes with one method and seed; returns what the report shows of it."""
    import olmoe_jax
    from olmoe_jax.training.run_directory import read_metrics

    config = cell_config(args, method, seed)
    run = olmoe_jax.train(config).output_dir
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
    lines = read_metrics(run)
    seconds = [line["seconds"] for line in lines if "seconds" in line]
    cell = {
        "eval_loss": next(line["eval_loss"] for line in lines[::-1] if "eval_loss" in line),
        **answer(args, run),
        "trained_parameters": trained_parameters(run),
        "seconds": seconds,
        "peak_memory": peak,
    }
    if method not in ESFT and config.method.name != "frozen":
        batches, _ = held_out_batches(args.output / "inputs")
        model = olmoe_jax.from_pretrained(run)
        cell["cosines"] = router_cosines(model, batches[len(batches) // 2])
    shutil.rmtree(run)  # 100 MB, and all that is asked of it is in the cell
    return cell


def trained_parameters(run: Path) -> int:
    """How many numbers the run's checkpoint holds as trained."""
    from olmoe_jax.hf.opening import RunCheckpoint

    return sum(value.size for value in RunCheckpoint(run).trained().values())


def answer(args: argparse.Namespace, checkpoint: Path) -> dict:
    """The model's answers to held-out rows, and the share that is exactly right."""
    import olmoe_jax
    from olmoe_jax.data import load_tokenizer
    from olmoe_jax.data.formats import format_row

    inputs = args.output / "inputs"
    lines = (inputs / "eval.jsonl").read_text(encoding="utf-8").splitlines()[: args.examples]
    rows = [format_row(json.loads(line), "") for line in lines]
    prompts = [row.boundaries[0] for row in rows]
    answers = olmoe_jax.generate(
        olmoe_jax.from_pretrained(checkpoint),
        load_tokenizer(str(inputs)),
        prompts,
        max_new_tokens=LONGEST_ANSWER,
        batch_size=len(prompts),
    )
    right = [
        value(answer) == value(row.text[len(prompt) :])
        for answer, row, prompt in zip(answers, rows, prompts, strict=True)
    ]
    return {"exact_match": sum(right) / len(right), "answers": answers}


def value(answer: str):
    """What an answer says: JSON where it is that, with or without a full stop behind it."""
    answer = answer.strip()
    try:
        return json.loads(answer.rstrip("。"))
    except ValueError:
        return answer


def held_out_batches(inputs: Path) -> tuple[list, int]:
    """The held-out rows in packed batches, and the number of their targets."""
    from olmoe_jax import data
    from olmoe_jax.training.step import DeviceBatch

    tokenizer = data.load_tokenizer(str(inputs))
    dataset = data.tokenize_dataset(
        str(inputs / "eval.jsonl"), tokenizer=tokenizer, max_seq_length=ROW_LENGTH, cache_dir=None
    )
    batches = data.evaluation_batches(
        dataset,
        max_seq_length=ROW_LENGTH,
        pack=True,
        rows_per_batch=ROWS,
        pad_id=tokenizer.pad_token_id,
    )
    placed = [DeviceBatch(*(getattr(b, name) for name in DeviceBatch._fields)) for b in batches]
    return placed, int(dataset.target_counts.sum())


def trainer(model, **settings):
    """A `Trainer` for the model's loss and gradients alone."""
    from olmoe_jax.model.config import ModelSettings
    from olmoe_jax.training.step import Trainer

    return Trainer(model.config, ModelSettings(**settings), None, None, 1.0)


def held_out_loss(model, batches: list, targets: int) -> float:
    """Loss per target."""
    import jax

    from olmoe_jax.model.parameters import split

    loss, parameters = jax.jit(trainer(model).loss), split(model)[1]
    return sum(float(loss({}, parameters, batch)[0]) for batch in batches) / targets


def router_cosines(model, batch) -> dict[str, float]:
    """Cosine of DenseMixer's router gradient for m experts with the exact one, by m.

    m is K, 2K, 4K and E. The one for m = K is the conventional gradient.

    Args:
      model: an `Olmoe`.
      batch: a `DeviceBatch`.
    """
    per_token, experts = model.config.num_experts_per_token, model.config.num_experts
    limits = sorted({min(per_token * factor, experts) for factor in (1, 2, 4)} | {experts})
    gradients = {limit: router_gradient(model, batch, limit) for limit in limits}
    exact = gradients[experts]
    norm = np.linalg.norm
    return {str(m): float(g @ exact / (norm(g) * norm(exact))) for m, g in gradients.items()}


def router_gradient(model, batch, limit: int) -> np.ndarray:
    """DenseMixer's gradient, for m = `limit`, of all layers' router weights [L * D * E]."""
    import jax

    from olmoe_jax.model.parameters import split
    from olmoe_jax.training.methods import ROUTER

    frozen = split(model)[1]
    router = {ROUTER: frozen.pop(ROUTER)}
    loss = trainer(model, router_method="densemixer", router_gradient_experts=limit).loss
    gradients, _ = jax.jit(jax.grad(loss, has_aux=True))(router, frozen, batch)
    return np.asarray(gradients[ROUTER], np.float64).ravel()


if __name__ == "__main__":
    run_command(main)
