"""Continuing a run: exactly where it stopped, or refused with the reason."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from training.interruptions import (
    Crash,
    assert_same_when_stopped,
    crash,
    refused,
    snapshot,
    stop,
    without_seconds,
)
from training.test_training_run import board
from training.tiny_run import exported_bytes, losses, make_files, metrics

import olmoe_jax
from olmoe_jax.errors import UserError
from olmoe_jax.training import run_directory
from olmoe_jax.training.event_file import TAGS
from olmoe_jax.training.reporting import Reporter

pytestmark = pytest.mark.slow

STEPS = 12
OPTIONS = {"train__checkpoint_every": 4, "train__eval_every": 5}


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """A run that nothing interrupted."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    assert olmoe_jax.train(files.config(output, **OPTIONS)).step == STEPS
    return output


def assert_same_run(output, whole):
    assert len(losses(output)) == STEPS
    assert without_seconds(metrics(output)) == without_seconds(metrics(whole))
    assert exported_bytes(output) == exported_bytes(whole)
    ours, theirs = board(output)[0], board(whole)[0]
    for tag in (TAGS["train/loss"], TAGS["eval/loss"], "router/entropy_mean", "train/epoch"):
        assert ours[tag] == theirs[tag]


def test_sigterm_saves_and_the_same_command_continues(files, whole, tmp_path, at_step, capsys):
    """After step 6 of 6: the first step of the next epoch has been begun.

    The run keeps the backend that it chose at its start.
    """
    before = signal.getsignal(signal.SIGTERM)
    config = files.config(tmp_path / "run", **OPTIONS, model__grouped_matmul="auto")
    at_step(6, stop)
    stopped = olmoe_jax.train(config)
    assert not stopped.finished
    assert signal.getsignal(signal.SIGTERM) is before
    assert stopped.step in (6, 7)
    assert (stopped.output_dir / "checkpoints" / str(stopped.step)).is_dir()
    assert not (stopped.output_dir / "hf").exists()
    assert f"SIGTERM: saved step {stopped.step}; the same command" in capsys.readouterr().out
    assert olmoe_jax.train(config).finished
    said = capsys.readouterr().out
    assert f"continuing after step {stopped.step} of {STEPS}" in said
    assert ", attention: chunked, compute float32" in said
    assert "model.grouped_matmul=auto: keeps the run's blocked\n" in said
    stored = json.loads((stopped.output_dir / "config.json").read_text())
    assert stored["model"]["grouped_matmul"] == "blocked"
    assert_same_run(stopped.output_dir, whole)


@pytest.mark.parametrize(
    "last", [2, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (7, 11))]
)
def test_steps_after_the_last_checkpoint_are_repeated(files, whole, tmp_path, at_step, last):
    """Also before the first checkpoint; what may change between the runs does."""
    output = tmp_path / "run"
    at_step(last, crash)
    with pytest.raises(Crash):
        olmoe_jax.train(files.config(output, **OPTIONS))
    assert [line["step"] for line in metrics(output) if "loss" in line] == [*range(1, last + 1)]
    # A crash may leave half a line.
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')
    changed = {
        **OPTIONS,
        "train__checkpoint_every": 3,
        "train__keep_checkpoints": 1,
        "mesh__data": 1,
        "mesh__fsdp": 1,
    }
    assert olmoe_jax.train(files.config(output, **changed)).finished
    assert_same_run(output, whole)


@pytest.mark.parametrize(
    ("moments", "master"),
    [
        pytest.param("bfloat16", "float32", marks=pytest.mark.exhaustive),
        ("bfloat16", "bfloat16"),
        pytest.param("int8", "float32", marks=pytest.mark.exhaustive),
    ],
)
def test_with_a_lean_state(files, tmp_path, at_step, moments, master):
    """Stochastic rounding draws the same again; several micro-batches in a step, unpacked."""
    options = {
        "data__pack": False,
        "model__compute_dtype": "bfloat16",
        "optimizer__moments_dtype": moments,
        "optimizer__gradients_dtype": "bfloat16",
        "optimizer__master_dtype": master,
        "train__rows_per_device": 1,
        "train__max_steps": 10,
    }
    expected = olmoe_jax.train(files.config(tmp_path / "whole", **options)).output_dir
    assert losses(expected)[10] < losses(expected)[1] - 0.5
    output = assert_same_when_stopped(files.config(tmp_path / "run", **options), at_step, expected)
    with pytest.raises(UserError, match=rf"optimizer\.moments_dtype: the run has {moments}"):
        olmoe_jax.train(files.config(output, **options | {"optimizer__moments_dtype": "float32"}))


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", [{"lora_rank": 4}, {"name": "esft_gate"}])
def test_adapters_and_tuned_experts_with_a_lean_state(files, tmp_path, method):
    options = {
        "model__compute_dtype": "bfloat16",
        "optimizer__moments_dtype": "bfloat16",
        "optimizer__gradients_dtype": "bfloat16",
        "train__max_steps": 8,
        "optimizer__learning_rate": 2e-2,
        **{f"method__{name}": value for name, value in method.items()},
    }
    output = olmoe_jax.train(files.config(tmp_path / "run", **options)).output_dir
    assert losses(output)[8] < losses(output)[1] - 0.1
    assert (output / ("adapter" if "lora_rank" in method else "hf")).is_dir()


def test_a_finished_run_is_left_alone(files, whole):
    before = snapshot(whole)
    result = olmoe_jax.train(files.config(whole, **OPTIONS))
    assert (result.step, result.finished) == (STEPS, True)
    after = snapshot(whole)
    ignored = re.compile("tensorboard/|loss.png")
    for name in {*before, *after}:
        assert ignored.match(name) or after.get(name) == before.get(name), name


def test_restart_sets_the_old_run_aside(files, whole, tmp_path, capsys):
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    before = snapshot(output)
    options = {
        "optimizer__learning_rate": 1e-3,
        "train__max_steps": 1,
        "train__export_hf": False,
    }
    for number in (1, 2):
        config = files.config(output, **options, train__resume="restart")
        assert olmoe_jax.train(config).step == 1
        old = tmp_path / f"run.old-{number}"
        assert f"the old run is now {old}" in capsys.readouterr().out
        assert len(losses(output)) == 1
    assert snapshot(tmp_path / "run.old-1") == before
    assert len(losses(tmp_path / "run.old-2")) == 1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"optimizer__learning_rate": 1e-3, "train__seed": 1},
            "optimizer.learning_rate: the run has 0.003, this command says 0.001",
        ),
        ({"train__batch_size": 5}, "train.batch_size: the run has 4, this command says 5"),
        ({"train__max_steps": 5}, "train.max_steps: the run has none, this command says 5"),
        ({"method__name": "frozen"}, "method.name: the run has densemixer, this command says"),
    ],
)
def test_another_configuration_is_refused(files, whole, changes, expected):
    message = refused(files.config(whole, **{**OPTIONS, **changes}))
    assert f"{whole} holds another run: {expected}" in message
    assert "train.resume=restart" in message


def test_a_second_run_in_the_directory_is_refused(files, whole):
    """The first runs in this very process: its lock is another's to the second all the same."""
    for resume in ("auto", "restart"):
        with run_directory.opened(files.config(whole, **OPTIONS), lambda files: None):
            message = refused(files.config(whole, **OPTIONS, train__resume=resume))
        assert f"process {os.getpid()} on " in message
        assert "is running in it; wait until it has ended, or write another" in message
    # The lock ended with the run, although its file is still there.
    assert (whole / ".lock").exists()
    with run_directory.opened(files.config(whole, **OPTIONS), lambda files: None):
        pass


def test_a_foreign_directory_is_refused(files, tmp_path):
    output = tmp_path / "home"
    output.mkdir()
    (output / "thesis.tex").write_text("precious")
    for resume in ("auto", "restart"):
        message = refused(files.config(output, train__resume=resume))
        assert message.startswith(f"train.output_dir={output}: holds files but no run")
    config = files.config(output / "thesis.tex")
    with pytest.raises(NotADirectoryError, match=r"thesis.tex"):
        olmoe_jax.train(config)


def test_an_empty_directory_and_a_start_cut_off_are_taken(files, tmp_path, monkeypatch):
    """Killed while the directory is being made, the same command must still work."""
    from olmoe_jax.checkpoints import directory

    config = files.config(tmp_path / "run", train__max_steps=1, train__export_hf=False)
    (tmp_path / "run").mkdir()
    for name in ("copy_files", "write_json"):
        with monkeypatch.context() as patch:
            original = getattr(directory, name)

            def cut_off(*arguments, original=original, **keywords):
                original(*arguments, **keywords)
                raise Crash

            patch.setattr(directory, name, cut_off)
            with pytest.raises(Crash):
                olmoe_jax.train(config)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: crash())
        with pytest.raises(Crash):
            olmoe_jax.train(config)
    output = olmoe_jax.train(config).output_dir
    present = {path.name for path in (output / "model").iterdir()}
    assert present >= {"config.json", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def own_files(tmp_path_factory, tokenizer_dir):
    """Files that the tests below change and put back, and a run on them that was stopped."""
    files = make_files(tmp_path_factory.mktemp("own"), tokenizer_dir)
    output = files.train.parent / "run"
    original = Reporter.step

    def step(self, line, scalars):
        original(self, line, scalars)
        if line["step"] == 6:
            stop()

    Reporter.step = step
    try:
        assert not olmoe_jax.train(files.config(output, **OPTIONS)).finished
    finally:
        Reporter.step = original
    return files, output


@pytest.fixture
def stopped(own_files, tmp_path):
    """A copy of the stopped run."""
    files, output = own_files
    shutil.copytree(output, tmp_path / "run")
    return files, tmp_path / "run"


@pytest.mark.parametrize("which", ["training", "evaluation"])
def test_changed_data_is_refused(stopped, which):
    files, output = stopped
    path = files.train if which == "training" else files.evaluation
    content = path.read_text()
    try:
        path.write_text(content + '{"prompt": "1+1=", "completion": "2"}\n')
        message = refused(files.config(output, **OPTIONS))
    finally:
        path.write_text(content)
    assert f"the checkpoint of step 6 is of other {which} data" in message
    assert "train.resume=restart" in message


def test_a_checkpoint_of_an_earlier_version_is_refused(stopped):
    """It has no checksums."""
    files, output = stopped
    for file in output.rglob("checksums.json"):
        file.unlink()
    message = refused(files.config(output, **OPTIONS))
    assert "the checkpoint of step 6 was written by an earlier version of olmoe_jax" in message
    assert "its exports still open; write another train.output_dir" in message


@pytest.mark.parametrize(
    ("field", "value"),
    [("rope_theta", 20000.0), pytest.param("hidden_size", 48, marks=pytest.mark.exhaustive)],
)
def test_a_checkpoint_of_a_different_model_is_refused(stopped, field, value):
    files, output = stopped
    path = files.model / "config.json"
    content = path.read_text()
    try:
        path.write_text(json.dumps({**json.loads(content), field: value}))
        message = refused(files.config(output, **OPTIONS))
    finally:
        path.write_text(content)
    assert "the checkpoint of step 6 is of a different model" in message
    assert f"config.json now says {field}={value}" in message


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def truncate(path: Path) -> None:
    for file in [file for file in path.rglob("*") if file.is_file()]:
        os.truncate(file, file.stat().st_size // 2)


DAMAGES = {
    "state missing": lambda checkpoint: remove(checkpoint / "state"),
    "state truncated": lambda checkpoint: truncate(checkpoint / "state"),
    "state without arrays": lambda checkpoint: [remove(p) for p in checkpoint.glob("state/*d*")],
    "data missing": lambda checkpoint: remove(checkpoint / "data"),
    "data truncated": lambda checkpoint: truncate(checkpoint / "data"),
    "identity missing": lambda checkpoint: remove(checkpoint / "identity"),
    "identity truncated": lambda checkpoint: truncate(checkpoint / "identity"),
    "everything truncated": truncate,
}


QUICKLY_TESTED = ("state truncated", "data missing", "identity truncated", "everything truncated")


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(name, marks=[] if name in QUICKLY_TESTED else pytest.mark.exhaustive)
        for name in DAMAGES
    ],
)
def test_a_damaged_checkpoint_is_one_clear_line(stopped, damage, capfd):
    """Where there is no earlier one to go back to."""
    files, output = stopped
    for earlier in [5, 4]:
        shutil.rmtree(output / "checkpoints" / str(earlier), ignore_errors=True)
    DAMAGES[damage](output / "checkpoints" / "6")
    message = refused(files.config(output, **OPTIONS))
    assert "\n" not in message
    assert "the checkpoint of step 6 cannot be read" in message
    assert "remove checkpoints/6 to start from the beginning" in message
    assert f"{output}" in message


@pytest.mark.parametrize(
    "damage",
    [
        "everything truncated",
        pytest.param("state truncated", marks=pytest.mark.exhaustive),
        pytest.param("data missing", marks=pytest.mark.exhaustive),
    ],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(stopped, damage, whole, capsys):
    files, output = stopped
    DAMAGES[damage](output / "checkpoints" / "6")
    before = snapshot(output / "checkpoints" / "6")
    assert olmoe_jax.train(files.config(output, **OPTIONS)).finished
    said = capsys.readouterr().out
    assert "the checkpoint of step 6 cannot be read" in said
    # Saved after the evaluation there.
    assert "going back to step 5" in said
    assert f"continuing after step 5 of {STEPS}" in said
    assert snapshot(output / "damaged-6") == before
    assert_same_run(output, whole)


@pytest.mark.exhaustive
def test_no_checkpoints_left_starts_from_the_beginning(stopped, whole):
    files, output = stopped
    remove(output / "checkpoints")
    assert olmoe_jax.train(files.config(output, **OPTIONS)).finished
    assert_same_run(output, whole)


@pytest.mark.exhaustive
def test_without_a_checkpoint_the_model_may_still_change(stopped):
    """What is exported then describes the model that was trained."""
    files, output = stopped
    remove(output / "checkpoints")
    path = files.model / "config.json"
    content = path.read_text()
    try:
        path.write_text(json.dumps({**json.loads(content), "rope_theta": 500.0}))
        assert olmoe_jax.train(files.config(output, **OPTIONS)).finished
    finally:
        path.write_text(content)
    assert json.loads((output / "hf" / "config.json").read_text())["rope_theta"] == 500.0
