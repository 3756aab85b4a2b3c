"""The commands that the fuzzer runs, each with a good input for it."""

import contextlib
import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
from helpers import write_json
from tiny import SHORT, tiny_config, write_base
from tiny_report import write_evaluation, write_run
from training.tiny_run import Files, make_files

from olmoe_jax.config.fields import show

ROWS = [
    {"prompt": "2+3=", "completion": "5"},
    {"prompt": "Ünï\u2028", "completion": " ok"},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A command and what it reads.

    Attributes:
      module: the module whose `main` is the command.
      arguments: its arguments; {case} is the input's directory, {base} a good model, {out} a new
        path.
      make: writes a good input into a directory; the second argument is a good model.
      fixed: files of the input that are not damaged, by name.
    """

    module: str
    arguments: tuple[str, ...]
    make: Callable[[Path, Path], None]
    fixed: frozenset[str] = frozenset()

    def files(self, case: Path) -> dict[str, bytes]:
        """Returns {relative path: content} of the files to damage."""
        return {
            str(file.relative_to(case)): file.read_bytes()
            for file in sorted(case.rglob("*"))
            if file.is_file() and file.name not in self.fixed
        }


def _model(case: Path, base: Path) -> None:
    shutil.copytree(base, case, dirs_exist_ok=True)


def _prompts(case: Path, base: Path) -> None:
    _model(case, base)
    (case / "prompts.txt").write_text("2+3=\n\n4+5=\n")


def _adapter(case: Path, base: Path) -> None:
    config, rank, random = tiny_config(vocab_size=258), 2, np.random.default_rng(0)
    tensors = {}
    for layer in range(config.num_layers):
        for name in ("q_proj", "v_proj"):
            module = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            for part, shape in {"A": (rank, 32), "B": (32, rank)}.items():
                tensors[f"{module}.lora_{part}.weight"] = random.normal(size=shape)
    tensors = {name: value.astype(np.float32) for name, value in tensors.items()}
    safetensors.numpy.save_file(tensors, case / "adapter_model.safetensors")
    write_json(
        case / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": rank,
            "lora_alpha": 4,
            "target_modules": ["q_proj", "v_proj"],
            "lora_dropout": 0.0,
            "bias": "none",
            "base_model_name_or_path": str(base),
            "use_rslora": False,
            "use_dora": False,
            "rank_pattern": {},
            "alpha_pattern": {},
            "init_lora_weights": True,
            "modules_to_save": None,
            "layers_to_transform": None,
            "fan_in_fan_out": False,
        },
    )


def _batch(case: Path, base: Path) -> None:
    del base
    tokens = np.arange(16, dtype=np.int64).reshape(2, 8)
    batch = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "labels": tokens}
    safetensors.numpy.save_file(batch, case / "batch.safetensors")
    experts = {"1": [0, 3], "2": [1]}
    flags = {"shared_experts": False, "non_expert_modules": False}
    write_json(case / "experts.json", {"experts": experts, **flags})


def _scores(case: Path, base: Path) -> None:
    del base
    layer = {str(expert): 0.25 for expert in range(4)}
    write_json(case / "scores.json", {"gate_scores": {"1": layer, "2": layer}})


def _json_lines(case: Path, base: Path) -> None:
    del base
    (case / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def _json(case: Path, base: Path) -> None:
    del base
    write_json(case / "rows.json", ROWS)


def _parquet(case: Path, base: Path) -> None:
    del base
    pq.write_table(pa.Table.from_pylist(ROWS[:2]), case / "rows.parquet")


def _tokenizer(case: Path, base: Path) -> None:
    for file in base.iterdir():
        if "model" not in file.name or file.name == "tokenizer.model":
            shutil.copy(file, case)
    _json_lines(case, base)


def _report(case: Path, base: Path) -> None:
    del base
    right = [0, 1, 1, 0]
    write_evaluation(write_run(case / "run", "densemixer") / "eval", "hf", gsm=right)
    write_evaluation(case / "a", "m", gsm=right[::-1], law=[0.7, None, 0.3, 0.5])


def _evaluation(case: Path, base: Path) -> None:
    from eval.run import main

    rows = [{"question": f"{n} + {n}?", "answer": f"#### {2 * n}"} for n in range(3)]
    (case / "data" / "gsm8k").mkdir(parents=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (case / "data" / "gsm8k" / "test.jsonl").write_text(text)
    with contextlib.redirect_stdout(io.StringIO()):
        main([part.format(case=case, base=base) for part in EVALUATE])


EVALUATE = (
    *("--model", "{base}", "--tasks", "gsm", "--data", "{case}/data", "--output", "{case}/eval"),
    *("--limit", "2", "--max_new_tokens", "2", "--batch_size", "2"),
)

CONFIG = """import configs.densemixer_gsm


def get_config():
    return configs.densemixer_gsm.get_config()
"""


def _values(case: Path) -> dict[str, object]:
    """Returns {field: value} of a run in `case` with a checkpoint in its middle."""
    files = Files(case / "model", case / "tokenizer", case / "train.jsonl", case / "eval.jsonl")
    changes = {"model__path": str(case / "base"), "train__checkpoint_every": 2}
    return files.values(case / "run", **(SHORT | changes))


def _run(case: Path, base: Path) -> None:
    """Writes a run that has ended, its data, its base, and a config file that continues it."""
    from train import main

    write_base(case / "base")
    shutil.copytree(base, case / "tokenizer", ignore=shutil.ignore_patterns("*model*", "config.*"))
    make_files(case, case / "tokenizer", examples=8)
    (case / "config.py").write_text(CONFIG)
    with contextlib.redirect_stdout(io.StringIO()):
        main([part.format(case=case) for part in TRAIN])


TRAIN = (
    *("--config", "{case}/config.py"),
    *(f"--config.{path}={show(value)}" for path, value in _values(Path("{case}")).items()),
)

KINDS = {
    "model": Kind("convert.from_hf", ("--model", "{case}", "--output", "{out}"), _model),
    "generate": Kind(
        "olmoe_jax.generation.command",
        ("--model", "{case}", "--prompts", "{case}/prompts.txt", "--max_new_tokens", "2"),
        _prompts,
        frozenset({"model-00001-of-00002.safetensors"}),
    ),
    "adapter": Kind(
        "convert.merge_lora",
        ("--model", "{base}", "--adapter", "{case}", "--output", "{out}"),
        _adapter,
    ),
    "batch": Kind(
        "convert.parity",
        (
            *("--model", "{base}", "--batch", "{case}/batch.safetensors", "--method", "frozen"),
            *("--experts", "{case}/experts.json", "--output", "{out}"),
        ),
        _batch,
    ),
    "scores": Kind(
        "olmoe_jax.esft",
        (
            *("select", "--scores", "{case}/scores.json", "--function", "gate"),
            *("--top_p", "0.5", "--output", "{out}"),
        ),
        _scores,
    ),
    **{
        f"rows_{suffix}": Kind(
            "olmoe_jax.data.__main__",
            (
                *("preview", "--data", f"{{case}}/rows.{suffix}", "--tokenizer", "{base}"),
                *("--max_seq_length", "64", "--rows", "3"),
            ),
            make,
        )
        for suffix, make in {"jsonl": _json_lines, "json": _json, "parquet": _parquet}.items()
    },
    "tokenizer": Kind(
        "olmoe_jax.data.__main__",
        (
            *("preview", "--data", "{case}/rows.jsonl", "--tokenizer", "{case}"),
            *("--max_seq_length", "64", "--rows", "3"),
        ),
        _tokenizer,
        frozenset({"rows.jsonl"}),
    ),
    "report": Kind(
        "eval.report.__main__", ("{case}/a", "{case}/run", "--output", "{out}"), _report
    ),
    "evaluation": Kind("eval.run", EVALUATE, _evaluation),
    "train": Kind("train", TRAIN, _run),
    "export": Kind("convert.to_hf", ("--checkpoint", "{case}/run", "--output", "{out}"), _run),
}
"""The kinds of input by name."""
