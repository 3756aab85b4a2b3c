"""Whole runs on meshes: the losses of one device, also when a run moves between meshes."""

import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from training.tiny_run import losses, make_files, metrics

import olmoe_jax
from olmoe_jax.training.reporting import Reporter

STEPS = 10
OPTIONS = {
    "data__pack": False,
    "data__eval_path": None,
    "data__eval_fraction": 0.0,
    "train__batch_size": 16,
    "train__epochs": 2,
    "train__export_hf": False,
    "train__checkpoint_every": 1000,
}
LORA = {"method__lora_rank": 4}
ESFT = {"method__esft_score_tokens": 500, "method__esft_top_p": 0.4}
RUNS = [
    # method, its options, mesh [data, fsdp, expert]
    pytest.param("frozen", {}, (2, 4, 1), marks=pytest.mark.exhaustive),
    # Two micro-batches a step, which share the counts of the load-balancing loss.
    ("conventional", {"method__router_aux_loss_coefficient": 0.1}, (1, 8, 1)),
    pytest.param("conventional", LORA, (8, 1, 1), marks=pytest.mark.exhaustive),
    pytest.param("densemixer", LORA, (1, 2, 4), marks=pytest.mark.exhaustive),
    ("esft_gate", ESFT, (1, 1, 8)),
]
"""DenseMixer and two more meshes are in the run that moves; test_mesh_adapters.py and
test_mesh_moe.py have adapters' gradients on meshes."""


@pytest.fixture(scope="module")
def sums(tmp_path_factory, tokenizer_dir):
    """80 examples: 5 steps of 16 in an epoch."""
    return make_files(tmp_path_factory.mktemp("sums"), tokenizer_dir, examples=80)


@pytest.fixture
def train(sums, monkeypatch):
    """train(output, mesh, stop_after=step, **options): trains; mesh None stands for one device."""
    devices, report, stops = jax.devices(), Reporter.step, []

    def step(self, line, scalars):
        report(self, line, scalars)
        if line["step"] in stops:
            os.kill(os.getpid(), signal.SIGTERM)

    def run(output: Path, mesh: tuple[int, int, int] | None, stop_after=None, **options) -> Path:
        stops[:] = [stop_after]
        data, fsdp, expert = mesh or (1, 1, 1)
        sizes = {"mesh__data": data, "mesh__fsdp": fsdp, "mesh__expert": expert}
        # One device takes the 8 rows that 8 devices share.
        rows = {"train__rows_per_device": 1 if mesh else 8}
        with monkeypatch.context() as patch:
            patch.setattr(Reporter, "step", step)
            if mesh is None:
                patch.setattr(jax, "devices", lambda *_: devices[:1])
            changes = OPTIONS | sizes | rows | options
            result = olmoe_jax.train(sums.config(output, **changes))
        assert result.finished == (stop_after is None)
        return output

    return run


def assert_same_losses(output: Path, expected: Path) -> None:
    ours, theirs = (np.array(list(losses(run).values())) for run in (output, expected))
    assert len(ours) == len(theirs) == STEPS
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize(("method", "options", "mesh"), RUNS)
def test_losses_are_those_of_one_device(train, tmp_path, method, options, mesh):
    """Each method and each mesh once; what a frozen router adds is in test_mesh_overlap.py."""
    alone = train(tmp_path / "alone", None, method__name=method, **options)
    assert losses(alone)[STEPS] < losses(alone)[1]
    run = train(tmp_path / "run", mesh, method__name=method, **options)
    assert_same_losses(run, alone)


def test_a_run_moves_between_meshes(train, tmp_path):
    """Its data order stays, and its losses are those of a run that stayed on one device."""
    stayed, output = train(tmp_path / "stayed", None), tmp_path / "run"
    train(output, (2, 2, 2), stop_after=3)
    train(output, None, stop_after=6, train__rows_per_device=1)
    train(output, (4, 2, 1))
    assert_same_losses(output, stayed)
    order = [[line["tokens"] for line in metrics(run)] for run in (output, stayed)]
    assert order[0] == order[1]
