"""What `eval.reproduce --small` works with: a small model pretrained on generated word problems."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from configs.table import ESFT, LORA
from eval.reproduce import ROOT, Plan, Step
from olmoe_jax.checkpoints import directory

PROMPT = "Answer the following question.\n\n"
"""Before every other question, as in the evaluation's prompts; the eval loss has none."""
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
FAMILIES = {
    "lora": {"optimizer.learning_rate": "1e-2", "method.lora_rank": "8"},
    "esft": {"optimizer.learning_rate": "3e-3"},
}
EVALUATION = ("--batch_size=60", "--max_new_tokens=32", "--compute_dtype=float32")


def small_plan(
    output: Path, methods: Sequence[str], config: Mapping[str, str], evaluation: Sequence[str]
) -> Plan:
    """The plan for the small model; what the user sets comes after its own settings."""
    small = output / "small"

    def by_method(method: str) -> Mapping[str, str]:
        family = "lora" if method in LORA else "esft" if method in ESFT else "full"
        return FIELDS | FAMILIES.get(family, {})

    return Plan(
        output,
        methods,
        ["gsm"],
        str(small / "model"),
        str(small / "data"),
        config,
        [*EVALUATION, *evaluation],
        by_method,
    )


def write_inputs(path: Path, run: Callable[[Step], None]) -> None:
    """Makes the data, and trains and exports the model; what is there already stays.

    Args:
      path: the directory.
      run: executes a step.
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
    command = [str(ROOT / "train.py"), "--config", str(ROOT / "configs/conventional_gsm.py")]
    command += [f"--config.{name}={value}" for name, value in fields.items()]
    export = ["-m", "convert.to_hf", "--checkpoint", str(base), "--output", str(model)]
    for step in (
        Step("train the base", command, lambda: model.exists() or (base / "loss.png").exists()),
        Step("export the base", export, model.exists),
    ):
        if not step.done():
            print(step.name, flush=True)
            run(step)


def _write_data(path: Path) -> None:
    """gsm/train.jsonl and gsm8k/test.jsonl, as of the real data; model/: tokenizer, config.json."""
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
