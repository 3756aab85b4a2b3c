"""The optimizer's state in the host's memory, fetched layer by layer (CPUs have such a memory)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training.test_training_resume import assert_same_when_stopped, at_step  # noqa: F401
from training.tiny_run import losses

import olmoe_jax
from configs.table import experiment
from olmoe_jax.config import apply_overrides
from olmoe_jax.errors import UserError
from olmoe_jax.parallel import sharding
from olmoe_jax.plan import plan
from olmoe_jax.training.layered import update_by_layer
from olmoe_jax.training.optimizer import adamw
from olmoe_jax.training.setup import Program


@pytest.mark.parametrize("moments", ["float32", "int8"])
def test_an_update_by_layer_is_the_update(moments):
    optimizer = adamw(0.9, 0.999, 1e-8, 0.1, jnp.dtype(moments))
    random = np.random.default_rng(0)
    shapes = {"layers.a": (3, 4, 5), "layers.b": (3, 7), "embed": (6, 4)}
    parameters, gradients = (
        {
            name: jnp.asarray(random.normal(size=shape), jnp.float32)
            for name, shape in shapes.items()
        }
        for _ in range(2)
    )
    state = optimizer.init(parameters)

    def update(gradients, parameters, state, number=None):
        return optimizer.update(gradients, state, parameters, 0.1, jax.random.key(0))

    expected = jax.jit(update)(gradients, parameters, state)
    in_host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind=sharding.HOST)
    offloaded = jax.tree.map(lambda x: jax.device_put(x, in_host) if x.ndim else x, state)
    by_layer = jax.jit(functools.partial(update_by_layer, update))
    found = by_layer(gradients, parameters, offloaded)
    assert int(found[1][0].count) == 1
    for name, value in expected[0].items():
        np.testing.assert_allclose(found[0][name], value, rtol=1e-6)
    for ours, theirs in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        # Eight bits are rounded by other draws.
        if jnp.issubdtype(ours.dtype, jnp.floating) or ours.ndim == 0:
            np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_a_run_that_is_stopped_and_continued(files, tmp_path, at_step, monkeypatch, fused):  # noqa: F811
    """Its losses are those without; its state is in the host's memory, also when continued."""
    kinds = []
    original = Program.step

    def step(self, state, batches, index):
        leaves = jax.tree.leaves(state.optimizer)
        kinds.append({leaf.sharding.memory_kind for leaf in leaves if leaf.ndim})
        return original(self, state, batches, index)

    monkeypatch.setattr(Program, "step", step)
    options = {"data__eval_path": None, "data__eval_fraction": 0.0, "train__max_steps": 8}
    if fused:
        options |= {"optimizer__fused_update": True, "optimizer__max_grad_norm": None}
    expected = olmoe_jax.train(files.config(tmp_path / "without", **options)).output_dir
    options["optimizer__offload"] = True
    whole = olmoe_jax.train(files.config(tmp_path / "whole", **options)).output_dir
    assert losses(whole) == pytest.approx(losses(expected), rel=1e-5)
    assert_same_when_stopped(files.config(tmp_path / "run", **options), at_step, whole)
    assert kinds == [{"device"}] * 8 + [{"pinned_host"}] * 16


def test_devices_without_such_a_memory_are_refused(files, tmp_path, monkeypatch):
    class Device:
        device_kind = "Abacus"

        def addressable_memories(self):
            return []

    class Mesh:
        local_devices = (Device(),)

    monkeypatch.setattr(sharding, "make_mesh", lambda *_: Mesh())
    config = files.config(tmp_path / "run", optimizer__offload=True)
    with pytest.raises(UserError, match="Abacus does not offer the host's memory"):
        olmoe_jax.train(config)
    assert not (tmp_path / "run").exists()


def test_a_plan_that_would_count_the_hosts_memory_is_refused():
    config = apply_overrides(experiment("densemixer", "gsm"), {"optimizer.offload": "true"})
    with pytest.raises(UserError, match=r"optimizer\.offload=true: without a device, the compiler"):
        plan(config, "h100:1")
