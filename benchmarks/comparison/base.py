"""The comparison's base models: inputs, pretraining, and what their experts do.

A base has about 10M parameters, 32 experts in each of three layers, and K experts per token. The
base of K = 4 starts from random weights, the other bases from that base.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from benchmarks.comparison.tasks import TARGETS, TASKS, TEXT, rows, stream
from olmoe_jax.checkpoints import directory
from olmoe_jax.config import (
    Config,
    DataOptions,
    MethodOptions,
    ModelOptions,
    OptimizerOptions,
    TrainOptions,
)
from olmoe_jax.files import read_json, write_json_lines
from olmoe_jax.quickstart import train_tokenizer

MODEL = {
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.02,
    "torch_dtype": "float32",
}
EXPERTS_PER_TOKEN = 4
VOCABULARY = 640
ROW_LENGTH = 256  # tokens
BATCH_SIZE = 128  # examples per step
ROWS = 13  # per micro-batch
KNOWN_ROWS = 40  # test rows of each task of pretraining
TARGET_ROWS = {"train": 256, "validation": 64, "test": 200}
TEXT_SHARE = 0.02
BASE_RATE = 3e-3


def write_inputs(path: Path, rows_per_task: int) -> Path:
    """Writes all rows, the tokenizer and config.json to `path`, unless it exists.

    known.jsonl holds the tasks' test rows, one task after the other; pretrain.jsonl the rows that a
    base reads, `rows_per_task` of each task; TARGET/train.jsonl, validation.jsonl and test.jsonl
    the targets' rows.
    """
    if path.exists():
        return path
    known, trained = [], []
    for task in TASKS.values():
        test = rows(task, KNOWN_ROWS, seed=0)
        known += test
        trained += stream(task, rows_per_task, 1, {row["prompt"] for row in test})
    text = [{"prompt": "", "completion": line} for line in TEXT]
    text *= round(len(trained) * TEXT_SHARE / len(text))
    targets = {
        name: rows(task, sum(TARGET_ROWS.values()), seed=0) for name, task in TARGETS.items()
    }
    with directory.new_directory(path) as partial:
        write_json_lines(partial / "known.jsonl", known)
        write_json_lines(partial / "pretrain.jsonl", trained + text)
        for name, found in targets.items():
            start = 0
            for part, count in TARGET_ROWS.items():
                write_json_lines(partial / name / f"{part}.jsonl", found[start : start + count])
                start += count
        # The targets' words are known to the tokenizer, as any word is to a large one.
        some = [trained[i] for i in range(0, len(trained), 20)]
        some += text + [row for found in targets.values() for row in found]
        texts = [f"{row['prompt']} {row['completion']}" for row in some]
        vocabulary = train_tokenizer(texts, VOCABULARY, partial)
        directory.write_json(partial / "config.json", MODEL | vocabulary)
    return path


def other_start(model: Path, path: Path, experts_per_token: int) -> Path:
    """Copies a base in Hugging Face's format to `path`, for another number of experts per token."""
    if not path.exists():
        with directory.new_directory(path) as partial:
            shutil.copytree(model, partial, dirs_exist_ok=True)
            config = read_json(dict[str, Any], partial / "config.json")
            config["num_experts_per_tok"] = experts_per_token
            directory.write_json(partial / "config.json", config)
    return path


def base_config(inputs: Path, start: Path | None, output: Path, steps: int) -> Config:
    """Returns the configuration that pretrains a base.

    Args:
      inputs: of `write_inputs`.
      start: of `other_start`; None: random weights.
      output: the run's directory.
      steps: of the run.
    """
    model = ModelOptions(path=str(start or inputs), compute_dtype="float32", remat="none")
    if start is None:
        model = dataclasses.replace(model, init="random", config_path=str(inputs))
    return Config(
        model=model,
        data=DataOptions(
            train_path=str(inputs / "pretrain.jsonl"),
            eval_path=str(inputs / "known.jsonl"),
            max_seq_length=ROW_LENGTH,
        ),
        # The weight of the load-balancing loss in OLMoE's pretraining.
        method=MethodOptions(name="conventional", router_aux_loss_coefficient=0.01),
        optimizer=OptimizerOptions(learning_rate=BASE_RATE, schedule="cosine", warmup_ratio=0.05),
        train=TrainOptions(
            output_dir=str(output),
            batch_size=BATCH_SIZE,
            rows_per_device=ROWS,
            epochs=1000,
            max_steps=steps,
            checkpoint_every=100,
            keep_checkpoints=1,
        ),
    )
