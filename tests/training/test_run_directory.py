"""The run's directory: which may be set aside, and what a write says that failed."""

import errno
import os
from pathlib import Path

import pytest
from helpers import message_of
from training.interruptions import refused

from olmoe_jax.config import Config, ModelOptions, TrainOptions
from olmoe_jax.training import run_directory
from olmoe_jax.training.checkpoint import Checkpointer


def config_of(output, resume="restart") -> Config:
    train = TrainOptions(output_dir=str(output), resume=resume)
    return Config(model=ModelOptions(init="random", config_path="x"), train=train)


@pytest.fixture
def run(tmp_path):
    """The directory of a run, with a directory in it."""
    (tmp_path / "run" / "inner").mkdir(parents=True)
    run_directory.write_run_config(tmp_path / "run", config_of(tmp_path / "run"))
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("here", "output"),
    [("run", "."), ("run", "{run}"), ("run/inner", ".."), ("run/inner", "{run}")],
)
def test_the_current_directory_is_not_set_aside(files, run, monkeypatch, here, output):
    monkeypatch.chdir(run.parent / here)
    output = output.format(run=run)
    message = refused(files.config(Path(output), train__resume="restart"))
    assert message.startswith(f"train.resume=restart: {output} is a mount point, or the current ")
    assert message.endswith("write another train.output_dir")


def test_a_mount_point_is_not_set_aside(run, monkeypatch):
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == run)
    assert "is a mount point" in message_of(run_directory.check, config_of(run))


@pytest.mark.parametrize("name", ["run", "run/inner/.."])
def test_a_run_is_set_aside(run, tmp_path, name):
    config = config_of(tmp_path / name)
    run_directory.check(config)
    with run_directory.opened(config, lambda files: None):
        assert (tmp_path / "run.old-1" / "config.json").exists()
        assert not (tmp_path / name / "inner" / "config.json").exists()


def test_a_start_that_was_cut_off_is_taken_by_a_restart(tmp_path, monkeypatch):
    """A restart refuses the current directory, which cannot be set aside."""
    (tmp_path / run_directory.PARTIAL_MODEL).mkdir()
    monkeypatch.chdir(tmp_path)
    run_directory.check(config_of("."))
    with run_directory.opened(config_of("."), lambda files: None):
        assert (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            ValueError(
                f"RESOURCE_EXHAUSTED: Error writing f: {os.strerror(errno.ENOSPC)} [OS: 28]"
            ),
            "(No space left on device); no checkpoint is complete; free space and run the same",
        ),
        (
            PermissionError(errno.EACCES, os.strerror(errno.EACCES), "f"),
            "(Permission denied); no checkpoint is complete; give this user write permission and",
        ),
        (
            OSError(errno.EROFS, os.strerror(errno.EROFS), "f"),
            "(Read-only file system); no checkpoint is complete; make the file system writable and",
        ),
        (
            RuntimeError("odd\nthing"),
            "(odd thing); no checkpoint is complete; run the same command",
        ),
    ],
)
def test_a_failed_save_says_what_helps(tmp_path, monkeypatch, error, expected):
    checkpoints = Checkpointer(tmp_path, 1, {})

    def fail():
        raise error

    monkeypatch.setattr(checkpoints._manager, "check_for_errors", fail)
    message = message_of(checkpoints.check)
    assert message.startswith(f"{tmp_path}: a checkpoint could not be saved {expected}")
    assert message.endswith("run the same command again")
