"""Tiny runs for the training tests: a random model, a byte tokenizer and generated rows."""

import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path

from tiny import BYTES, hf_config, tiny_config

from olmoe_jax.config import Config, from_dict
from olmoe_jax.config.fields import show

ROOT = Path(__file__).parents[2]

MODEL = hf_config(
    tiny_config(**BYTES), max_position_embeddings=512, initializer_range=0.1, eos_token_id=0
)
"""The config.json of the runs' random model: its vocabulary is the byte tokenizer's."""


@dataclasses.dataclass(frozen=True)
class Files:
    """What a run reads."""

    model: Path
    tokenizer: Path
    train: Path
    evaluation: Path

    def values(self, output: Path, **changes) -> dict[str, object]:
        """{dotted field: value} of a tiny run; `changes` have __ for the dot."""
        values = {
            "model.init": "random",
            "model.config_path": str(self.model),
            "model.compute_dtype": "float32",
            "data.train_path": str(self.train),
            "data.eval_path": str(self.evaluation),
            "data.tokenizer_path": str(self.tokenizer),
            "data.max_seq_length": 64,
            "optimizer.learning_rate": 3e-3,
            "train.output_dir": str(output),
            "train.batch_size": 4,
            "train.epochs": 2,
            # With packing, every step is one micro-batch: one compilation less.
            "train.rows_per_device": 3,
        }
        return values | {path.replace("__", "."): value for path, value in changes.items()}

    def config(self, output: Path, **changes) -> Config:
        """The configuration of a tiny run."""
        sections: dict[str, dict] = {}
        for path, value in self.values(output, **changes).items():
            section, name = path.split(".")
            sections.setdefault(section, {})[name] = value
        return from_dict(sections)

    def arguments(self, output: Path, **changes) -> list[str]:
        """The same as arguments of train.py."""
        flags = self.values(output, **changes).items()
        config = str(ROOT / "configs" / "densemixer_gsm.py")
        return ["--config", config, *(f"--config.{path}={show(value)}" for path, value in flags)]


def make_files(directory: Path, tokenizer: Path, examples: int = 22, seed: int = 0) -> Files:
    """Writes a model's config.json and sums to learn, of ragged lengths."""
    (directory / "model").mkdir(parents=True)
    (directory / "model" / "config.json").write_text(json.dumps(MODEL))
    train, evaluation = directory / "train.jsonl", directory / "eval.jsonl"
    generator = random.Random(seed)
    write_sums(train, examples, generator)
    write_sums(evaluation, 7, generator)
    return Files(directory / "model", tokenizer, train, evaluation)


def write_sums(path: Path, count: int, generator: random.Random) -> None:
    """Rows such as {"prompt": "3+14+5=", "completion": "22"}."""
    rows = []
    for _ in range(count):
        numbers = [generator.randrange(100) for _ in range(generator.randint(2, 7))]
        rows.append({"prompt": "+".join(map(str, numbers)) + "=", "completion": str(sum(numbers))})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def metrics(output: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(output: Path) -> dict[int, float]:
    """{step: loss} of a run; every step must be there once."""
    lines = [line for line in metrics(output) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return {line["step"]: line["loss"] for line in lines}


def exported_bytes(output: Path) -> bytes:
    """The exported weights."""
    return (output / "hf" / "model.safetensors").read_bytes()


def train_command(files: Files, output: Path, **changes) -> list[str]:
    """A command line of train.py."""
    return [sys.executable, str(ROOT / "train.py"), *files.arguments(output, **changes)]


def run_train(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
    """Runs a command to its end."""
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
