"""Adapted matrices are W + scale A B, forward and backward, for the router's gradient too."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROUTER_SETTINGS, RUN_ON_CPU, assert_close, relative_error
from tiny import make_model, merged_weights, random_adapters, random_weights, tiny_config

from olmoe_jax.checkpoints.loading import graph_of, random_parameters
from olmoe_jax.checkpoints.merging import merged
from olmoe_jax.model.config import ModelSettings
from olmoe_jax.model.decoder import parameter_specs
from olmoe_jax.model.lora import TARGETS, LoraSettings
from olmoe_jax.model.parameters import merge
from olmoe_jax.ops.linear import Linear, grouped_linear, linear, merged_weight
from olmoe_jax.parallel.sharding import make_mesh

CONFIG = tiny_config()
WEIGHTS = random_weights(CONFIG)
TOKENS = np.random.default_rng(1).integers(2, 61, (2, 9)).astype(np.int32)
RANDOM = np.random.default_rng(2)


def array(*shape):
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


def test_by_hand():
    """x = [1, 2]: x W = [3, 4]; the adapter sees [1, 2] -> 5 -> [10, 0], counted half."""
    eye, a, b = jnp.diag(jnp.array([3.0, 2.0])), jnp.array([[1.0], [2.0]]), jnp.array([[2.0, 0.0]])
    projection = Linear(eye, a, b, scale=0.5)
    x = jnp.array([[1.0, 2.0]])
    np.testing.assert_array_equal(linear(x, projection, x), [[8.0, 4.0]])
    np.testing.assert_array_equal(merged_weight(projection), [[4.0, 0.0], [2.0, 2.0]])
    # Dropout takes the adapter's input alone.
    np.testing.assert_array_equal(linear(x, projection, 0 * x), [[3.0, 4.0]])
    host = LoraSettings(1, 0.5)
    np.testing.assert_array_equal(merged(*map(np.asarray, (eye, a, b)), host), [[4, 0], [2, 2]])


def test_dense_projection():
    x, dropped, w = array(3, 5, 8), array(3, 5, 8), array(8, 6)
    a, b, weighting = array(8, 4), array(4, 6), array(3, 5, 6)

    def ours(x, dropped, a, b):
        return jnp.sum(weighting * linear(x, Linear(w, a, b, scale=1.7), dropped))

    def oracle(x, dropped, a, b):
        y = jnp.einsum("bsd,df->bsf", x, w) + 1.7 * jnp.einsum("bsd,dr,rf->bsf", dropped, a, b)
        return jnp.sum(weighting * y)

    arguments = (x, dropped, a, b)
    assert_close(ours(*arguments), oracle(*arguments))
    assert_close(
        jax.grad(ours, (0, 1, 2, 3))(*arguments), jax.grad(oracle, (0, 1, 2, 3))(*arguments)
    )


@pytest.mark.parametrize("backend", RUN_ON_CPU)
@pytest.mark.parametrize(
    "sizes",
    [
        (4, 0, 5, 1),
        *(pytest.param(s, marks=pytest.mark.exhaustive) for s in [(0, 0, 12, 0), (4, 3, 5, 0)]),
    ],
)
def test_grouped_projection(backend, sizes):
    """Empty groups, one group, and rows past the last group."""
    x, dropped, w = array(12, 8), array(12, 8), array(4, 8, 6)
    a, b, weighting = array(4, 8, 3), array(4, 3, 6), array(12, 6)
    group = np.repeat(np.arange(5), [*sizes, 12 - sum(sizes)])
    member = jnp.asarray(group[:, None] == np.arange(4), jnp.float32)

    def ours(x, dropped, a, b):
        projection = Linear(w, a, b, scale=0.6)
        y = grouped_linear(x, projection, dropped, jnp.array(sizes, jnp.int32), backend)
        return jnp.sum(weighting * y)

    def oracle(x, dropped, a, b):
        y = jnp.einsum("ne,nd,edf->nf", member, x, w)
        y += 0.6 * jnp.einsum("ne,nd,edr,erf->nf", member, dropped, a, b)
        return jnp.sum(weighting * y)

    arguments = (x, dropped, a, b)
    assert_close(ours(*arguments), oracle(*arguments))
    assert_close(
        jax.grad(ours, (0, 1, 2, 3))(*arguments), jax.grad(oracle, (0, 1, 2, 3))(*arguments)
    )


def objective(graph, parameters, weighting):
    return jnp.sum(weighting * merge(graph, parameters)(TOKENS))


@pytest.mark.slow
@pytest.mark.parametrize(
    "target",
    [
        "q",
        "gate",
        "down",
        *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("k", "v", "o", "up")),
    ],
)
def test_each_target_is_reached(target):
    """Against a plain model with the merged weights; LoRA on one kind of matrix only."""
    lora = LoraSettings(4, 8.0, targets=(target,))
    adapters = random_adapters(CONFIG, lora)
    assert [name.rsplit(".", 1)[1] for name in adapters] == [f"{target}_a", f"{target}_b"]
    logits = make_model(CONFIG, WEIGHTS | adapters, lora=lora)(TOKENS)
    assert_close(logits, make_model(CONFIG, merged_weights(WEIGHTS, adapters, 2.0))(TOKENS))
    assert relative_error(logits, make_model(CONFIG, WEIGHTS)(TOKENS)) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "experts", "norm_topk"),
    [
        ("densemixer", None, False),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in [
                ("conventional", None, False),
                ("frozen", None, False),
                ("densemixer", 2, False),
                ("densemixer", 5, False),
                ("densemixer", 5, True),
                ("densemixer", None, True),
            ]
        ),
    ],
)
def test_gradients_are_those_of_the_merged_model(method, experts, norm_topk):
    """A, B by the chain rule through W + scale A B; the router sees the adapted experts."""
    config = tiny_config(norm_topk_prob=norm_topk)
    lora = LoraSettings(4, 8.0)
    adapters = random_adapters(config, lora)
    settings = ModelSettings(**ROUTER_SETTINGS[method], router_gradient_experts=experts)
    plain = graph_of(config, settings)
    graph = graph_of(config, ModelSettings(**(vars(settings) | {"lora": lora})))
    weighting = jnp.asarray(np.random.default_rng(3).normal(size=(*TOKENS.shape, 61)), jnp.float32)
    router = {"layers.moe.router": WEIGHTS["layers.moe.router"]}
    trained = jax.tree.map(jnp.asarray, adapters | router)

    def ours(trained):
        return objective(graph, WEIGHTS | trained, weighting)

    def oracle(trained):
        whole = dict(WEIGHTS)
        for name, a in trained.items():
            if name.endswith("_a"):
                base = name.replace(".lora.", ".").removesuffix("_a")
                product = jnp.matmul(a, trained[name[:-1] + "b"], precision="highest")
                whole[base] = WEIGHTS[base] + 2.0 * product
        whole["layers.moe.router"] = trained["layers.moe.router"]
        return objective(plain, whole, weighting)

    gradients, oracle_gradients = (jax.jit(jax.grad(f))(trained) for f in (ours, oracle))
    assert_close(gradients, oracle_gradients, 2e-5)
    idle = {name for name, gradient in gradients.items() if not gradient.any()}
    assert idle == ({"layers.moe.router"} if method == "frozen" else set())
    if method == "densemixer" and experts != 2:
        # A router that saw the base's experts would get something else.
        base = jax.jit(jax.grad(lambda router: objective(plain, WEIGHTS | router, weighting)))(
            router
        )
        assert relative_error(gradients["layers.moe.router"], base["layers.moe.router"]) > 0.01


def fresh_adapters(lora, seed=0):
    mesh = make_mesh(devices=jax.devices()[:1])
    return random_parameters(CONFIG, ModelSettings(lora=lora), seed, mesh, lambda n: ".lora." in n)


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype", [jnp.bfloat16, pytest.param(jnp.float32, marks=pytest.mark.exhaustive)]
)
def test_at_the_start_the_model_is_the_base_bit_by_bit(dtype):
    lora = LoraSettings(4, 8.0)
    fresh = fresh_adapters(lora)
    model = make_model(CONFIG, WEIGHTS | fresh, lora=lora, compute_dtype=dtype)
    plain = make_model(CONFIG, WEIGHTS, compute_dtype=dtype)
    np.testing.assert_array_equal(model(TOKENS), plain(TOKENS))


def test_initialised_as_peft_does():
    """A uniform within 1 / sqrt(in), of its own for every layer and expert; B zero."""
    fresh = jax.device_get(fresh_adapters(LoraSettings(16, 8.0)))
    assert len(fresh) == 2 * len(TARGETS)
    for name, value in fresh.items():
        if name.endswith("_b"):
            assert not value.any(), name
            continue
        limit = 1 / math.sqrt(CONFIG.intermediate_size if "down" in name else CONFIG.hidden_size)
        assert 0.98 * limit < np.abs(value).max() <= limit, name
        # The variance of a uniform distribution is limit^2 / 3; a normal's kurtosis is 3, not 1.8.
        assert value.std() == pytest.approx(limit / math.sqrt(3), rel=0.06), name
        kurtosis = np.mean((value / value.std()) ** 4)
        assert kurtosis == pytest.approx(1.8, abs=0.15), name
        matrices = value.reshape(-1, *value.shape[-2:])
        assert len({matrix.tobytes() for matrix in matrices}) == len(matrices), name
    again, other = (jax.device_get(fresh_adapters(LoraSettings(16, 8.0), seed)) for seed in (0, 1))
    for name in fresh:
        np.testing.assert_array_equal(fresh[name], again[name])
        assert name.endswith("_b") or (fresh[name] != other[name]).any()


def test_scale():
    assert LoraSettings(64, 16.0).scale == 0.25
    lora = LoraSettings(4, 12.0)
    adapters = random_adapters(CONFIG, lora)
    logits = make_model(CONFIG, WEIGHTS | adapters, lora=lora)(TOKENS)
    assert_close(logits, make_model(CONFIG, merged_weights(WEIGHTS, adapters, 3.0))(TOKENS))


def test_settings_of_a_method():
    method = {
        "lora_rank": 64,
        "lora_alpha": 2.0,
        "lora_dropout": 0.3,
        "lora_targets": "up,q",
    }
    assert LoraSettings.of_method(method) == LoraSettings(64, 2.0, 0.3, ("q", "up"))
    # Runs of earlier versions: 2 / sqrt(64) = 16 / 64.
    older = LoraSettings.of_method(method | {"lora_rslora": True})
    assert older == LoraSettings(64, 16.0, 0.3, ("q", "up"))
    assert LoraSettings.of_method(method | {"lora_rank": None}) is None


def test_parameters_are_separate_for_each_expert_and_projection():
    specs = parameter_specs(CONFIG, ModelSettings(lora=LoraSettings(4, 8.0)))
    shapes = {name: spec.shape for name, spec in specs.items() if ".lora." in name}
    assert shapes == {
        **{f"layers.attention.lora.{name}_a": (2, 32, 4) for name in "qkvo"},
        **{f"layers.attention.lora.{name}_b": (2, 4, 32) for name in "qkvo"},
        **{f"layers.moe.experts.lora.{name}_a": (2, 8, 32, 4) for name in ("gate", "up")},
        **{f"layers.moe.experts.lora.{name}_b": (2, 8, 4, 16) for name in ("gate", "up")},
        "layers.moe.experts.lora.down_a": (2, 8, 16, 4),
        "layers.moe.experts.lora.down_b": (2, 8, 4, 32),
    }
