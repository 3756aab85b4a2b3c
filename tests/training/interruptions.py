"""Runs that are stopped, killed or refused, and what they leave."""

import os
import signal
from pathlib import Path

import pytest
from training.tiny_run import exported_bytes, metrics

import olmoe_jax
from olmoe_jax.errors import UserError


class Crash(BaseException):
    """Stands for the death of the process."""


def stop():
    os.kill(os.getpid(), signal.SIGTERM)


def crash():
    raise Crash


def without_seconds(lines):
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def assert_same_when_stopped(config, at_step, whole: Path) -> Path:
    """Stopped after step 4 and continued, the run is `whole`; returns its directory."""
    at_step(4, stop)
    assert not olmoe_jax.train(config).finished
    output = olmoe_jax.train(config).output_dir
    assert without_seconds(metrics(output)) == without_seconds(metrics(whole))
    assert exported_bytes(output) == exported_bytes(whole)
    return output


def snapshot(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def refused(config) -> str:
    """The message with which a run is refused; the output directory must stay as it is."""
    output = Path(config.train.output_dir)
    before = snapshot(output)
    with pytest.raises(UserError) as caught:
        olmoe_jax.train(config)
    assert snapshot(output) == before
    message = str(caught.value)
    assert len(message) < 400
    return message


def training_error(config) -> str:
    """The message, one line, with which training is refused."""
    with pytest.raises(UserError) as caught:
        olmoe_jax.train(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)
