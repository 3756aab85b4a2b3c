"""Only the selected experts get a weight gradient, and it is the full model's."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import RUN_ON_CPU, assert_close
from tiny import make_model, random_adapters, random_weights, tiny_config

from olmoe_jax.checkpoints.loading import stack_tuned
from olmoe_jax.model.config import ModelSettings
from olmoe_jax.model.lora import LoraSettings
from olmoe_jax.model.tuned import TunedExperts, places
from olmoe_jax.ops.grouped_matmul import grouped_matmul
from olmoe_jax.parallel.batch import DeviceBatch
from olmoe_jax.training.optimizer import adamw, schedule
from olmoe_jax.training.step import Trainer

CONFIG = tiny_config()
WEIGHTS = random_weights(CONFIG)
EXPERTS = ((1, 4, 7), (0,))
RANDOM = np.random.default_rng(0)


def array(*shape):
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


@pytest.mark.parametrize("backend", RUN_ON_CPU)
@pytest.mark.parametrize(
    ("sizes", "indices"),
    [
        pytest.param((4, 3, 5, 0), (0, 2), marks=pytest.mark.exhaustive),
        ((4, 0, 5, 1), (1, 3, 4)),  # an empty group, and padding (4: none)
        pytest.param((0, 0, 10, 0), (4, 4), marks=pytest.mark.exhaustive),
        ((3, 3, 3, 3), (3, 0, 1, 2)),
    ],
)
def test_gradients_of_some_groups(backend, sizes, indices):
    x, w, weighting = array(12, 8), array(4, 8, 6), array(12, 6)
    selected = w[np.minimum(indices, 3)]
    group = np.repeat(np.arange(5), [*sizes, 12 - sum(sizes)])
    member = jnp.asarray(group[:, None] == np.arange(4), jnp.float32)
    # chosen[e, i]: selected[i] is in the place of group e.
    chosen = jnp.asarray(np.arange(4)[:, None] == np.array(indices), jnp.float32)
    kept = 1 - chosen.sum(axis=1)

    def ours(x, selected):
        tuned = {"tuned": selected, "indices": jnp.array(indices, jnp.int32)}
        y = grouped_matmul(x, w, jnp.array(sizes, jnp.int32), backend, **tuned)
        return jnp.sum(weighting * y)

    def oracle(x, selected):
        whole = kept[:, None, None] * w + jnp.einsum("ei,idf->edf", chosen, selected)
        return jnp.sum(weighting * jnp.einsum("ne,nd,edf->nf", member, x, whole))

    assert_close(ours(x, selected), oracle(x, selected))
    gradients = jax.grad(ours, (0, 1))(x, selected)
    assert_close(gradients, jax.grad(oracle, (0, 1))(x, selected))
    for index, group in enumerate(indices):
        assert np.asarray(gradients[1][index]).any() == (group < 4 and sizes[group] > 0)


def test_the_pack_in_layers():
    """Two layers of 3 and 1 experts: the second is filled up with what replaces nothing."""
    model = make_model(CONFIG, WEIGHTS | stack_tuned(WEIGHTS, EXPERTS), tuned_experts=EXPERTS)
    assert isinstance(model.tuned, TunedExperts)
    by_layer = model.tuned.by_layer(8, jnp.float32)
    np.testing.assert_array_equal(by_layer.indices, [[1, 4, 7], [0, 8, 8]])
    for place, (layer, expert) in enumerate(places(EXPERTS)):
        np.testing.assert_array_equal(
            model.tuned.gate[...][place], WEIGHTS["layers.moe.experts.gate"][layer, expert]
        )
    np.testing.assert_array_equal(by_layer.down[1, 0], WEIGHTS["layers.moe.experts.down"][1, 0])
    assert not np.asarray(by_layer.up[1, 1:]).any()


def batch_of(config):
    tokens = np.random.default_rng(1).integers(2, 61, (2, 8)).astype(np.int32)
    segments = np.ones_like(tokens)
    segments[1, 6:] = 0
    positions = np.broadcast_to(np.arange(8, dtype=np.int32), tokens.shape)
    weights = (segments / segments.sum()).astype(np.float32)
    return DeviceBatch(*map(jnp.asarray, (tokens, tokens[:, ::-1], segments, positions, weights)))


def gradients_of(names, weights, config=CONFIG, **settings):
    trainer = Trainer(
        config,
        ModelSettings(**settings),
        adamw(0.9, 0.999, 1e-8, 0.0),
        schedule("constant", 1e-3, 0, 1),
        1.0,
    )
    trained = {name: jnp.asarray(value) for name, value in weights.items() if names(name)}
    frozen = {name: value for name, value in weights.items() if name not in trained}
    position = np.zeros(2, np.uint32)
    return trainer, trained, frozen, (trainer.zero_sums(trained), batch_of(config), position)


@pytest.mark.parametrize(
    ("experts", "settings", "changes"),
    [
        pytest.param(EXPERTS, {"dense_router_gradient": True}, {}, marks=pytest.mark.exhaustive),
        pytest.param(EXPERTS, {}, {}, marks=pytest.mark.exhaustive),
        pytest.param(((), (2, 6)), {"remat": "full"}, {}, marks=pytest.mark.exhaustive),
        pytest.param(
            EXPERTS,
            {"dense_router_gradient": True, "router_gradient_experts": 4},
            {"norm_topk_prob": True, "tie_word_embeddings": True},
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_gradients_are_the_full_models(experts, settings, changes):
    """Of the selected experts and of everything else that trains, router included."""
    config = tiny_config(**changes)
    base = random_weights(config)
    pack = stack_tuned(base, experts)

    def compute(names, weights, **more):
        trainer, trained, frozen, rest = gradients_of(names, weights, config, **settings, **more)
        return jax.device_get(jax.jit(trainer.accumulate)(trained, frozen, *rest))

    ours = compute(lambda n: ".experts." not in n, base | pack, tuned_experts=experts)
    full = compute(lambda n: True, base)
    assert_close(ours.loss, full.loss)
    expected = stack_tuned(full.gradients, experts)
    expected |= {name: full.gradients[name] for name in ours.gradients if name in base}
    assert_close(ours.gradients, expected, 2e-5)
    assert len(ours.gradients["tuned.gate"]) == sum(map(len, experts))


@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(
    "parts",
    [
        (".experts.",),
        pytest.param((".experts.", "lm_head"), marks=pytest.mark.exhaustive),
        pytest.param((".experts.down",), marks=pytest.mark.exhaustive),
        pytest.param((".router",), marks=pytest.mark.exhaustive),
        pytest.param((".attention.",), marks=pytest.mark.exhaustive),
        pytest.param(("lm_head",), marks=pytest.mark.exhaustive),
        pytest.param(("norm",), marks=pytest.mark.exhaustive),
    ],
)
def test_some_weights_alone(parts, remat):
    """They get the gradients that they get where everything trains."""

    def compute(names):
        trainer, trained, frozen, rest = gradients_of(names, WEIGHTS, remat=remat)
        return jax.device_get(jax.jit(trainer.accumulate)(trained, frozen, *rest)).gradients

    ours, full = compute(lambda n: any(part in n for part in parts)), compute(lambda n: True)
    assert 0 < len(ours) < len(full)
    for name, gradient in ours.items():
        assert np.any(gradient)
        assert_close(gradient, full[name], 2e-5)


def weight_gradients(weights, names, **settings) -> int:
    """Loops of the compiled program that write float32 matrices of experts one by one.

    They fill [E, D, F] (or [E, F, D]), or add to the sums of all layers, [L, E, D, F]. In a
    bfloat16 model only weight gradients are made like that; compilation must have removed those
    that nobody uses, which the backward of the grouped matmul writes down.
    """
    settings |= {"compute_dtype": jnp.bfloat16, "remat": "full"}
    trainer, trained, frozen, rest = gradients_of(names, weights, **settings)
    text = jax.jit(trainer.accumulate).lower(trained, frozen, *rest).compile().as_text()
    return len(re.findall(r" = f32\[(?:2,)?8,(?:32,16|16,32)\]\S* dynamic-update-slice\(", text))


@pytest.mark.exhaustive
def test_no_weight_gradient_for_frozen_experts():
    """In the compiled program of ESFT and of LoRA; the full model is the control."""
    bfloat16 = {name: jnp.asarray(value, jnp.bfloat16) for name, value in WEIGHTS.items()}
    assert weight_gradients(bfloat16, lambda n: ".experts." in n) >= 3
    weights = bfloat16 | stack_tuned(WEIGHTS, EXPERTS)
    selected = {"tuned_experts": EXPERTS}
    assert weight_gradients(weights, lambda n: n.startswith("tuned."), **selected) == 0
    lora = LoraSettings(4, 8.0)
    weights = bfloat16 | random_adapters(CONFIG, lora)
    assert weight_gradients(weights, lambda n: ".lora." in n, lora=lora) == 0
