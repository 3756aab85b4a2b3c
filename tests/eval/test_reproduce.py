"""make reproduce: its commands, its refusals, and all of it with the small model."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, assert_user_error, message_of, run_command_line, run_module

from configs.table import DATASETS, EXPERIMENTS
from eval.reproduce import small
from eval.reproduce.__main__ import main
from eval.reproduce.cells import Command, Reproduction, Runner


def write(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()


def table(output: Path, methods, datasets, data=None, **config) -> Reproduction:
    fields = {name.replace("__", "."): value for name, value in config.items()}
    return Reproduction(output, methods, datasets, "m/x", data, fields, ["--limit=5"])


def test_all_cells_of_the_table(tmp_path):
    whole = table(tmp_path, EXPERIMENTS, list(DATASETS))
    steps = list(whole.commands())
    assert len(steps) == 1 + 6 * 8 * 3
    assert steps[0].arguments[2:8] == [
        "--model", "m/x", "--tasks", "gsm,mbpp,humaneval,intent,law,summary,translation",
        "--output", f"{tmp_path}/base/eval",
    ]  # fmt: skip
    assert all(not step.done() for step in steps)
    for method in EXPERIMENTS:
        for dataset in DATASETS:
            assert (
                whole.resolved(method, dataset).train.output_dir == f"{tmp_path}/{method}_{dataset}"
            )


def test_steps_of_a_cell(tmp_path):
    cell = table(tmp_path, ["esft_token"], ["gsm"], tmp_path, train__batch_size="8")
    _, train, export, evaluate = cell.commands()
    run = tmp_path / "esft_token_gsm"
    assert train.arguments[3].endswith("configs/esft_token_gsm.py")
    assert f"--config.data.eval_path={tmp_path}/gsm8k/test.jsonl" in train.arguments
    assert train.arguments[-1] == "--config.train.batch_size=8"
    assert export.arguments[-1] == str(run / "hf")
    assert evaluate.arguments[-3:] == ["--data", str(tmp_path), "--limit=5"]
    assert evaluate.weights == (run / "checkpoints", run / "hf")


def test_what_is_there_is_done(tmp_path):
    steps = {step.name: step for step in table(tmp_path, ["frozen"], ["gsm"]).commands()}
    train, export = steps["train frozen gsm"], steps["export frozen gsm"]
    write(tmp_path / "frozen_gsm/loss.png")
    assert train.done()
    assert not export.done()
    # An evaluated cell needs its weights no more.
    write(tmp_path / "frozen_gsm/eval/gsm/result.json")
    (tmp_path / "frozen_gsm/loss.png").unlink()
    assert train.done()
    assert export.done()
    assert not steps["evaluate base"].done()


def test_errors_come_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(Runner, "run", lambda self, step: pytest.fail(step.name))
    output = ["--output", str(tmp_path / "out"), "--model", "m/x"]
    for arguments, expected in (
        (["--methods", "dense"], "--methods: there is no 'dense'"),
        (["--datasets", "gsm8k"], "--datasets: there is no 'gsm8k'"),
        (["--datasets", "gsm", "--config.train.seed=x"], "train.seed=x: expected int"),
        (["--datasets", "gsm", "--config.train.sed=1"], "did you mean train.seed?"),
        (["--datasets", "gsm", "--eval.limt=1"], "--limt=1"),
        (["--datasets", "gsm", "--eval.tasks=law"], "--eval.tasks=law: unknown"),
        (["--datasets", "gsm", "--limit=1"], "--limit=1: unknown"),
        (["--config.train.output_dir=x"], "output_dir=x: unknown, or set by this command"),
        ([], "add --eval.allow_code_execution"),
        (["--datasets", "law", "--data", str(tmp_path)], "no esft/train/law.jsonl there for law"),
        (["--small"], "--model: --small makes its own"),
    ):
        assert expected in message_of(main, [*output, *arguments])
        assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/x").touch()
    assert "holds other files and no reproduce.json" in message_of(
        main, [*output, "--datasets", "gsm"]
    )
    stored = {"model": "m/y", "data": None, "config": {}, "evaluation": []}
    (tmp_path / "out/reproduce.json").write_text(json.dumps(stored))
    assert "was begun with model=m/y, now it is m/x" in message_of(
        main, [*output, "--datasets", "gsm"]
    )


@pytest.mark.parametrize("former", ["relative", "absolute"])
def test_the_same_paths_spelled_otherwise(tmp_path, monkeypatch, former):
    """A path in what was asked, in a field or a flag too, is the file and not its spelling."""
    monkeypatch.setattr(Runner, "run", lambda self, step: pytest.fail(step.name))
    monkeypatch.setattr(small, "write_inputs", lambda *_: pytest.fail("begins"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer").mkdir()
    fields = "--config.data.tokenizer_path={0}tokenizer --eval.tokenizer={0}tokenizer"
    spellings = [
        f"--small --output {{0}}out {fields}".format(place).split()
        for place in ("", f"{tmp_path}/")
    ]
    if former == "absolute":
        spellings.reverse()
    before = signal.getsignal(signal.SIGTERM)
    try:
        for arguments in spellings:
            with pytest.raises(pytest.fail.Exception, match="begins"):
                main(arguments)
        assert "was begun with evaluation=" in message_of(main, arguments[:-1])
    finally:
        signal.signal(signal.SIGTERM, before)
    stored = json.loads((tmp_path / "out/reproduce.json").read_text())
    assert stored["model"] == f"{tmp_path}/out/small/model"
    # What earlier versions wrote.
    stored |= {"model": "out/small/model", "data": "out/small/data"}
    (tmp_path / "out/small/model").mkdir(parents=True)
    (tmp_path / "out/small/data").mkdir()
    (tmp_path / "out/reproduce.json").write_text(json.dumps(stored))
    with pytest.raises(pytest.fail.Exception, match="begins"):
        main(arguments)


def test_sigterm_and_failures_end_all(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    try:
        runner = Runner(tmp_path)
        fails = Command("a", ["-c", "raise SystemExit(3)"], lambda: False)
        assert message_of(runner.run, fails).startswith("a failed with exit code 3")
        stops = Command("b", ["-c", "pass"], lambda: False)
        assert message_of(runner.run, stops).startswith("b stopped before its end")
        # The step that runs gets the signal too: it does not sleep to its end.
        sends = f"import os, time; os.kill({os.getpid()}, {int(signal.SIGTERM)}); time.sleep(60)"
        started = time.monotonic()
        sleeps = Command("c", ["-c", sends], lambda: True)
        assert message_of(runner.run, sleeps).startswith("SIGTERM while at: c; the same command")
        assert time.monotonic() - started < 30
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.exhaustive
def test_small_on_rows_as_on_the_hub(tmp_path):
    """Rows of prompt and completion, in the hub's files, go through every step."""
    answers = {"intent": '{"intent": "A", "slots": {"x": "甲"}}', "translation": "a stone"}
    for name, answer in answers.items():
        rows = [{"prompt": f"{n}\n答案：", "completion": answer} for n in range(1, 41)]
        for file in ("train", "test"):
            write(path := tmp_path / f"data/ESFT-{name}/{file}.jsonl")
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "run"
    arguments = ["--output", output, "--data", tmp_path / "data", "--methods", "frozen"]
    small = ["--small", "--config.train.max_steps=2", "--config.data.max_seq_length=128"]
    code, _, stderr = run_module("eval.reproduce", *arguments, *small, timeout=900)
    assert code == 0, stderr
    result = json.loads((output / "frozen_translation/eval/translation/result.json").read_text())
    assert result["metrics"]["chrf"]["rows"] == 20
    assert "intent (exact" in (output / "report/report.md").read_text()
    assert_user_error(
        run_module("eval.reproduce", "--output", tmp_path / "b", "--small", "--data", output),
        "has the files of no data set (e.g. esft/train/intent.jsonl, esft/eval/intent.jsonl)",
    )


SMALL = ["--small", "--methods", "esft_gate", "--config.train.max_steps=10"]
SHORT_BASE = """
from eval.reproduce import __main__, small
from olmoe_jax.errors import run_command

small.BASE["train.max_steps"] = "10"
run_command(__main__.main)
"""
"""The command, but for a base of few steps: what the models answer does not matter here."""


@pytest.mark.slow
def test_small_from_training_to_report(tmp_path, capfd):
    """A run that is killed while it trains continues without repeating complete steps."""
    output = tmp_path / "run"
    arguments = ["-c", SHORT_BASE, "--output", str(output), *SMALL]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("step 1/10") and any("train esft_gate" in line for line in said):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert (output / "base/eval/gsm/result.json").exists()
    assert not (output / "esft_gate_gsm/loss.png").exists()

    code, said, stderr = run_command_line(*arguments, timeout=600)
    assert code == 0, stderr
    assert [line for line in said.splitlines() if line.startswith("[")] == [
        "[2/4] train esft_gate gsm",
        "[3/4] export esft_gate gsm",
        "[4/4] evaluate esft_gate gsm",
    ]
    report = (output / "report/report.md").read_text()
    for name in ("base", r"esft\_gate"):
        assert f"\n| {name} | " in report
    assert "router_entropy_gsm.svg" in report
    assert "experts_esft_gate_gsm.png" in report
    (output / "report/report.md").unlink()
    code, said, _ = run_command_line(*arguments, "--discard_weights", timeout=600)
    assert code == 0
    assert "[" not in said
    assert not (output / "esft_gate_gsm/hf").exists()
    assert not (output / "esft_gate_gsm/checkpoints").exists()
    # The same report again, without the weights.
    assert (output / "report/report.md").read_text() == report
