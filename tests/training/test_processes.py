"""Several devices and processes: the same losses, also when a run moves between them."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from training import processes
from training.tiny_run import losses, make_files, metrics

from olmoe_jax.config import to_dict

WORKER = Path(__file__).with_name("runs_worker.py")
STEPS = 20
OPTIONS = {
    "data__pack": False,
    "data__eval_path": None,
    "data__eval_fraction": 0.0,
    "train__batch_size": 16,
    "train__epochs": 4,
    "train__export_hf": False,
    "train__checkpoint_every": 1000,
}
LORA = {"method__lora_rank": 4}
ESFT = {"method__esft_score_tokens": 500, "method__esft_top_p": 0.4}
METHODS = {
    "frozen": {},
    "conventional": {},
    "densemixer": {},
    "frozen_lora": LORA,
    "conventional_lora": LORA,
    "densemixer_lora": LORA,
    "esft_gate": ESFT,
    "esft_token": ESFT,
}
MESHES = [(1, 8, 1), (2, 4, 1), (4, 2, 1), (8, 1, 1)]
"""data, fsdp, expert"""
EXPERT_MESHES = [(2, 2, 2), (1, 2, 4), (1, 1, 8), (1, 4, 2)]


def mesh_options(data: int, fsdp: int, expert: int) -> dict:
    return {
        "mesh__data": data,
        "mesh__fsdp": fsdp,
        "mesh__expert": expert,
    }


@pytest.fixture(scope="module")
def sums(tmp_path_factory, tokenizer_dir):
    """80 examples: 5 steps of 16 in an epoch."""
    return make_files(tmp_path_factory.mktemp("sums"), tokenizer_dir, examples=80)


def run_of(sums, output: Path, stop_after: int | None = None, **changes) -> dict:
    """A run as runs_worker.py reads it."""
    config = sums.config(output, **{**OPTIONS, **changes})
    return {"config": to_dict(config), "stop_after": stop_after}


def train(runs: list[dict], log: Path, environment, **where) -> None:
    """Trains the runs where `processes.start` says."""
    spec = log.with_suffix(".json")
    spec.write_text(json.dumps(runs))
    started = processes.start([sys.executable, str(WORKER), str(spec)], log, environment, **where)
    assert started.wait(1200) == [0] * len(started.started), started.output()


def largest_difference(output: Path, expected: Path) -> float:
    """The largest relative difference of a loss."""
    ours, theirs = (np.array(list(losses(run).values())) for run in (output, expected))
    assert len(ours) == len(theirs) == STEPS
    return float(np.max(np.abs(ours - theirs) / theirs))


@pytest.fixture(scope="module")
def on_one_device(sums, tmp_path_factory, environment):
    """{method: output directory}; a device takes the 8 rows that 8 devices share elsewhere."""
    directory = tmp_path_factory.mktemp("one_device")
    runs = {
        method: run_of(
            sums,
            directory / method,
            method__name=method.removesuffix("_lora"),
            train__rows_per_device=8,
            **options,
        )
        for method, options in METHODS.items()
    }
    train(list(runs.values()), directory / "log", environment, count=1)
    for method in METHODS:
        curve = losses(directory / method)
        assert curve[STEPS] < curve[1], method
    return {method: directory / method for method in METHODS}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "shift", "meshes", "methods"),
    [
        (1, 0, MESHES, list(METHODS)),
        (2, 1, MESHES, list(METHODS)),
        (
            2,
            0,
            EXPERT_MESHES,
            ["conventional", "densemixer", "densemixer_lora", "esft_gate"],
        ),
    ],
    ids=["1x8", "2x4", "2x4 tokens to experts"],
)
def test_all_methods_give_the_losses_of_one_device(
    sums, tmp_path, environment, on_one_device, count, shift, meshes, methods
):
    """Mesh shapes take turns: every shape under several methods."""
    runs = []
    for index, method in enumerate(methods):
        changes = {
            **METHODS[method],
            **mesh_options(*meshes[(index + shift) % len(meshes)]),
            "method__name": method.removesuffix("_lora"),
        }
        runs.append(run_of(sums, tmp_path / method, train__rows_per_device=1, **changes))
    train(runs, tmp_path / "log", environment, count=count, devices=8 // count)
    for method in methods:
        difference = largest_difference(tmp_path / method, on_one_device[method])
        print(f"{method}: largest relative difference of a loss {difference:.2e}")
        assert difference < 1e-5, method


@pytest.mark.slow
def test_a_run_moves_between_devices_and_processes(sums, tmp_path, environment):
    """Its data order stays, and its losses are those of a run that stayed on one device."""
    output, stayed = tmp_path / "run", tmp_path / "stayed"
    options = {"train__rows_per_device": 1}
    for count, devices, stop_after, mesh in [
        (1, 8, 4, (1, 8, 1)),
        (1, 4, 8, (1, 1, 4)),
        (1, 2, 12, (1, 1, 2)),
        (1, 1, 15, (1, 1, 1)),
        (2, 4, None, (1, 4, 2)),
    ]:
        runs = [run_of(sums, output, stop_after, **mesh_options(*mesh), **options)]
        if count * devices == 1:
            runs.append(run_of(sums, stayed, **options))
        log = tmp_path / f"log{count}x{devices}"
        train(runs, log, environment, count=count, devices=devices)
    difference = largest_difference(output, stayed)
    print(f"largest relative difference of a loss {difference:.2e}")
    assert difference < 1e-5
    order = [[line["tokens"] for line in metrics(run)] for run in (output, stayed)]
    assert order[0] == order[1]


@pytest.fixture
def command(sums, tmp_path):
    """A short run with an export."""
    options = {"train__max_steps": 2, "train__rows_per_device": 2, "train__export_hf": True}
    arguments = sums.arguments(tmp_path / "run", **{**OPTIONS, **options})
    return [sys.executable, "train.py", *arguments]


@pytest.mark.slow
def test_one_of_two_processes_writes(command, tmp_path, environment):
    started = processes.start(command, tmp_path / "log", environment)
    assert started.wait() == [0, 0], started.output()
    first, second = started.output()
    output = tmp_path / "run"
    assert "devices: 2 x cpu in 2 processes" in first
    assert "exported step 2" in first
    assert second == ""
    assert len(losses(output)) == 2
    assert (output / "hf" / "model.safetensors").exists()
    assert (output / "loss.png").exists()
    assert len(list((output / "tensorboard").iterdir())) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["--config.train.batch_size=0"], "train.batch_size=0: must be 1 or more"),
        (
            ["--config.optimizer.learning_rate=1"],
            "process 1 was started with another config than process 0: optimizer.learning_rate: "
            "the run has 0.003, this command says 1.0",
        ),
        (["--config.data.train_path=missing.jsonl"], "missing.jsonl"),
    ],
    ids=["bad value", "another config", "missing file"],
)
def test_an_error_of_one_process_ends_both_with_one_line(
    command, tmp_path, environment, extra, expected
):
    started = processes.start(command, tmp_path / "log", environment, extra=[[], extra])
    assert started.wait() == [2, 2], started.output()
    first, second = started.output()
    assert second.startswith("error: ")
    assert second.count("\n") == 1
    assert expected in second
    assert "error" not in first


@pytest.mark.slow
def test_an_error_of_both_processes_is_one_line(command, tmp_path, environment):
    extra = [["--config.train.batch_size=0"]] * 2
    started = processes.start(command, tmp_path / "log", environment, extra=extra)
    assert started.wait() == [2, 2], started.output()
    assert "".join(started.output()).count("error: train.batch_size=0") == 1
    assert not (tmp_path / "run").exists()
