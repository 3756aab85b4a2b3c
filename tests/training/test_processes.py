"""Two processes as one run: the losses of one device, one writer, and errors that end both."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from training import processes
from training.tiny_run import losses, make_files, metrics

import olmoe_jax
from olmoe_jax.config import to_dict

WORKER = Path(__file__).with_name("runs_worker.py")
STEPS = 10
OPTIONS = {
    "data__pack": False,
    "data__eval_path": None,
    "data__eval_fraction": 0.0,
    "train__batch_size": 16,
    "train__epochs": 2,
    "train__rows_per_device": 2,
    "train__export_hf": False,
    "train__checkpoint_every": 1000,
}
RUNS = {
    "moving": {"method__name": "densemixer"},
    "lora": {"method__name": "frozen", "method__lora_rank": 4},
    "esft": {
        "method__name": "esft_token",
        "method__esft_score_tokens": 500,
        "method__esft_top_p": 0.4,
    },
}
"""The other methods and all meshes are in eight_devices/test_mesh_training.py."""
MESHES = {"moving": (1, 1, 4), "lora": (2, 1, 2), "esft": (1, 4, 1)}
"""data, fsdp, expert: groups of devices within and across the two processes"""


@pytest.fixture(scope="module")
def sums(tmp_path_factory, tokenizer_dir):
    """80 examples: 5 steps of 16 in an epoch."""
    return make_files(tmp_path_factory.mktemp("sums"), tokenizer_dir, examples=80)


@pytest.mark.slow
@pytest.mark.parametrize(
    "names", [("moving",), pytest.param(("esft", "lora"), marks=pytest.mark.exhaustive)]
)
def test_losses_are_those_of_one_device(sums, tmp_path, environment, names):
    """Two processes of two devices. A run called moving is stopped, and continued by two others."""

    def config(name: str, directory: str, **changes):
        return sums.config(tmp_path / directory / name, **(OPTIONS | RUNS[name] | changes))

    def train_in_two_processes(log: str, stops: dict[str, int | None]) -> None:
        spec = tmp_path / f"{log}.json"
        runs = []
        for name, stop_after in stops.items():
            sizes = zip(("mesh__data", "mesh__fsdp", "mesh__expert"), MESHES[name], strict=True)
            values = to_dict(config(name, "two", **dict(sizes)))
            runs.append({"config": values, "stop_after": stop_after})
        spec.write_text(json.dumps(runs))
        command = [sys.executable, str(WORKER), str(spec)]
        both = processes.start(command, tmp_path / log, environment, devices=2)
        assert both.wait(900) == [0, 0], both.output()

    train_in_two_processes("first", {name: 3 if name == "moving" else None for name in names})
    if "moving" in names:
        train_in_two_processes("second", {"moving": None})
    for name in names:
        two, one = tmp_path / "two" / name, tmp_path / "one" / name
        # One device takes the rows of four: a micro-batch, whose dropout one key draws, stays.
        assert olmoe_jax.train(config(name, "one", train__rows_per_device=8)).finished
        ours, theirs = (np.array(list(losses(run).values())) for run in (two, one))
        assert len(ours) == len(theirs) == STEPS
        assert theirs[-1] < theirs[0]
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, err_msg=name)
        # The order of the data stays too.
        assert [line["tokens"] for line in metrics(two)] == [
            line["tokens"] for line in metrics(one)
        ]


@pytest.fixture
def command(sums, tmp_path):
    """A short run with an export."""
    options = {"train__max_steps": 2, "train__export_hf": True}
    arguments = sums.arguments(tmp_path / "run", **{**OPTIONS, **options})
    return [sys.executable, "train.py", *arguments]


@pytest.mark.exhaustive
def test_one_of_two_processes_writes(command, tmp_path, environment):
    """parallel/test_slurm.py has the same in CI."""
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


@pytest.mark.exhaustive
def test_both_go_back_together(command, tmp_path, environment):
    """Each reads a share of a checkpoint's files; one of them finds the damage."""
    command = [*command, "--config.train.checkpoint_every=1", "--config.train.export_hf=false"]
    started = processes.start(command, tmp_path / "log", environment)
    assert started.wait() == [0, 0], started.output()
    before = losses(tmp_path / "run")
    files = (tmp_path / "run" / "checkpoints" / "2").rglob("*")
    largest = max(files, key=lambda path: path.stat().st_size)
    content = largest.read_bytes()
    largest.write_bytes(content[:-99] + bytes([content[-99] ^ 1]) + content[-98:])
    started = processes.start(command, tmp_path / "again", environment)
    assert started.wait() == [0, 0], started.output()
    first, second = started.output()
    assert f"{largest}: damaged, its checksum differs" in first
    assert "going back to step 1" in first
    assert second == ""
    assert losses(tmp_path / "run") == before


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
        pytest.param(
            ["--config.data.train_path=missing.jsonl"],
            "missing.jsonl",
            marks=pytest.mark.exhaustive,
        ),
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


@pytest.mark.exhaustive
def test_an_error_of_both_processes_is_one_line(command, tmp_path, environment):
    extra = [["--config.train.batch_size=0"]] * 2
    started = processes.start(command, tmp_path / "log", environment, extra=extra)
    assert started.wait() == [2, 2], started.output()
    assert "".join(started.output()).count("error: train.batch_size=0") == 1
    assert not (tmp_path / "run").exists()
