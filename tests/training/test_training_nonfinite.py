"""A loss or gradient that is not finite: the update is skipped; after N of them the run stops."""

import numpy as np
import pytest
from helpers import message_of
from training.test_training_run import board, parameters
from training.tiny_run import metrics

import olmoe_jax
from convert import to_hf
from olmoe_jax.checkpoints.opening import RunCheckpoint
from olmoe_jax.errors import UserError
from olmoe_jax.training.program import Program

OPTIONS = {
    "data__eval_path": None,
    "data__eval_fraction": 0.0,
    "train__epochs": 1,
    "train__checkpoint_every": 1,
    "train__keep_checkpoints": 100,
    "train__export_hf": False,
}


@pytest.fixture
def poison(monkeypatch):
    """Makes the loss weights of these steps (from 1; one micro-batch each) not finite."""

    def apply(value, steps):
        original, calls = Program.to_devices, [0]

        def to_devices(self, batch):
            calls[0] += 1
            if calls[0] in steps:
                weights = np.where(batch.loss_weights > 0, value, 0).astype(np.float32)
                batch = batch._replace(loss_weights=weights)
            return original(self, batch)

        monkeypatch.setattr(Program, "to_devices", to_devices)

    return apply


def state_after(output, step):
    return parameters(RunCheckpoint(output, step))


@pytest.mark.slow
@pytest.mark.parametrize("value", [np.nan, pytest.param(np.inf, marks=pytest.mark.exhaustive)])
def test_update_is_skipped_and_training_goes_on(files, tmp_path, poison, capsys, value):
    poison(value, {3})
    output = olmoe_jax.train(files.config(tmp_path / "run", **OPTIONS)).output_dir
    lines = metrics(output)
    assert [line["loss"] is not None for line in lines] == [True, True, False, *[True] * 3]
    before, after, later = (state_after(output, step) for step in (2, 3, 4))
    for name, weight in before.items():
        np.testing.assert_array_equal(after[name], weight)
        assert np.isfinite(later[name]).all()
    assert not np.array_equal(later["embed"], before["embed"])
    said = capsys.readouterr().out
    assert "step 3: loss or gradient is not finite; update skipped (1 in this run)" in said
    assert list(board(output)[0]["train/skipped_updates"].values()) == [0, 0, 1, 1, 1, 1]


@pytest.mark.slow
def test_n_in_a_row_stop_the_run_and_it_can_be_continued(files, tmp_path, poison, monkeypatch):
    config = files.config(tmp_path / "run", **OPTIONS, train__max_nonfinite_steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(Program, "to_devices", Program.to_devices)
        # One alone does not count as in a row.
        poison(np.nan, {1, 3, 4})
        with pytest.raises(UserError) as caught:
            olmoe_jax.train(config)
    message = str(caught.value)
    assert "not finite in 2 updates in a row, up to step 4" in message
    assert "lower optimizer.learning_rate or look at the data" in message
    monkeypatch.undo()
    result = olmoe_jax.train(config)
    assert result.finished
    assert [line["step"] for line in metrics(result.output_dir)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [{}, pytest.param({"method__lora_rank": 2}, marks=pytest.mark.exhaustive)]
)
def test_the_last_loss_is_not_finite(files, tmp_path, poison, method):
    """The run ends with an error and without an export, which the same command does not make."""
    poison(np.nan, {2})
    options = {**OPTIONS, **method, "train__max_steps": 2, "train__export_hf": True}
    config = files.config(tmp_path / "run", **options)
    for _ in range(2):
        message = message_of(olmoe_jax.train, config)
        assert f"{tmp_path}/run: loss is not finite at step 2; export another step" in message
    arguments = ["--checkpoint", f"{tmp_path}/run", "--output", f"{tmp_path}/out"]
    arguments += ["--adapter"] if method else []
    assert "loss is not finite at step 2" in message_of(to_hf.main, arguments)
    assert not any((tmp_path / name).exists() for name in ("run/hf", "run/adapter", "out"))
    for extra in (["--step", "1"], ["--allow_nonfinite"]):
        to_hf.main([*arguments, *extra])
        (tmp_path / "out").rename(tmp_path / extra[0])
