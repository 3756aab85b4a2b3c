"""Dropout of the adapters' inputs: unbiased, new at each step, the same for the same step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from tiny import LORA, random_adapters, random_weights, short_run, tiny_config
from training.interruptions import stop
from training.tiny_run import losses

import olmoe_jax
from olmoe_jax.model.config import ModelSettings
from olmoe_jax.model.lora import LoraSettings, dropout
from olmoe_jax.parallel.batch import DeviceBatch
from olmoe_jax.training.optimizer import adamw, schedule
from olmoe_jax.training.step import Trainer

CONFIG = tiny_config()


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def rate(share: float) -> LoraSettings:
    """Settings with this share dropped."""
    return LoraSettings(4, 8.0, share)


def test_unbiased():
    """Over 4000 draws: a share `rate` is zero, the rest scaled up, the mean x."""
    x = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    draws = 4000
    out = np.asarray(dropout(jnp.broadcast_to(x, (draws, 6, 5)), keys(draws), rate(0.25), "q"))
    kept = out != 0
    np.testing.assert_allclose(out[kept], np.broadcast_to(x / 0.75, out.shape)[kept], rtol=1e-6)
    # Five standard deviations of a mean of Bernoulli draws.
    margin = 5 * np.sqrt(0.25 * 0.75 / draws)
    assert np.abs(kept.mean(axis=0) - 0.75).max() < margin
    assert np.abs(out.mean(axis=0) / x - 1).max() < margin / 0.75
    # Positions are dropped independently of each other.
    correlation = np.corrcoef(kept.reshape(draws, -1).T) - np.eye(30)
    assert np.abs(correlation).max() < 5 / np.sqrt(draws)


def test_each_row_and_place_has_its_own_draw():
    x = jnp.ones((3, 40, 8))
    out = [np.asarray(dropout(x, keys(3), rate(0.5), target)) for target in "qk"]
    masks = [mask.tobytes() for place in out for mask in place]
    assert len(set(masks)) == 6
    # A row's draw is its key's, whatever the other rows are.
    np.testing.assert_array_equal(dropout(x[1:], keys(3)[1:], rate(0.5), "q"), out[0][1:])


def test_off():
    x = jnp.ones((3, 4))
    assert dropout(x, None, rate(0.5), "q") is x
    assert dropout(x, keys(3), rate(0.0), "q") is x


def trainer(rate, targets=("q", "k", "v", "o", "gate", "up", "down"), seed=0):
    lora = LoraSettings(4, 8.0, rate, targets)
    return Trainer(
        CONFIG,
        ModelSettings(lora=lora),
        adamw(0.9, 0.999, 1e-8, 0.0),
        schedule("constant", 1e-3, 0, 1),
        1.0,
        seed=seed,
    )


@pytest.fixture(scope="module")
def setting():
    adapters = random_adapters(CONFIG, LoraSettings(4, 8.0))
    random = np.random.default_rng(0)
    tokens = random.integers(2, 61, (2, 8)).astype(np.int32)
    ones = np.ones_like(tokens)
    positions = np.broadcast_to(np.arange(8, dtype=np.int32), (2, 8))
    weights = np.full((2, 8), 1 / 16, np.float32)
    batch = DeviceBatch(*map(jnp.asarray, (tokens, tokens[:, ::-1], ones, positions, weights)))
    return adapters, random_weights(CONFIG), batch


@pytest.mark.slow
def test_new_at_each_step_and_micro_batch_and_the_same_again(setting):
    adapters, weights, batch = setting

    only = {name: v for name, v in adapters.items() if name.rsplit(".", 1)[1][:-2] == "v"}

    def accumulate(seed):
        own = trainer(0.1, ("v",), seed)
        function, zero = jax.jit(own.accumulate), own.zero_sums(only)
        return lambda *at: function(only, weights, zero, batch, np.array(at, np.uint32))

    zero, one = accumulate(0), accumulate(1)
    results = [zero(0, 0), zero(0, 1), zero(1, 0), zero(1, 1), one(0, 0)]
    assert len({float(result.loss) for result in results}) == 5
    gradients = {np.asarray(r.gradients["layers.attention.lora.v_b"]).tobytes() for r in results}
    assert len(gradients) == 5
    again = zero(1, 0)
    for name, gradient in again.gradients.items():
        np.testing.assert_array_equal(gradient, results[2].gradients[name])


@pytest.mark.exhaustive
def test_the_loss_varies_around_that_without_dropout(setting):
    """Small adapters, so that the loss is nearly linear in what is dropped."""
    adapters, weights, batch = setting
    small = {name: value * (0.05 if name.endswith("_b") else 1) for name, value in adapters.items()}
    with_dropout, without = trainer(0.3), trainer(0.0)
    # Together on as many rows as there are draws: each row has a key of its own.
    draws = 64
    tiled = DeviceBatch(*(jnp.tile(value[:1], (draws, 1)) for value in batch))

    @jax.jit
    def row_losses(weights_of_row):
        def loss(weights_of_row):
            key = jax.random.key(5)
            rows = tiled._replace(loss_weights=tiled.loss_weights * weights_of_row[:, None])
            return with_dropout.loss(small, weights, rows, key)[0]

        return jax.grad(loss)(weights_of_row)

    losses = np.asarray(row_losses(jnp.ones(draws)))
    expected = float(without.loss(small, weights, DeviceBatch(*(v[:1] for v in batch)))[0])
    assert losses.std() > 1e-4
    assert abs(losses.mean() - expected) < 4 * losses.std() / np.sqrt(draws)
    assert abs(losses - expected).max() > 4 * losses.std() / np.sqrt(draws)


@pytest.mark.slow
@pytest.mark.parametrize(
    "target",
    [
        "down",
        *(
            pytest.param(name, marks=pytest.mark.exhaustive)
            for name in ("q", "k", "v", "o", "gate", "up")
        ),
    ],
)
def test_every_target_has_dropout(setting, target):
    adapters, weights, batch = setting
    only = {name: v for name, v in adapters.items() if name.rsplit(".", 1)[1][:-2] == target}
    dropped, without = trainer(0.5, (target,)), trainer(0.0, (target,))
    key = jax.random.key(0)
    assert dropped.loss(only, weights, batch, key)[0] != without.loss(only, weights, batch)[0]


@pytest.mark.exhaustive
def test_dropping_next_to_nothing_changes_nothing(setting):
    """What is dropped from is what the adapter sees, in its order: the loss stays."""
    adapters, weights, batch = setting
    rare, without = trainer(1e-7), trainer(0.0)
    loss = rare.loss(adapters, weights, batch, jax.random.key(0))[0]
    assert_close(loss, without.loss(adapters, weights, batch)[0])


def test_none_in_evaluation(setting):
    adapters, weights, batch = setting
    with_rate, without = (trainer(rate).loss(adapters, weights, batch)[0] for rate in (0.5, 0.0))
    assert float(with_rate) == float(without)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param(
            {"data__pack": False, "train__rows_per_device": 2}, marks=pytest.mark.exhaustive
        ),
    ],
)
def test_the_same_after_a_stop(run_files, base, tmp_path, at_step, options):
    """A continued run's losses and adapter are those of a run that nothing stopped."""
    changes = LORA | {"method__lora_dropout": 0.4} | options
    whole = olmoe_jax.train(short_run(run_files, base, tmp_path / "whole", **changes))
    config = short_run(run_files, base, tmp_path / "stopped", **changes)
    at_step(2, stop)
    stopped = olmoe_jax.train(config)
    assert not stopped.finished
    assert olmoe_jax.train(config).finished
    assert losses(stopped.output_dir) == losses(whole.output_dir)
    adapter = "adapter/adapter_model.safetensors"
    assert (tmp_path / "stopped" / adapter).read_bytes() == (
        tmp_path / "whole" / adapter
    ).read_bytes()
    other = short_run(run_files, base, tmp_path / "other", **(changes | {"train__seed": 1}))
    assert losses(olmoe_jax.train(other).output_dir) != losses(whole.output_dir)
