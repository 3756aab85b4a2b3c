"""The experiments' table and the files of configs/; config files that are broken."""

import os
from pathlib import Path

import pytest
from helpers import ROOT, message_of

from configs.table import DATASETS, EXPERIMENTS, experiment
from olmoe_jax.config import MethodOptions, ModelOptions, OptimizerOptions, validate
from olmoe_jax.config.load import load_config

# The experiments


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("method", EXPERIMENTS)
def test_experiment_file(method, dataset):
    config = validate(load_config(ROOT / "configs" / f"{method}_{dataset}.py"))
    assert config == experiment(method, dataset)
    base = method.removesuffix("_lora")
    expected = MethodOptions(name=base)
    if "_lora" in method:
        expected = MethodOptions(name=base, lora_rank=64, lora_alpha=16.0, lora_dropout=0.1)
    assert config.method == expected
    assert config.model == ModelOptions("allenai/OLMoE-1B-7B-0125", "pretrained", None, "bfloat16")
    assert config.train.output_dir == f"runs/{method}_{dataset}"
    assert (config.train.batch_size, config.train.epochs) == (256, 4)
    assert config.data.max_seq_length == 4096


@pytest.mark.parametrize(
    ("name", "train_path", "eval_path", "learning_rate", "microbatch_examples"),
    [
        ("frozen_gsm", "RoxanneWsyw/gsm:train.jsonl", "RoxanneWsyw/gsm:test.jsonl", 1e-6, 4),
        ("densemixer_codealpaca", "RoxanneWsyw/CodeAlpaca:train.jsonl", None, 1e-6, 4),
        (
            "conventional_law",
            "RoxanneWsyw/ESFT-law:train.jsonl",
            "RoxanneWsyw/ESFT-law:test.jsonl",
            2e-5,
            4,
        ),
        (
            "densemixer_summary",
            "RoxanneWsyw/ESFT-summary:train.jsonl",
            "RoxanneWsyw/ESFT-summary:test.jsonl",
            2e-5,
            2,
        ),
        ("frozen_lora_gsm", "RoxanneWsyw/gsm:train.jsonl", "RoxanneWsyw/gsm:test.jsonl", 1e-4, 4),
        (
            "densemixer_lora_translation",
            "RoxanneWsyw/ESFT-translation:train.jsonl",
            "RoxanneWsyw/ESFT-translation:test.jsonl",
            4e-4,
            2,
        ),
        (
            "esft_gate_law",
            "RoxanneWsyw/ESFT-law:train.jsonl",
            "RoxanneWsyw/ESFT-law:test.jsonl",
            1e-3,
            4,
        ),
        ("esft_token_codealpaca", "RoxanneWsyw/CodeAlpaca:train.jsonl", None, 2e-5, 4),
        (
            "frozen_translation",
            "RoxanneWsyw/ESFT-translation:train.jsonl",
            "RoxanneWsyw/ESFT-translation:test.jsonl",
            2e-5,
            2,
        ),
    ],
)
def test_table_by_hand(name, train_path, eval_path, learning_rate, microbatch_examples):
    config = load_config(ROOT / "configs" / f"{name}.py")
    assert (config.data.train_path, config.data.eval_path) == (train_path, eval_path)
    assert config.data.eval_fraction == 0.1
    assert config.optimizer == OptimizerOptions(
        learning_rate, "linear", 0.03, 0.0, 0.9, 0.999, 1e-8, 1.0
    )
    assert config.train.microbatch_examples == microbatch_examples


def test_experiment_outside_the_table():
    assert "frozen, conventional, densemixer" in message_of(experiment, "dense", "gsm")
    assert "gsm, codealpaca, intent" in message_of(experiment, "frozen", "gsm8k")


# Config files


def config_error(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.py"
    path.write_text(text)
    return message_of(load_config, path).removeprefix(str(tmp_path / "mine.py"))


def test_broken_config_files(tmp_path):
    imports = "from olmoe_jax.config import *\n"
    assert config_error(tmp_path, "x = 1\n").startswith(": define get_config() in it")
    assert config_error(tmp_path, "get_config = 1\n").startswith(": define get_config() in it")
    assert config_error(tmp_path, "def get_config():\n    return 3\n") == (
        ": get_config() returned a int; it must return a olmoe_jax.config.Config"
    )
    assert config_error(tmp_path, "import os\ndef get_config():\n    1 / 0\n") == (
        ":3: ZeroDivisionError: division by zero"
    )
    assert config_error(tmp_path, "x = 1\ndef get_config(:\n").startswith(":2: SyntaxError: ")
    assert config_error(tmp_path, "import no_such_module\n").startswith(":1: ModuleNotFoundError")
    unknown = imports + "def get_config():\n    return Config(train=TrainOptions(batchsize=8))\n"
    assert config_error(tmp_path, unknown) == (
        ":3: unknown config field train.batchsize: did you mean train.batch_size?"
    )
    gone = imports + "def get_config():\n    return Config(data=DataOptions(cache_dir='x'))\n"
    assert config_error(tmp_path, gone) == (
        ":3: config field data.cache_dir is gone: set the environment variable OLMOE_JAX_CACHE"
    )
    wrong = imports + "def get_config():\n    return Config(train=TrainOptions(batch_size='8'))\n"
    assert config_error(tmp_path, wrong) == "train.batch_size='8': expected int; write e.g. 256"


def test_missing_config_files(tmp_path):
    assert message_of(load_config, ROOT / "configs/densmixer_gsm").startswith(
        f"{ROOT}/configs/densmixer_gsm: no such file; nearest there: densemixer_gsm.py"
    )
    (tmp_path / "a.py").touch()
    assert message_of(load_config, tmp_path / "zzz.yaml").endswith("no name there is like it")
    assert message_of(load_config, tmp_path / "no/b.py").endswith(
        f"there is no directory {tmp_path}/no"
    )
    assert "a directory, not a file" in message_of(load_config, tmp_path)
    os.mkfifo(tmp_path / "fifo")
    assert "a FIFO or device, not a file" in message_of(load_config, tmp_path / "fifo")
    (tmp_path / "latin").write_bytes("# ä".encode("latin-1"))
    assert message_of(load_config, tmp_path / "latin").endswith("save it as UTF-8")
    assert "no user 'nobody_'" in message_of(load_config, "~nobody_/a.py")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("raise BaseException('x')", ":2: BaseException: x"),
        ("raise SystemExit(0)", ":2: SystemExit: 0"),
        ("raise KeyboardInterrupt", ":2: KeyboardInterrupt"),
        ("raise ValueError('a\\nb' * 10**6)", ":2: ValueError: a ba ba b"),
        ("class E(Exception): __str__ = None\n    raise E", ":3: E: <E>"),
        ("get_config()", ":2: RecursionError: maximum recursion depth exceeded"),
        ("yield 1", ": get_config() returned a generator; it must return a "),
        ("import dataclasses; return dataclasses", ": get_config() returned a module; it must"),
    ],
)
def test_config_files_that_misbehave(tmp_path, body, expected):
    assert config_error(tmp_path, f"def get_config():\n    {body}\n").startswith(expected)
