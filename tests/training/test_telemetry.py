"""Traces of jax.profiler and Weights & Biases."""

import json
import sys
import time
import types

import jax
import numpy as np
import pytest
from training.tiny_run import metrics

import olmoe_jax
from olmoe_jax.errors import UserError
from olmoe_jax.training.reporting import WandB
from olmoe_jax.training.telemetry import Breakdown, Pace


def test_breakdown():
    clock = Breakdown()
    for _ in range(2):
        with clock.part("data"):
            time.sleep(0.01)
    with pytest.raises(KeyError), clock.part("checkpoint"):
        raise KeyError
    scalars = clock.take()
    assert set(scalars) == {"time/data_seconds", "time/checkpoint_seconds"}
    assert 0.02 <= scalars["time/data_seconds"] < 1
    assert clock.take() == {}


@pytest.fixture
def pace():
    pace = Pace()
    yield pace
    pace.close()


def test_the_time_left_is_without_compilation(pace):
    """A run of six: step 1 compiles for 14 minutes, step 4 for another shape."""
    times = jax.jit(lambda x: 2 * x)
    said = []
    for step, (ends, length) in enumerate([(840, 3), (841, 3), (842, 3), (900, 4), (903, 3)], 1):
        times(np.zeros(length))
        pace.step_ends(ends)
        said.append(pace.left(6 - step))
    # Steps of 1, 1 and 3 seconds count.
    assert said == [None, "0:00:04", "0:00:03", "0:00:02", "0:00:02"]
    assert pace.left(100_000) == "1 day, 22:17:47"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wanted", "traced"),
    [
        (2, 2),
        pytest.param(100, 10, marks=pytest.mark.exhaustive),
        pytest.param(0, None, marks=pytest.mark.exhaustive),
    ],
)
def test_profile(files, tmp_path, capsys, wanted, traced):
    output = tmp_path / "run"
    olmoe_jax.train(files.config(output, train__profile_steps=wanted))
    traces = list((output / "tensorboard").glob("plugins/profile/*/*.xplane.pb"))
    said = capsys.readouterr().out
    assert len(traces) == (traced is not None)
    assert (f"profile of {traced} steps: {output / 'tensorboard'}" in said) == bool(traces)


class Recorder(types.ModuleType):
    """In the place of wandb, which is no dependency."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = types.SimpleNamespace(name="wandb")
        self.starts, self.logged, self.finished = [], {}, 0

    def init(self, **options):
        self.starts.append(options)
        return self

    def log(self, values, step):
        self.logged.setdefault(step, {}).update(values)

    def finish(self):
        self.finished += 1


@pytest.mark.slow
def test_wandb_gets_what_tensorboard_gets(files, tmp_path, monkeypatch):
    wandb = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    output = tmp_path / "run"
    options = {"train__wandb_project": "olmoe", "train__checkpoint_every": 1}
    olmoe_jax.train(files.config(output, **options))
    olmoe_jax.train(files.config(output, **options))  # nothing is left to do: the same W&B run
    first, second = wandb.starts
    assert first["id"] == second["id"]
    assert (first["project"], first["name"], first["resume"]) == ("olmoe", "run", "allow")
    assert first["config"] == json.loads((output / "config.json").read_text())
    assert wandb.finished == 2
    for line in metrics(output):
        for name, tag in {"loss": "train/loss", "eval_loss": "eval/loss"}.items():
            if name in line:
                assert wandb.logged[line["step"]][tag] == pytest.approx(line[name])


def test_wandb_begins_no_run(tmp_path, monkeypatch):
    def init(**options):
        raise ValueError("api_key not configured (no-tty)")

    wandb = Recorder()
    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(UserError, match=r"\(api_key not configured .*; set WANDB_API_KEY or WANDB"):
        WandB("olmoe", tmp_path, {})


def test_wandb_is_not_installed(files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = files.config(tmp_path / "run", train__wandb_project="olmoe")
    with pytest.raises(UserError, match="pip install wandb"):
        olmoe_jax.train(config)
    assert not (tmp_path / "run").exists()
