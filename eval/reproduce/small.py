"""A small model, pretrained on generated word problems, for --small."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from configs.table import ESFT, FULL, LORA
from eval.reproduce.cells import ROOT, Command, Reproduction
from olmoe_jax.checkpoints import directory

METHODS = (FULL[-1], ESFT[0])
"""Trained by default: a method that trains everything, and one that trains some experts."""
PROMPT = "Answer the following question.\n\n"
"""The first line of the evaluation's prompts and of half of the training prompts, but not of the
eval loss's prompts: the model learns both."""
ROWS, TEST_ROWS = 2000, 60
SIZES = {"hidden_size": 64, "intermediate_size": 64}
FIELDS = {
    "model.compute_dtype": "float32",
    "model.remat": "none",
    "data.max_seq_length": "96",
    "optimizer.learning_rate": "1e-3",
    "train.batch_size": "32",
    "train.rows_per_device": "20",
    "train.epochs": "100",
    "train.max_steps": "40",
    "train.checkpoint_every": "20",
}
BASE = {"train.max_steps": "120", "optimizer.learning_rate": "3e-3"}
LORA_FIELDS = {"optimizer.learning_rate": "1e-2", "method.lora_rank": "8"}
ESFT_FIELDS = {"optimizer.learning_rate": "3e-3"}
EVALUATION = ("--batch_size=60", "--max_new_tokens=32", "--compute_dtype=float32")


def small_reproduction(
    output: Path, methods: Sequence[str], config: Mapping[str, str], evaluation: Sequence[str]
) -> Reproduction:
    """Returns gsm's part of the table with the small model; the user's settings come last."""
    small = output / "small"
    return Reproduction(
        output,
        methods,
        ["gsm"],
        str(small / "model"),
        small / "data",
        config,
        [*EVALUATION, *evaluation],
        _fields,
    )


def _fields(method: str) -> Mapping[str, str]:
    return FIELDS | (LORA_FIELDS if method in LORA else ESFT_FIELDS if method in ESFT else {})


def write_inputs(path: Path, run: Callable[[Command], None]) -> None:
    """Makes the data, then trains and exports the model; what is there already stays.

    Args:
      path: the directory.
      run: executes a command.
    """
    data, base, model = path / "data", path / "base", path / "model"
    if not data.exists():
        _write_data(data)
    fields = FIELDS | {
        "model.init": "random",
        "model.config_path": str(data / "model"),
        "data.tokenizer_path": str(data / "model"),
        "data.train_path": str(data / "gsm/train.jsonl"),
        "data.eval_path": "none",
        "train.output_dir": str(base),
        "train.export_hf": "false",
        **BASE,
    }
    train = [str(ROOT / "train.py"), "--config", str(ROOT / f"configs/{FULL[-1]}_gsm.py")]
    train += [f"--config.{name}={value}" for name, value in fields.items()]
    export = ["-m", "convert.to_hf", "--checkpoint", str(base), "--output", str(model)]
    trained = base / "loss.png"
    for command in (
        Command("train the base", train, lambda: model.exists() or trained.exists()),
        Command("export the base", export, model.exists),
    ):
        if not command.done():
            print(command.name, flush=True)
            run(command)


def _write_data(path: Path) -> None:
    """Writes gsm/train.jsonl, gsm8k/test.jsonl, and model/ with tokenizer and config.json."""
    from olmoe_jax.quickstart import MODEL, examples, train_tokenizer

    rows = examples(ROWS + TEST_ROWS, seed=0)
    train = [
        row | {"prompt": PROMPT * (number % 2) + row["prompt"]}
        for number, row in enumerate(rows[TEST_ROWS:])
    ]
    test = [
        {
            "question": row["prompt"].removeprefix("Question: ").removesuffix("\nAnswer:"),
            "answer": row["completion"],
        }
        for row in rows[:TEST_ROWS]
    ]
    with directory.new_directory(path) as partial:
        for file, content in (("gsm/train.jsonl", train), ("gsm8k/test.jsonl", test)):
            (partial / file).parent.mkdir()
            text = "".join(json.dumps(row) + "\n" for row in content)
            (partial / file).write_text(text, encoding="utf-8")
        (partial / "model").mkdir()
        texts = [f"{row['prompt']} {row['completion']}" for row in train]
        vocabulary = train_tokenizer(texts, 512, partial / "model")
        directory.write_json(partial / "model/config.json", MODEL | SIZES | vocabulary)
