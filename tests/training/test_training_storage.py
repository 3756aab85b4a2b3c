"""How weights, gradients and moments are stored, and what that costs in accuracy."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_same_bits, relative_error
from training.tiny_run import MODEL

from olmoe_jax.config import Config, OptimizerOptions
from olmoe_jax.model.config import ModelSettings, model_config_from_hf
from olmoe_jax.model.decoder import parameter_specs
from olmoe_jax.parallel.sharding import make_mesh
from olmoe_jax.training.optimizer import Optimizer, SplitState, adamw
from olmoe_jax.training.parameters import kept_dtype
from olmoe_jax.training.program import step_functions
from olmoe_jax.training.rounding import join_float32
from olmoe_jax.training.step import Accumulated, Trainer, initial_state

BFLOAT16, FLOAT32, INT8 = map(jnp.dtype, ("bfloat16", "float32", "int8"))
SHAPES = {"a": (64, 64), "b": (3, 5, 7), "layers.moe.router": (8, 4)}
STEPS = 30
# The tests' cheap compilation (conftest.py) rounds a sum of products otherwise in each program.
OLDER = "xla_cpu_use_fusion_emitters" in os.environ["XLA_FLAGS"]
EMITTERS = {"xla_cpu_use_fusion_emitters": True} if OLDER else None


def make(moments=FLOAT32, master=FLOAT32) -> Optimizer:
    return adamw(0.9, 0.999, 1e-8, 0.01, moments, master)


def start(dtype=FLOAT32) -> dict[str, jax.Array]:
    """Weights that bfloat16 holds; the router stays float32."""
    random = np.random.default_rng(0)
    return {
        name: jnp.asarray(random.normal(size=shape), BFLOAT16).astype(
            FLOAT32 if name == "layers.moe.router" else dtype
        )
        for name, shape in SHAPES.items()
    }


def gradients(step: int) -> dict[str, np.ndarray]:
    """Of a size of their own for each element, and with a mean."""
    random, size = np.random.default_rng(step), np.random.default_rng(99)
    return {
        name: (10.0 ** size.uniform(-4, 0, shape) * (1 + random.normal(size=shape))).astype(
            np.float32
        )
        for name, shape in SHAPES.items()
    }


@functools.cache
def updates(moments=FLOAT32, master=FLOAT32, weights=FLOAT32, rate=1e-3, seed=0):
    """(parameters, state) after STEPS updates."""
    optimizer, parameters = make(moments, master), start(weights)
    state, update = optimizer.init(parameters), jax.jit(optimizer.update, compiler_options=EMITTERS)
    for step in range(STEPS):
        key = jax.random.fold_in(jax.random.key(seed), step)
        parameters, state = update(gradients(step), state, parameters, rate, key)
    return jax.device_get((parameters, state))


def test_float32_is_optax_bit_by_bit():
    optimizer = optax.chain(optax.scale_by_adam(0.9, 0.999, 1e-8), optax.add_decayed_weights(0.01))

    @jax.jit
    def update(gradients, state, parameters, rate):
        direction, state = optimizer.update(gradients, state, parameters)
        return jax.tree.map(lambda p, d: p - rate * d, parameters, direction), state

    parameters = start()
    state = optimizer.init(parameters)
    for step in range(STEPS):
        parameters, state = update(gradients(step), state, parameters, 1e-3)
    ours, our_state = updates()
    assert_same_bits(ours, jax.device_get(parameters))
    assert jax.tree.structure(our_state) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, our_state, jax.device_get(state))


def test_a_master_in_halves_is_the_float32_master():
    parameters, state = updates(weights=BFLOAT16)
    expected, expected_moments = updates()
    assert isinstance(state, SplitState)
    assert state.remainders.keys() == {"a", "b"}
    whole = {n: join_float32(parameters[n], low) for n, low in state.remainders.items()}
    assert_same_bits(jax.device_get(parameters | whole), expected)
    jax.tree.map(np.testing.assert_array_equal, state.moments, expected_moments)


def test_bfloat16_moments_follow_the_float32_ones():
    (parameters, state), (expected, expected_state) = updates(BFLOAT16), updates()
    for name in ("mu", "nu"):
        ours, theirs = getattr(state[0], name), getattr(expected_state[0], name)
        for key in SHAPES:
            assert ours[key].dtype == BFLOAT16
            ratio = ours[key].astype(float) / theirs[key]
            # 30 roundings of at most 2^-7 each, in both directions.
            assert abs(np.median(ratio) - 1) < 2**-7
            assert np.quantile(np.abs(ratio - 1), 0.9) < 30**0.5 * 2**-7
    moved, should = (p["a"] - np.asarray(start()["a"]) for p in (parameters, expected))
    assert relative_error(moved, should) < 0.05


def test_a_bfloat16_master_moves_as_far_on_average():
    """By less than half a unit in the last place in all, which rounding to nearest would lose."""
    parameters, _ = updates(BFLOAT16, BFLOAT16, BFLOAT16, rate=1e-5)
    expected, _ = updates(rate=1e-5)
    before = np.asarray(start()["a"])
    assert parameters["a"].dtype == BFLOAT16
    assert parameters["layers.moe.router"].dtype == FLOAT32
    nearest = expected["a"].astype(BFLOAT16).astype(np.float32)
    assert np.mean(nearest != before) < 0.1
    moved, should = (p["a"].astype(float) - before for p in (parameters, expected))
    spread = moved.std() / np.sqrt(moved.size)
    assert abs(moved.mean() - should.mean()) < 4 * spread < 0.5 * abs(should.mean())


def test_draws_depend_on_the_key_alone():
    options = (BFLOAT16, BFLOAT16, BFLOAT16)
    once = updates(*options)[0]
    updates.cache_clear()
    assert_same_bits(updates(*options)[0], once)
    other = updates(*options, seed=1)[0]
    assert not np.array_equal(other["a"], once["a"])


@pytest.mark.parametrize(
    ("moments", "master"), [(BFLOAT16, FLOAT32), (BFLOAT16, BFLOAT16), (INT8, FLOAT32)]
)
def test_skipped_updates_change_no_bit(moments, master):
    trainer = Trainer(None, None, make(moments, master), lambda step: 1e-3, 1.0, seed=3)
    update, parameters = jax.jit(trainer.update), start(BFLOAT16)

    def sums(step, loss=1.0):
        values = {n: g.astype(parameters[n].dtype) for n, g in gradients(step).items()}
        return Accumulated(values, jnp.float32(loss), None)

    state, _ = update(initial_state(parameters, trainer.optimizer), sums(0))
    skipped, metrics = update(state, sums(1, np.nan))
    assert int(metrics.skipped) == 1
    for before, after in zip(
        jax.tree.leaves((state.parameters, state.optimizer)),
        jax.tree.leaves((skipped.parameters, skipped.optimizer)),
        strict=True,
    ):
        assert np.asarray(after).tobytes() == np.asarray(before).tobytes()
    moved, _ = update(state, sums(1))
    assert not np.array_equal(moved.parameters["a"], state.parameters["a"])


@pytest.mark.parametrize(
    ("moments", "summed", "master", "expected"),
    [
        ("float32", "float32", "float32", 16),
        ("bfloat16", "float32", "float32", 12),
        ("bfloat16", "bfloat16", "float32", 10),
        ("bfloat16", "bfloat16", "bfloat16", 8),
        # And a scale for each block of a row; the tiny model's rows are a block of 32.
        ("int8", "bfloat16", "float32", 8 + 2 * 4 / 80),
    ],
)
def test_bytes_per_trained_parameter(moments, summed, master, expected):
    """Of weights, gradients and state, where the matrices are nearly everything."""
    config = model_config_from_hf({**MODEL, "intermediate_size": 4096}, "test")
    dtype = kept_dtype(lambda name: True, ModelSettings(compute_dtype=BFLOAT16), summed)
    parameters = {
        name: jax.ShapeDtypeStruct(spec.shape, dtype(name))
        for name, spec in parameter_specs(config).items()
    }
    for name in ("embed", "norm", "layers.attention.q_norm", "layers.moe.router"):
        assert parameters[name].dtype == FLOAT32
    optimizer = make(jnp.dtype(moments), jnp.dtype(master))
    state = jax.eval_shape(lambda p: initial_state(p, optimizer), parameters)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state, parameters)))
    assert size / sum(p.size for p in parameters.values()) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_an_update_copies_no_state(moments):
    shape = model_config_from_hf({**MODEL, "intermediate_size": 4096}, "test")
    settings, mesh = ModelSettings(), make_mesh(devices=jax.devices()[:1])
    config = Config(optimizer=OptimizerOptions(moments_dtype=moments))
    parameters = {
        name: jax.ShapeDtypeStruct(spec.shape, FLOAT32)
        for name, spec in parameter_specs(shape).items()
    }
    with jax.set_mesh(mesh):
        step = step_functions(config, shape, settings, parameters, mesh, 10)
        arguments = step.initial.eval_shape(parameters), step.zero_sums.eval_shape()
        update = step.update.lower(*arguments).compile()
    elements = sum(p.size for p in parameters.values())
    assert update.memory_analysis().temp_size_in_bytes < elements / 100


def test_the_defaults_are_float32():
    options = Config().optimizer
    assert options == OptimizerOptions(
        moments_dtype="float32", gradients_dtype="float32", master_dtype="float32"
    )
