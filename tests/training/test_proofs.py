"""The proof of a run's kernels: the right ones pass, the others end the run or are left out."""

import dataclasses
import types

import pytest
from helpers import message_of
from tiny import tiny_config

from olmoe_jax import methods
from olmoe_jax.config import Config, ModelOptions, TrainOptions
from olmoe_jax.errors import UserError
from olmoe_jax.model.config import LoraSettings, ModelSettings
from olmoe_jax.ops import grouped_matmul
from olmoe_jax.ops.grouped_matmul import ragged
from olmoe_jax.ops.proof import time_attention, time_grouped_matmul
from olmoe_jax.training import proofs, run_directory
from olmoe_jax.training.base_model import BaseModel
from olmoe_jax.training.proofs import prove_kernels

CONFIG = tiny_config()
SETTINGS = ModelSettings(grouped_matmul="blocked", attention="chunked")


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LoraSettings(4, 8.0)])
def test_right_kernels(lora):
    line = prove_kernels(CONFIG, dataclasses.replace(SETTINGS, lora=lora), rows=2, length=32)
    assert line.startswith("kernels proven against plain XLA: largest error grouped_matmul ")


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ("sum", "model.grouped_matmul=fast: wrong on this device, its error against plain XLA is "),
        ("nan", "model.grouped_matmul=fast: wrong on this device, its error against plain XLA is "),
        ("none", "model.grouped_matmul=fast: does not run here (no compiler); write "),
    ],
)
def test_a_wrong_kernel_is_caught(monkeypatch, wrong, expected):
    def rows_by_rows(*arguments):
        if wrong == "none":
            raise RuntimeError("no compiler\nand more")
        return ragged.rows_by_rows(*arguments) * (1.1 if wrong == "sum" else float("nan"))

    fake = types.SimpleNamespace(rows_by_weights=ragged.rows_by_weights, rows_by_rows=rows_by_rows)
    monkeypatch.setitem(grouped_matmul.BACKENDS, "fast", fake)
    settings = dataclasses.replace(SETTINGS, grouped_matmul="fast")
    said = message_of(prove_kernels, CONFIG, settings, 2, 32)
    assert said.startswith(expected)
    assert said.endswith("write model.grouped_matmul=blocked")


@pytest.mark.parametrize("broken", ["grouped_matmul", "attention"])
def test_the_plain_kernels_have_none_to_fall_back_on(monkeypatch, broken):
    for name in ("grouped_matmul", "attention"):
        error = 1.0 if name == broken else 0.0
        monkeypatch.setattr(proofs, f"prove_{name}", lambda *_, error=error: error)
    said = message_of(prove_kernels, CONFIG, SETTINGS, 2, 32)
    backend = getattr(SETTINGS, broken)
    assert said.startswith(f"model.{broken}={backend}: wrong on this device")
    assert said.endswith("; run olmoe_jax.doctor")


def test_auto_takes_the_fastest_that_is_right(monkeypatch, capsys):
    """A wrong backend and one that does not run are left out, each with a line."""

    def wrong(*arguments):
        return ragged.rows_by_rows(*arguments) * 1.1

    def missing(*arguments):
        raise RuntimeError("no compiler\nand more")

    for name, rows_by_rows in {"wrong": wrong, "missing": missing}.items():
        fake = types.SimpleNamespace(
            rows_by_weights=ragged.rows_by_weights, rows_by_rows=rows_by_rows
        )
        monkeypatch.setitem(grouped_matmul.BACKENDS, name, fake)
    seconds = {"blocked": 2e-3, "ragged_dot": 1e-3, "wrong": 1e-4}
    monkeypatch.setattr(proofs, "time_grouped_matmul", lambda backend, *_: seconds[backend])
    candidates = ["blocked", "wrong", "ragged_dot", "missing"]
    assert proofs.fastest_grouped_matmul(CONFIG, SETTINGS, 64, candidates) == "ragged_dot"
    lines = capsys.readouterr().out.splitlines()
    starts = (
        "blocked: 4.00 ms",
        "wrong: left out, wrong on this device, its error against plain XLA is ",
        "ragged_dot: 2.00 ms",
        "missing: left out, does not run here (no compiler)",
    )
    for line, start in zip(lines, starts, strict=True):
        assert line.startswith(f"model.grouped_matmul=auto: {start}")
    with pytest.raises(UserError, match="no backend is right"):
        proofs.fastest_grouped_matmul(CONFIG, SETTINGS, 64, ["wrong"])


def test_times_are_of_the_forward_and_the_backward():
    """The kernels run, whatever the sizes; a time is positive."""
    assert time_grouped_matmul("blocked", (100, 16, 24, 5), "float32") > 0
    assert time_attention("chunked", (2, 40, 4, 2, 16), "float32") > 0


@pytest.fixture
def gpu(monkeypatch):
    """Makes a run choose as on a GPU, between backends that run on a CPU."""
    times = {"blocked": 2e-3, "ragged_dot": 1e-3}
    monkeypatch.setattr(proofs, "prove_grouped_matmul", lambda *_: 0.0)
    monkeypatch.setattr(proofs, "time_grouped_matmul", lambda backend, *_: times[backend])
    monkeypatch.setattr(proofs, "_candidates", lambda: list(times))
    monkeypatch.setattr(proofs.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(proofs, "check_backend", lambda backend, _: backend or "blocked")
    return times


def chosen(config, model):
    """The backend of the configuration and of the model."""
    config, model = proofs.with_fastest_grouped_matmul(config, model, 32)
    assert config.model.grouped_matmul == model.settings.grouped_matmul
    return config.model.grouped_matmul


def run_of(tmp_path, backend):
    options = ModelOptions(init="random", config_path="x", grouped_matmul=backend)
    config = Config(model=options, train=TrainOptions(output_dir=str(tmp_path / "run")))
    method = methods.build(config.method, CONFIG)
    return config, BaseModel(CONFIG, SETTINGS, method, None, tmp_path, tmp_path)


def continued(tmp_path, backend):
    """Writes what a run leaves that has a checkpoint."""
    (tmp_path / "run" / "checkpoints" / "4").mkdir(parents=True)
    run_directory.write_run_config(tmp_path / "run", run_of(tmp_path, backend)[0])


@pytest.mark.usefixtures("gpu")
def test_a_run_begins_with_the_fastest(tmp_path):
    assert chosen(*run_of(tmp_path, "auto")) == "ragged_dot"
    assert chosen(*run_of(tmp_path, "blocked")) == "blocked"


@pytest.mark.parametrize(("stored", "kept"), [("blocked", "blocked"), (None, "blocked")])
@pytest.mark.usefixtures("gpu")
def test_a_continued_run_keeps_its_backend(tmp_path, capsys, stored, kept):
    """Another choice would change the last bits: the default, too, is kept."""
    continued(tmp_path, stored)
    assert chosen(*run_of(tmp_path, "auto")) == kept
    assert capsys.readouterr().out == f"model.grouped_matmul=auto: keeps the run's {kept}\n"


@pytest.mark.usefixtures("gpu")
def test_a_restarted_run_chooses_anew(tmp_path):
    continued(tmp_path, "blocked")
    config, model = run_of(tmp_path, "auto")
    restart = dataclasses.replace(config.train, resume="restart")
    assert chosen(dataclasses.replace(config, train=restart), model) == "ragged_dot"


@pytest.mark.usefixtures("gpu")
def test_every_process_takes_what_process_0_chose(tmp_path, monkeypatch):
    monkeypatch.setattr(proofs.distributed, "is_writer", lambda: False)
    monkeypatch.setattr(proofs.distributed, "from_writer", lambda name, value: "tokamax")
    assert chosen(*run_of(tmp_path, "auto")) == "tokamax"


def test_auto_is_the_default_on_a_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(proofs, "fastest_grouped_matmul", None)
    assert chosen(*run_of(tmp_path, "auto")) == "blocked"
    assert capsys.readouterr().out == ""
    for platform, backend in {"cpu": "blocked", "tpu": "ragged_dot"}.items():
        assert grouped_matmul.check_backend("auto", platform) == backend
