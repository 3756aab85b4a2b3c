"""The main command's flags and its help."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, message_of

from configs.table import experiment
from olmoe_jax.config import FIELDS, apply_overrides
from olmoe_jax.config.load import help_text, parse_config

GSM = experiment("densemixer", "gsm")
CONFIG = str(ROOT / "configs" / "densemixer_gsm.py")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config", CONFIG, "--config.mesh.fsdp", "-1", "--config.train.seed", "3"],
        [f"--config={CONFIG}", "--config.mesh.fsdp=-1", "--config.train.seed=3"],
        ["--config.train.seed=1", "--config.train.seed=3", f"--config={CONFIG}"],
    ],
)
def test_flags(arguments):
    assert parse_config(arguments) == apply_overrides(GSM, {"train.seed": "3"})


def test_a_value_may_contain_equals_signs():
    config = parse_config(["--config", CONFIG, "--config.data.train_path=a=b.jsonl"])
    assert config.data.train_path == "a=b.jsonl"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--config is missing: write e.g. --config configs/densemixer_gsm.py"),
        (["--config="], "--config is missing"),
        (["--config"], "--config needs a value"),
        (["--config", CONFIG, "--config.data.pack"], "--config.data.pack needs a value"),
        (["--config", "--config.train.seed=1"], "--config needs a value"),
        (["gsm"], "unexpected argument gsm: flags are --name=value"),
        (["--confg", CONFIG], "unknown flag --confg: did you mean --config?"),
        (["--seed=1"], "unknown flag --seed: did you mean --config.train.seed?"),
        (["--train.sed", "1"], "unknown flag --train.sed: did you mean --config.train.seed?"),
        (["--hlp"], "unknown flag --hlp: did you mean --help?"),
        (["--config", CONFIG, "--config.="], "unknown config field : did you mean"),
    ],
)
def test_bad_flags(arguments, expected):
    assert message_of(parse_config, arguments).startswith(expected)


def test_help_lists_every_field():
    text = help_text()
    for path, entry in FIELDS.items():
        assert f"--config.{path}=" in text
        assert entry.help.split(":")[0].split(",")[0][:20] in text
    assert "--config.train.batch_size=256  (int; 1 or more)\n      examples per step\n" in text
    assert "--config.model.base_quantization=none  (one of nf4, int8 or none)" in text
    assert max(map(len, text.splitlines())) <= 100


def run_train(directory: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )


def test_train_help_from_another_directory(tmp_path):
    result = run_train(tmp_path, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert "python train.py --config configs/densemixer_gsm.py" in result.stdout
    assert all(path in result.stdout for path in FIELDS)


def test_train_bad_usage_is_one_line_and_exit_2(tmp_path):
    result = run_train(tmp_path, "--config", CONFIG, "--config.optimizer.learning_rate=-1")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "error: optimizer.learning_rate=-1.0: must be positive; write e.g. 1e-06\n"
    )
    assert not list(tmp_path.iterdir())


def test_the_command_line_is_read_without_jax():
    code = f"""
import sys
from olmoe_jax.config.load import parse_config
parse_config(["--config", {CONFIG!r}])
assert "jax" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
