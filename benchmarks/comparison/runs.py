"""The comparison's work: pretrains a base, fine-tunes the base in a cell, and measures both."""

import dataclasses
import json
import resource
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import olmoe_jax
from benchmarks.comparison import measures
from benchmarks.comparison.base import (
    BASE_RATE,
    EXPERTS_PER_TOKEN,
    KNOWN_ROWS,
    ROW_LENGTH,
    base_config,
    other_start,
)
from benchmarks.comparison.cells import (
    ABLATION,
    LIMITED,
    Cell,
    Result,
    Study,
    append,
    chosen_rate,
    read,
)
from benchmarks.comparison.tasks import TASKS
from benchmarks.router_cosine import router_cosine, router_cosines
from configs.table import LORA, experiment
from eval.outputs import open_output
from olmoe_jax.checkpoints import directory
from olmoe_jax.checkpoints.metrics import read_metrics
from olmoe_jax.checkpoints.opening import RunCheckpoint
from olmoe_jax.config import Config, DataOptions, ModelOptions, TrainOptions
from olmoe_jax.errors import UserError
from olmoe_jax.model.parameters import ROUTER

BATCH_SIZE = 16  # examples per step
ROWS = {"descend": 1, "order": 4, "back": 3, "cipher": 1}
"""Rows per micro-batch: the examples of a step fit into so many."""
LORA_RANK = 8
TOP_EXPERTS = 4
"""How many of a task's experts of each layer are switched off, one in eight."""


def base_file(output: Path, experts_per_token: int) -> Path:
    """Returns the path of what is known of a base."""
    return output / f"base_{experts_per_token}.json"


def base_run(output: Path, experts_per_token: int) -> Path:
    """Returns the directory of a base's training run."""
    return output / f"base_{experts_per_token}"


def keep_study(output: Path, study: Study) -> None:
    """Keeps what a study's bases and runs have in common, or checks that they have.

    Raises:
      UserError: `output` is of another study.
    """
    fixed = ("pretrain_steps", "pretrain_rows", "other_steps", "epochs")
    open_output(output, "study.json", {name: getattr(study, name) for name in fixed})


def pretrain(output: Path, experts_per_token: int, study: Study) -> None:
    """Pretrains a base, or continues to, and writes what its experts do."""
    inputs, run = output / "inputs", base_run(output, experts_per_token)
    start, steps = None, study.pretrain_steps
    if experts_per_token != EXPERTS_PER_TOKEN:
        first = base_run(output, EXPERTS_PER_TOKEN) / "hf"
        start = other_start(first, output / f"start_{experts_per_token}", experts_per_token)
        steps = study.other_steps
    trained(base_config(inputs, start, run, steps))
    model = olmoe_jax.from_pretrained(run / "hf")
    known = measures.batches(inputs / "known.jsonl", inputs)
    targets = {
        name: measures.batches(inputs / name / "test.jsonl", inputs) for name in study.targets
    }
    seconds = [line.seconds for line in read_metrics(run) if line.seconds is not None]
    facts = {
        "experts_per_token": experts_per_token,
        "parameters": sum(value.size for value in RunCheckpoint(run).trained().values()),
        "steps": steps,
        "learning_rate": BASE_RATE,
        "wall_seconds": round(sum(seconds), 1),
        **specialisation(model, known),
        "targets": {
            name: {"loss": result.loss, "right": _bits(result.right)}
            for name, rows in targets.items()
            for result in [measures.measure(model, rows)]
        },
        "router_cosines": {name: router_cosines(model, rows[0]) for name, rows in targets.items()},
    }
    with directory.new_file(base_file(output, experts_per_token)) as partial:
        partial.write_text(json.dumps(facts) + "\n")  # one line: some 1,000 numbers


def trained(config: Config) -> Path:
    """Trains, and returns the run's directory.

    Raises:
      UserError: SIGTERM stopped the run, of which nothing must be measured.
    """
    run = olmoe_jax.train(config)
    if not run.finished:
        raise UserError("stopped; the same command continues the comparison")
    return run.output_dir


def specialisation(model: Any, known: list) -> dict[str, Any]:
    """Returns the base's answers to each task, the experts' load, and what the experts matter.

    "load" is task -> [L, E], the share of a layer's choices. "without" is task -> task -> share of
    right answers, when the first task's TOP_EXPERTS most loaded experts of each layer are off.
    """
    result = measures.measure(model, known)
    load = {
        name: rows.sum(0) / rows.sum((0, 2))[:, None] for name, rows in by_task(result.load).items()
    }
    without = {}
    for name, shares in load.items():
        top = [np.argsort(-layer)[:TOP_EXPERTS].tolist() for layer in shares]
        off = measures.measure(measures.without_experts(model, top), known)
        without[name] = {task: float(rows.mean()) for task, rows in by_task(off.right).items()}
    return {
        "known": {name: _bits(rows) for name, rows in by_task(result.right).items()},
        "load": {name: shares.round(4).tolist() for name, shares in load.items()},
        "without": without,
    }


def by_task(rows: np.ndarray) -> dict[str, np.ndarray]:
    """Cuts values of all rows of known.jsonl into those of each task."""
    return dict(zip(TASKS, np.split(rows, len(rows) // KNOWN_ROWS), strict=True))


def cell_config(output: Path, run: Path, cell: Cell, rate: float, epochs: int) -> Config:
    """Returns the configuration that fine-tunes a base; the run's directory is `run`."""
    inputs = output / "inputs"
    method = {name: name.partition("_m")[0] for name in LIMITED}.get(cell.method, cell.method)
    config = experiment("conventional" if method in ABLATION else method, "gsm")
    options = dataclasses.replace(config.method, router_gradient_experts=LIMITED.get(cell.method))
    if method in ABLATION:
        options = dataclasses.replace(options, name=method)
    if method in LORA:
        # Without dropout: a few hundred rows need few epochs.
        options = dataclasses.replace(options, lora_rank=LORA_RANK, lora_dropout=0.0)
    rows = inputs / cell.target
    return dataclasses.replace(
        config,
        model=ModelOptions(
            path=str(base_run(output, cell.experts_per_token) / "hf"),
            compute_dtype="float32",
            remat="none",
        ),
        data=DataOptions(
            train_path=str(rows / "train.jsonl"),
            eval_fraction=0.0,
            max_seq_length=ROW_LENGTH,
        ),
        method=options,
        optimizer=dataclasses.replace(
            config.optimizer, learning_rate=rate, schedule="linear", warmup_ratio=0.1
        ),
        train=TrainOptions(
            output_dir=str(run),
            batch_size=BATCH_SIZE,
            rows_per_device=ROWS[cell.target],
            epochs=epochs,
            seed=cell.seed,
            checkpoint_every=10_000,
            keep_checkpoints=1,
            resume="restart",
            export_hf=False,
        ),
    )


def run_cells(output: Path, name: str, cells: Sequence[Cell], study: Study) -> None:
    """Runs the cells, all of one base, one after the other, and adds their results.

    They leave nothing but the results; `name` is that of no other group.
    """
    directory = output / f"run_{name}"
    inputs, results = output / "inputs", read(output)
    known = measures.batches(inputs / "known.jsonl", inputs)
    before: dict[str, measures.Measures] = {}
    for cell in cells:
        started = time.process_time()
        rate = chosen_rate(results, study, cell)
        part = "test" if cell.rate is None else "validation"
        rows = measures.batches(inputs / cell.target / f"{part}.jsonl", inputs)
        shutil.rmtree(directory, ignore_errors=True)
        run = trained(cell_config(output, directory, cell, rate, study.epochs))
        # Before the measures, which all methods have in common.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
        model = olmoe_jax.from_pretrained(run)
        target = measures.measure(model, rows)
        answers = by_task(measures.measure(model, known).right)
        found: dict[str, Any] = {"known": {name: _bits(right) for name, right in answers.items()}}
        if cell.rate is None:
            if cell.target not in before:
                base = olmoe_jax.from_pretrained(base_run(output, cell.experts_per_token) / "hf")
                before[cell.target] = measures.measure(base, rows)
            parameters = RunCheckpoint(run).trained()
            seconds = [line.seconds for line in read_metrics(run) if line.seconds is not None]
            found |= {
                "changed_routing": measures.changed_routing(target, before[cell.target], rows),
                "trained": sum(value.size for value in parameters.values()),
                "step_seconds": float(np.quantile(seconds, 0.1)),
                "peak_memory": peak,
            }
            if ROUTER in parameters:
                k = cell.experts_per_token
                found["router_cosine"] = router_cosine(model, rows[0], k)
        append(
            output,
            Result(
                **cell._asdict() | {"rate": rate},
                chooses_rate=cell.rate is not None,
                right=_bits(target.right),
                loss=target.loss,
                cpu_seconds=round(time.process_time() - started, 2),
                **found,
            ),
        )
        shutil.rmtree(directory)


def _bits(right: np.ndarray) -> str:
    return "".join(map(str, right.astype(int)))
