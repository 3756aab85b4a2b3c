"""The update inside the backward: the numbers of the ordinary step, and when it is refused."""

from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import on_eight_devices
from training.test_training_resume import assert_same_when_stopped, at_step  # noqa: F401
from training.tiny_run import losses
from training.two_ways import LORA, RATE, Case, TwoWays, largest_difference, make_batch

import olmoe_jax
from configs.table import experiment
from olmoe_jax.config import apply_overrides
from olmoe_jax.errors import UserError
from olmoe_jax.parallel import sharding
from olmoe_jax.plan import plan
from olmoe_jax.training.step import place_batch

FUSED = {
    "optimizer__fused_update": True,
    "optimizer__max_grad_norm": None,
    "data__eval_path": None,
    "data__eval_fraction": 0.0,
}


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(devices=jax.devices()[:1])


def assert_equal(found):
    """But for rounding: to a thousandth of what a step moves a weight."""
    assert found["state"] < 1e-3 * RATE
    assert found["metrics"] < 1e-5


@pytest.fixture(scope="module")
def two_ways(mesh):
    return TwoWays(Case(aux_loss=0.1), mesh)


def test_equals_the_ordinary_step(two_ways):
    assert_equal(largest_difference(two_ways))


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [Case("conventional", tied=True), Case("frozen"), Case(lora=LORA)], ids=str
)
def test_other_methods_equal_the_ordinary_step(mesh, case):
    assert_equal(largest_difference(TwoWays(case, mesh)))


@pytest.mark.slow
def test_on_eight_devices():
    found = on_eight_devices(Path(__file__).with_name("fused_mesh_worker.py"))
    assert len(found) == 2
    for difference in found.values():
        assert_equal(difference)


def test_a_loss_that_is_not_finite_changes_nothing(two_ways):
    state, (skipped,) = two_ways.run(True, [make_batch(np.inf)])
    assert (int(skipped.skipped), int(skipped.skipped_in_a_row)) == (1, 1)
    start = jax.device_get(two_ways.start())
    assert int(state.step) == 1
    for ours, before in zip(jax.tree.leaves(state[1:3]), jax.tree.leaves(start[1:3]), strict=True):
        np.testing.assert_array_equal(ours, before)


def test_a_gradient_that_is_not_finite_stops_the_updates_below(two_ways):
    """The loss is finite; the sum of squares overflows in the lower of the two layers."""
    zero = two_ways.trainer.zero_sums(two_ways.trained)
    batch, position = place_batch(make_batch(), two_ways.mesh), np.zeros(2, np.uint32)
    sums = two_ways.accumulate(two_ways.trained, two_ways.frozen, zero, batch, position)
    layers = {n: np.asarray(g) for n, g in sums.gradients.items() if n.startswith("layers.")}
    lower, upper = (
        sum((g[i].astype(np.float64) ** 2).sum() for g in layers.values()) for i in (0, 1)
    )
    largest = float(np.finfo(np.float32).max)
    scale = np.sqrt(largest / (upper + lower / 2))
    state, (metrics,) = two_ways.run(True, [make_batch(scale)])
    assert np.isfinite(metrics.loss)
    assert int(metrics.skipped) == 1
    for name, after in state.parameters.items():
        before = np.asarray(two_ways.trained[name])
        if name in layers:
            assert not np.array_equal(after[1], before[1]), name
        kept = 0 if name in layers else slice(None)
        np.testing.assert_array_equal(after[kept], before[kept])


def test_a_step_of_several_micro_batches_is_refused(files, tmp_path):
    with pytest.raises(UserError) as caught:
        olmoe_jax.train(files.config(tmp_path / "run", **FUSED, train__rows_per_device=1))
    message = str(caught.value)
    assert message.startswith("optimizer.fused_update=true: a step is one micro-batch, but 4 ")
    assert "write train.rows_per_device=" in message
    assert not (tmp_path / "run").exists()


def test_a_plan_of_several_micro_batches_is_refused():
    options = {"optimizer.fused_update": "true", "optimizer.max_grad_norm": "none"}
    config = apply_overrides(experiment("densemixer", "gsm"), options)
    with pytest.raises(UserError, match=r"take up to 2; write train\.rows_per_device=2, "):
        plan(config, "cpu:1", rows_per_step=2)


@pytest.mark.slow
@pytest.mark.parametrize("lean", [False, True])
def test_a_stopped_run_continues_exactly(files, tmp_path, at_step, lean):  # noqa: F811
    options = FUSED | {"train__checkpoint_every": 100}
    if lean:
        names = ("optimizer__moments_dtype", "optimizer__gradients_dtype", "model__compute_dtype")
        options |= dict.fromkeys(names, "bfloat16")
    expected = olmoe_jax.train(files.config(tmp_path / "whole", **options)).output_dir
    assert losses(expected)[12] < losses(expected)[1] - 0.5
    assert_same_when_stopped(files.config(tmp_path / "run", **options), at_step, expected)
