"""The optimizer against PyTorch's AdamW, its clipping and transformers' schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmoe_jax.training.optimizer import adamw, clip_scale, global_norm, schedule


@pytest.mark.parametrize("warmup", [0, 1, 3, 20])
@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_schedule_is_that_of_transformers(kind, warmup):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    name = "constant_with_warmup" if kind == "constant" else kind
    theirs = transformers.get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=20
    )
    ours = jax.jit(schedule(kind, 3e-4, warmup, 20))
    for step in range(20):
        expected = optimizer.param_groups[0]["lr"]
        np.testing.assert_allclose(ours(jnp.int32(step)), expected, rtol=2e-6, atol=1e-11)
        optimizer.step()
        theirs.step()


def test_the_first_update_of_a_warmup_has_learning_rate_zero():
    assert float(schedule("linear", 1e-3, 3, 10)(0)) == 0
    assert float(schedule("linear", 1e-3, 0, 10)(0)) == pytest.approx(1e-3)


def test_a_run_of_one_step_learns():
    for kind in ("linear", "cosine", "constant"):
        assert float(schedule(kind, 1e-3, 0, 1)(0)) == pytest.approx(1e-3)


@pytest.mark.parametrize("norm", [0.0, 0.5, 1.0, 4.0, 1e6])
def test_clip_scale_is_that_of_pytorch(norm):
    torch = pytest.importorskip("torch")
    parameter = torch.nn.Parameter(torch.zeros(4))
    parameter.grad = torch.full((4,), norm / 2)
    torch.nn.utils.clip_grad_norm_([parameter], 1.0)
    ours = norm / 2 * clip_scale(jnp.float32(norm), 1.0)
    np.testing.assert_allclose(ours, parameter.grad[0].item(), rtol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_three_clipped_updates_are_those_of_pytorch(decay):
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(0)
    values = {"a": random.normal(size=(5, 3)), "b": random.normal(size=7)}
    values = {name: value.astype(np.float32) for name, value in values.items()}
    theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in values.items()}
    torch_optimizer = torch.optim.AdamW(theirs.values(), lr=1e-2, weight_decay=decay)
    optimizer = adamw(0.9, 0.999, 1e-8, decay)
    ours = jax.tree.map(jnp.asarray, values)
    state = optimizer.init(ours)
    # Above the norm to clip to, and below it.
    for scale in (10.0, 1.0, 0.01):
        gradients = {n: scale * random.normal(size=v.shape) for n, v in values.items()}
        gradients = {name: value.astype(np.float32) for name, value in gradients.items()}
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(gradients[name])
        norm = torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        torch_optimizer.step()
        our_norm = global_norm(jax.tree.map(jnp.asarray, gradients))
        np.testing.assert_allclose(our_norm, norm.item(), rtol=1e-6)
        clipped = {name: g * clip_scale(our_norm, 1.0) for name, g in gradients.items()}
        ours, state = optimizer.update(clipped, state, ours, 1e-2, jax.random.key(0))
    for name, parameter in theirs.items():
        np.testing.assert_allclose(ours[name], parameter.detach().numpy(), rtol=2e-6, atol=2e-7)
