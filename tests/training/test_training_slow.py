"""Runs in processes of their own: a full disk, real data."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import AS_USERS_COMPILE
from training.interruptions import Crash, crash, snapshot
from training.tiny_run import (
    MODEL,
    ROOT,
    exported_bytes,
    losses,
    make_files,
    metrics,
    run_train,
    train_command,
)

import olmoe_jax

pytestmark = pytest.mark.slow


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB; None where it takes more rights than we have."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    yield disk if mounted else None
    if mounted:
        subprocess.run(["umount", str(disk)], check=True)


def check_failed_save(result, output: Path) -> None:
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    # What finds the disk full first is a matter of luck: the checkpoint or another file.
    assert result.stderr.startswith(f"error: {output}: ")
    assert "the checkpoint of step 4 is intact" in result.stderr
    assert "free space" in result.stderr
    assert "run the same command again" in result.stderr


def test_disk_full_during_a_save(tmp_path, tokenizer_dir, environment, small_disk, at_step, capsys):
    """The command that meets the full disk is a process; its run begins and ends in this one."""
    if small_disk is None:
        pytest.skip("no right to mount a small file system; the test below goes without")
    files = make_files(tmp_path / "files", tokenizer_dir)
    options = {"train__checkpoint_every": 4, "data__eval_path": None, "data__eval_fraction": 0.0}
    output, whole = small_disk / "run", tmp_path / "whole"
    olmoe_jax.train(files.config(whole, **options))

    def die_after_the_save():
        while not (output / "checkpoints" / "4").is_dir():
            time.sleep(0.01)
        crash()

    at_step(5, die_after_the_save)
    with pytest.raises(Crash):
        olmoe_jax.train(files.config(output, **options))
    assert [p.name for p in (output / "checkpoints").iterdir() if p.name.isdigit()] == ["4"]
    filler = small_disk / "filler"
    free = shutil.disk_usage(small_disk).free
    filler.write_bytes(b"x" * (free - 256 * 1024))
    result = run_train(train_command(files, output, **options), environment)
    check_failed_save(result, output)
    assert "No space left on device" in result.stderr
    filler.unlink()
    capsys.readouterr()
    assert olmoe_jax.train(files.config(output, **options)).finished
    assert f"continuing after step 4 of {len(losses(whole))}" in capsys.readouterr().out
    assert losses(output) == losses(whole)
    assert exported_bytes(output) == exported_bytes(whole)


def _stopped_at_4(files, output, options, environment) -> list[int]:
    """Makes the checkpoint of step 4 and no other: a run whose fifth step is its death."""
    code = f"""
import os, signal, sys
from olmoe_jax.training.reporting import Reporter
original = Reporter.step
def step(self, line, scalars):
    original(self, line, scalars)
    if line["step"] == 5:
        while not os.path.isdir({str(output / "checkpoints" / "4")!r}):
            pass
        os.kill(os.getpid(), signal.SIGKILL)
Reporter.step = step
import train
train.main(sys.argv[1:])
"""
    command = [sys.executable, "-c", code, *files.arguments(output, **options)]
    result = run_train(command, {**environment, "PYTHONPATH": str(ROOT)})
    assert result.returncode == -signal.SIGKILL, result.stderr
    return [int(p.name) for p in (output / "checkpoints").iterdir() if p.name.isdigit()]


@pytest.mark.exhaustive
def test_a_save_that_fails_leaves_the_previous_checkpoint(tmp_path, tokenizer_dir, environment):
    """As above, with a limit on the size of files, which needs no rights."""
    files = make_files(tmp_path / "files", tokenizer_dir)
    options = {"train__checkpoint_every": 4, "data__eval_path": None, "data__eval_fraction": 0.0}
    output = tmp_path / "run"
    assert _stopped_at_4(files, output, options, environment) == [4]
    before = snapshot(output / "checkpoints" / "4")
    # In blocks of 512 bytes.
    limited = ["sh", "-c", 'ulimit -f 200; exec "$@"', "sh"]
    result = run_train([*limited, *train_command(files, output, **options)], environment)
    check_failed_save(result, output)
    assert snapshot(output / "checkpoints" / "4") == before
    result = run_train(train_command(files, output, **options), environment)
    assert result.returncode == 0, result.stderr
    assert len(losses(output)) == 12


def test_real_data_with_the_real_tokenizer(tmp_path, shared, environment):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = {**MODEL, "vocab_size": 50304, "hidden_size": 64, "intermediate_size": 32}
    (tmp_path / "config.json").write_text(json.dumps({**model, "initializer_range": 0.02}))
    output = tmp_path / "run"
    rows = (shared / "data" / "gsm8k" / "test.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "test.jsonl").write_text("".join(rows[:50]))
    fields = {
        "model.init": "random",
        "model.config_path": tmp_path / "config.json",
        "model.compute_dtype": "float32",
        "data.train_path": shared / "data" / "gsm" / "train.jsonl",
        "data.eval_path": tmp_path / "test.jsonl",
        "data.tokenizer_path": shared / "data" / "tokenizer",
        "data.max_seq_length": 512,
        "optimizer.learning_rate": 3e-3,
        "train.batch_size": 4,
        "train.max_steps": 12,
        "train.output_dir": output,
    }
    flags = [f"--config.{field}={value}" for field, value in fields.items()]
    config = ROOT / "configs" / "densemixer_gsm.py"
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(config), *flags]
    result = run_train(command, environment | AS_USERS_COMPILE)
    assert result.returncode == 0, result.stderr
    curve = list(losses(output).values())
    assert len(curve) == 12
    assert np.isfinite(curve).all()
    assert curve[0] == pytest.approx(np.log(50304), rel=0.02)
    assert np.mean(curve[-3:]) < 0.95 * curve[0]
    (evaluation,) = [line for line in metrics(output) if "eval_loss" in line]
    assert evaluation["step"] == 12
    assert evaluation["eval_loss"] < curve[0]
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        output / "hf", output_loading_info=True
    )
    assert not any(info.values())
    tokenizer = transformers.AutoTokenizer.from_pretrained(output / "hf")
    tokens = torch.tensor([tokenizer("Question: 2 + 3?\nAnswer:")["input_ids"]])
    with torch.no_grad():
        assert torch.isfinite(loaded(tokens).logits).all()
    assert os.path.getsize(output / "hf" / "model.safetensors") > 50304 * 64 * 2 * 4
