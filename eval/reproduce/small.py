"""A small model for --small, pretrained on generated word problems or on the rows in --data."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from configs.table import DATASETS, ESFT, FULL, LORA
from eval.reproduce.cells import (
    Command,
    Reproduction,
    local_files,
    own_files,
    tasks_of,
)
from eval.tasks import TASKS
from eval.tasks.task import local_path
from olmoe_jax.checkpoints import directory
from olmoe_jax.data.formats import format_row
from olmoe_jax.data.reading import read_rows
from olmoe_jax.errors import UserError
from olmoe_jax.files import write_json_lines
from olmoe_jax.root import ROOT

METHODS = (FULL[-1], ESFT[0])
"""Trained by default: a method that trains everything, and one that trains some experts."""
PROMPT = "Answer the following question.\n\n"
"""The first line of half of the prompts to train on: those of eval.run begin with this line, those
of the eval loss do not, and the model learns both."""
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
EVALUATION = ("--batch_size=60", "--max_new_tokens=32", "--decode_dtype=float32")

OWN_ROWS, OWN_TEST_ROWS = 500, 20
"""Rows at the beginning of each file in --data that are used, to train on and to evaluate."""
OWN_POSITIONS = 8192
OWN_FIELDS = FIELDS | {
    "data.max_seq_length": "4096",
    "train.batch_size": "8",
    "train.rows_per_device": "1",
    "train.max_steps": "10",
    "train.checkpoint_every": "5",
}
OWN_EVALUATION = ("--batch_size=4", *EVALUATION[1:])
"""These replace the values above for rows in --data, whose prompts may have thousands of tokens."""


def datasets(data: Path | None) -> list[str]:
    """Returns the data sets whose files lie in `data`; gsm, which is generated, without `data`."""
    if data is None:
        return ["gsm"]
    found = [name for name in DATASETS if all(file.exists() for file in local_files(data, name))]
    if not found:
        files = ", ".join(str(file.relative_to(data)) for file in local_files(data, "intent"))
        raise UserError(
            f"--data {data}: has the files of no data set (e.g. {files}); docs/reproduce.md lists "
            "their names"
        )
    return found


def small_reproduction(table: Reproduction) -> Reproduction:
    """Returns the part of the table with the small model and data; the user's settings come last.

    Args:
      table: its `data` is the user's, and its `model` is replaced.
    """
    own = table.data is not None
    return dataclasses.replace(
        table,
        model=str(table.output / "small/model"),
        data=table.output / "small/data",
        evaluation=[*(OWN_EVALUATION if own else EVALUATION), *table.evaluation],
        by_method=lambda method: _fields(method, own),
    )


def _fields(method: str, own: bool) -> Mapping[str, str]:
    rates = LORA_FIELDS if method in LORA else ESFT_FIELDS if method in ESFT else {}
    return (OWN_FIELDS if own else FIELDS) | rates


def write_inputs(table: Reproduction, own: Path | None, run: Callable[[Command], None]) -> None:
    """Makes the data, then trains and exports the model; what is there already stays.

    Args:
      table: from `small_reproduction`.
      own: the user's directory of data files, or None.
      run: executes a command.
    """
    path = table.output / "small"
    data, base, model = path / "data", path / "base", path / "model"
    if not data.exists():
        with directory.new_directory(data) as partial:
            if own:
                _write_sample(partial, own, table.datasets)
            else:
                _write_problems(partial)
    fields = (OWN_FIELDS if own else FIELDS) | {
        "model.init": "random",
        "model.config_path": str(data / "model"),
        "data.tokenizer_path": str(data / "model"),
        "data.train_path": str(data / "model/rows.jsonl"),
        "data.eval_path": "none",
        "data.eval_fraction": "0",
        "train.output_dir": str(base),
        "train.export_hf": "false",
        **BASE,
        **({"train.max_steps": "30"} if own else {}),
    }
    train = ["-m", "olmoe_jax.training", "--config", str(ROOT / f"configs/{FULL[-1]}_gsm.py")]
    train += [f"--config.{name}={value}" for name, value in fields.items()]
    # Not in the run's directory: the report would show the base's run among the others.
    export = ["-m", "convert.to_hf", "--checkpoint", str(base), "--output", str(model)]
    trained = base / "loss.png"
    for command in (
        Command("train the base", train, lambda: model.exists() or trained.exists()),
        Command("export the base", export, model.exists),
    ):
        if not command.done():
            print(command.name, flush=True)
            run(command)


def _write_sample(path: Path, data: Path, datasets: Sequence[str]) -> None:
    """Writes the first rows of each file in `data`, and model/."""
    rows = []
    for dataset in datasets:
        train, *_ = local_files(data, dataset)
        some = [row for _, row in islice(read_rows(str(train)), OWN_ROWS)]
        write_json_lines(path / own_files(dataset)[0], some)
        rows += some
        for task in map(TASKS.get, tasks_of(dataset)):
            tests = read_rows(str(local_path(data, task.local_file, task.hub[0][0])))
            write_json_lines(
                path / task.local_file, [row for _, row in islice(tests, OWN_TEST_ROWS)]
            )
    _write_model(path, rows, vocabulary=4096, positions=OWN_POSITIONS)


def _write_problems(path: Path) -> None:
    """Writes gsm/train.jsonl, gsm8k/test.jsonl, and model/."""
    from olmoe_jax.quickstart import examples

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
    write_json_lines(path / "gsm/train.jsonl", train)
    write_json_lines(path / "gsm8k/test.jsonl", test)
    _write_model(path, train, vocabulary=512, positions=256)


def _write_model(
    path: Path, rows: Sequence[dict[str, Any]], vocabulary: int, positions: int
) -> None:
    """Writes model/ with tokenizer, config.json and the rows to train on, rows.jsonl."""
    from olmoe_jax.quickstart import MODEL, train_tokenizer

    write_json_lines(path / "model/rows.jsonl", rows)
    texts = [format_row(row, "").text for row in rows]
    fields = train_tokenizer(texts, vocabulary, path / "model")
    config = MODEL | SIZES | fields | {"max_position_embeddings": positions}
    directory.write_json(path / "model/config.json", config)
