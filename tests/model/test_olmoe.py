"""The whole model: its shape at full size, packing, decoding, remat, methods and statistics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROUTER_SETTINGS, assert_close, count_matmuls, relative_error
from tiny import make_model, random_weights, tiny_config

from olmoe_jax.checkpoints import names
from olmoe_jax.checkpoints.loading import graph_of, parameter_specs
from olmoe_jax.model.config import ModelSettings
from olmoe_jax.model.decoder import Olmoe
from olmoe_jax.model.lora import LoraSettings
from olmoe_jax.model.parameters import merge, split
from olmoe_jax.ops.cross_entropy import weighted_cross_entropy
from olmoe_jax.ops.routing import RouterStatistics, load_balancing_loss
from olmoe_jax.plan.planning import OLMOE_1B_7B

TOKENS = np.random.default_rng(0).integers(2, 61, (2, 12))


def full_size_structs(dtype):
    specs = parameter_specs(OLMOE_1B_7B)
    return {name: jax.ShapeDtypeStruct(spec.shape, dtype) for name, spec in specs.items()}


def test_full_size_parameters():
    """Embedding and head 50304*2048; a layer 4*2048^2 + 64*(3*2048*1024 + 2048) + 4*2048."""
    specs = parameter_specs(OLMOE_1B_7B)
    layer = 4 * 2048**2 + 64 * (3 * 2048 * 1024 + 2048) + 4 * 2048
    total = sum(int(np.prod(spec.shape)) for spec in specs.values())
    assert total == 2 * 50304 * 2048 + 16 * layer + 2048 == 6_919_161_856
    assert {name: spec.shape for name, spec in specs.items()} == {
        "embed": (50304, 2048),
        "layers.attention.q": (16, 2048, 2048),
        "layers.attention.k": (16, 2048, 2048),
        "layers.attention.v": (16, 2048, 2048),
        "layers.attention.o": (16, 2048, 2048),
        "layers.attention.q_norm": (16, 2048),
        "layers.attention.k_norm": (16, 2048),
        "layers.attention_norm": (16, 2048),
        "layers.moe_norm": (16, 2048),
        "layers.moe.router": (16, 2048, 64),
        "layers.moe.experts.gate": (16, 64, 2048, 1024),
        "layers.moe.experts.up": (16, 64, 2048, 1024),
        "layers.moe.experts.down": (16, 64, 1024, 2048),
        "norm": (2048,),
        "lm_head": (50304, 2048),
    }
    for name, spec in specs.items():
        assert len(spec.axes) == len(spec.shape), name


@pytest.mark.parametrize("method", ["frozen", "conventional", "densemixer"])
def test_full_size_loss_and_gradients_have_the_right_shapes(method):
    """Traced, never allocated: two packed rows of 4096 tokens in bfloat16."""
    settings = ModelSettings(jnp.bfloat16, method, remat="full")
    graph = graph_of(OLMOE_1B_7B, settings)
    tokens = jax.ShapeDtypeStruct((2, 4096), jnp.int32)

    def loss(parameters, tokens):
        model = merge(graph, parameters)
        hidden, _ = model.hidden(tokens)
        weights = jnp.ones(tokens.shape, jnp.float32)
        return weighted_cross_entropy(hidden, model.head(), tokens, weights)

    parameters = full_size_structs(jnp.float32)
    value, gradients = jax.eval_shape(jax.value_and_grad(loss), parameters, tokens)
    assert (value.shape, value.dtype) == ((), jnp.float32)
    assert gradients == parameters


def test_full_size_logits_shape():
    model = functools.partial(merge, graph_of(OLMOE_1B_7B, ModelSettings(jnp.bfloat16)))
    tokens = jax.ShapeDtypeStruct((1, 1024), jnp.int32)
    logits = jax.eval_shape(lambda p, t: model(p)(t), full_size_structs(jnp.bfloat16), tokens)
    assert (logits.shape, logits.dtype) == ((1, 1024, 50304), jnp.float32)


def test_tied_embeddings_have_no_head_parameter():
    config = tiny_config(tie_word_embeddings=True)
    assert "lm_head" not in parameter_specs(config)
    assert set(parameter_specs(tiny_config())) - set(parameter_specs(config)) == {"lm_head"}


def test_split_and_merge_are_inverse():
    weights = random_weights(tiny_config())
    graph, parameters = split(make_model(tiny_config(), weights))
    assert_close(parameters, weights, 0)
    assert_close(split(merge(graph, parameters))[1], weights, 0)


def test_initialisation_follows_the_config():
    from flax import nnx

    config = tiny_config(initializer_range=0.5)
    parameters = jax.jit(lambda: split(Olmoe(config, rngs=nnx.Rngs(0)))[1])()
    for name, value in parameters.items():
        if name.endswith("norm"):
            np.testing.assert_array_equal(value, 1.0)
        else:
            assert abs(np.std(value) / 0.5 - 1) < 0.1, name
    assert set(parameters) == {weight.name for weight in names.weights(config)}


@functools.cache
def plain_logits():
    return np.asarray(jax.jit(make_model(tiny_config()).__call__)(TOKENS))


def test_packed_rows_equal_separate_rows():
    """Examples of 12, 5 and 7 tokens: alone, right-padded, and all in one row with padding."""
    examples = [TOKENS[0], TOKENS[1, :5], TOKENS[1, 5:]]
    model = make_model(tiny_config())
    lengths = [len(example) for example in examples]
    padding = 3
    tokens = np.concatenate([*examples, np.ones(padding, int)])[None]
    segments = np.concatenate([np.repeat([1, 2, 3], lengths), np.zeros(padding, int)])[None]
    positions = np.concatenate([*map(np.arange, lengths), np.zeros(padding, int)])[None]
    packed = np.asarray(jax.jit(model.__call__)(tokens, segments, positions))[0, :-padding]

    rows = np.ones((3, 12), int)
    mask = np.zeros((3, 12), int)
    for row, example in enumerate(examples):
        rows[row, : len(example)], mask[row, : len(example)] = example, 1
    padded = np.asarray(jax.jit(model.__call__)(rows, mask))
    alone = np.concatenate([padded[row, :length] for row, length in enumerate(lengths)])
    assert relative_error(packed, alone) < 1e-5
    assert relative_error(padded[0], plain_logits()[0]) < 1e-5


def test_positions_and_order_matter():
    """What would stay unseen if the rotary embedding or the causal mask were lost."""
    logits = plain_logits()
    shuffled = TOKENS.copy()
    shuffled[:, [0, 1]] = shuffled[:, [1, 0]]
    model = jax.jit(make_model(tiny_config()).__call__)
    assert relative_error(model(shuffled)[:, -1], logits[:, -1]) > 1e-4
    later = TOKENS.copy()
    later[:, -1] = 2
    np.testing.assert_array_equal(model(later)[:, :-1], logits[:, :-1])


@pytest.mark.parametrize("first", [pytest.param(7, marks=pytest.mark.slow), 1])
def test_decoding_equals_the_full_forward(first):
    """A prompt of `first` tokens, then token by token; row 1 is padded on the left by two."""
    model = make_model(tiny_config(num_kv_heads=2))
    expected = jax.jit(model.__call__)(TOKENS)
    tokens = np.stack([TOKENS[0, :10], np.concatenate([[1, 1], TOKENS[1, :8]])])
    segments = np.ones((2, 10), int)
    segments[1, :2] = 0
    positions = np.maximum(np.arange(10) - [[0], [2]], 0)

    def part(start, stop):
        return [jnp.asarray(a[:, start:stop], jnp.int32) for a in (tokens, segments, positions)]

    logits, cache = jax.jit(model.prefill, static_argnums=3)(*part(0, first), 12 - first)
    outputs, layers, decode = [(first, logits)], model.decoding_layers(2), jax.jit(model.decode)
    for stop in range(first + 1, 11):
        token, is_token, position = (a[:, 0] for a in part(stop - 1, stop))
        logits, cache = decode(layers, token, is_token > 0, position, cache)
        outputs.append((stop, logits))
    assert int(cache.length) == 10
    for stop, logits in outputs:
        assert relative_error(logits[0], expected[0, stop - 1]) < 1e-5
        if stop > 2:
            assert relative_error(logits[1], expected[1, stop - 3]) < 1e-5


def loss_and_gradients(config=None, segments=None, **settings):
    config = config or tiny_config()
    graph = graph_of(config, ModelSettings(**settings))

    @jax.jit
    def run(parameters, tokens, segments):
        def loss(parameters):
            model = merge(graph, parameters)
            hidden, _ = model.hidden(tokens, segments)
            weights = jnp.asarray(segments > 0, jnp.float32)
            return weighted_cross_entropy(hidden, model.head(), jnp.roll(tokens, -1, 1), weights)

        return jax.value_and_grad(loss)(parameters)

    segments = np.ones_like(TOKENS) if segments is None else segments
    return jax.device_get(run(random_weights(config), TOKENS, segments))


@functools.cache
def method_results(method):
    return loss_and_gradients(**ROUTER_SETTINGS[method])


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "selective"])
def test_remat_changes_nothing(remat):
    actual = loss_and_gradients(dense_router_gradient=True, remat=remat)
    assert_close(actual, method_results("densemixer"), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "lora", [None, pytest.param(LoraSettings(4, 16.0), marks=pytest.mark.exhaustive)]
)
def test_what_remat_computes_twice(lora):
    """Selective: no matmul; full: all of the layer but the last of an expert."""
    config = tiny_config()

    def matmuls(remat, differentiate):
        settings = ModelSettings(dense_router_gradient=True, remat=remat, lora=lora)
        graph, specs = graph_of(config, settings), parameter_specs(config, settings)
        shapes = {name: jax.ShapeDtypeStruct(s.shape, jnp.float32) for name, s in specs.items()}

        def total(parameters, tokens):
            return jnp.sum(merge(graph, parameters).hidden(tokens)[0])

        return count_matmuls(differentiate(total), shapes, jax.ShapeDtypeStruct((2, 8), jnp.int32))

    forward = matmuls("none", lambda total: total)
    kept = matmuls("none", jax.grad)
    assert matmuls("selective", jax.grad) == kept
    assert matmuls("full", jax.grad) == kept + forward - (2 if lora else 1)


@pytest.mark.slow
def test_frozen_router():
    """No gradient for the router; everything else as conventional."""
    loss, frozen = method_results("frozen")
    frozen = dict(frozen)
    assert not np.any(frozen.pop("layers.moe.router"))
    conventional_loss, conventional = method_results("conventional")
    conventional = dict(conventional)
    assert np.all(np.any(conventional.pop("layers.moe.router"), axis=(1, 2)))
    assert loss == conventional_loss
    assert_close(frozen, conventional, 1e-6)


@pytest.mark.slow
def test_densemixer_in_the_whole_model():
    loss, densemixer = method_results("densemixer")
    conventional_loss, conventional = method_results("conventional")
    assert loss == conventional_loss
    router = "layers.moe.router"
    assert relative_error(densemixer[router], conventional[router]) > 1e-2
    # The experts of the last layer see the conventional gradient, earlier ones do not.
    for name in ("gate", "up", "down"):
        first, last = (densemixer[f"layers.moe.experts.{name}"][layer] for layer in (0, -1))
        expected = conventional[f"layers.moe.experts.{name}"]
        assert relative_error(last, expected[-1]) < 1e-6
        assert relative_error(first, expected[0]) > 1e-4


@pytest.mark.slow
def test_pad_token_row_of_the_embedding_learns_nothing():
    """torch's padding_idx, even where the id is a real token."""
    pad = int(TOKENS[0, 3])
    gradient = loss_and_gradients(tiny_config(pad_token_id=pad))[1]["embed"]
    plain = method_results("conventional")[1]["embed"]
    assert np.any(plain[pad])
    assert not np.any(gradient[pad])
    others = np.arange(61) != pad
    assert_close(gradient[others], plain[others], 1e-6)


def test_bfloat16_is_near_float32():
    model = make_model(tiny_config(), compute_dtype=jnp.bfloat16)
    logits = jax.jit(model.__call__)(TOKENS)
    assert logits.dtype == jnp.float32
    # A few tokens may choose another expert; the rest is within bfloat16's 8 bits.
    errors = np.abs(logits - plain_logits()).max(-1) / np.abs(plain_logits()).max()
    assert np.median(errors) < 2e-2
    assert np.median(errors) > 1e-5


SEGMENTS = np.array([[1] * 12, [1] * 5 + [2] * 3 + [0] * 4])


@functools.cache
def router_statistics():
    model = make_model(tiny_config())
    hidden = jax.jit(functools.partial(model.hidden, with_router_logits=True))
    return hidden(TOKENS, SEGMENTS)[1]


def test_load_balancing_loss_equals_transformers():
    """With padding, which must not count (transformers#28505)."""
    torch = pytest.importorskip("torch")
    from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

    statistics = router_statistics()
    logits = tuple(torch.tensor(np.asarray(layer).reshape(-1, 8)) for layer in statistics.logits)
    mask = torch.tensor(SEGMENTS > 0).long()
    expected = load_balancing_loss_func(logits, 8, 2, mask).item()
    actual = float(load_balancing_loss(statistics, 2))
    assert abs(actual / expected - 1) < 1e-6
    unmasked = load_balancing_loss_func(logits, 8, 2).item()
    assert abs(unmasked / expected - 1) > 1e-4
    assert abs(actual - 2) > 1e-2, "2 = K is perfect balance, which would hide errors"


def test_load_balancing_loss_extremes():
    """Balanced: K. All tokens on K experts with certainty: E."""
    tokens = 16.0
    entropy = jnp.zeros((2,))
    even = jnp.full((2, 8), tokens / 8)
    balanced = RouterStatistics(even * 2, even, entropy, None)
    np.testing.assert_allclose(load_balancing_loss(balanced, 2), 2.0, rtol=1e-6)
    one = jnp.zeros((2, 8)).at[:, :2].set(tokens)
    collapsed = RouterStatistics(one, one / 2, entropy, None)
    np.testing.assert_allclose(load_balancing_loss(collapsed, 2), 8.0, rtol=1e-6)
    empty = jax.tree.map(jnp.zeros_like, balanced)
    assert load_balancing_loss(empty, 2) == 0


def test_statistics_of_packed_rows_exclude_padding():
    statistics = router_statistics()
    np.testing.assert_array_equal(statistics.load.sum(axis=1), (SEGMENTS > 0).sum() * 2)
    np.testing.assert_allclose(statistics.probability.sum(axis=1), (SEGMENTS > 0).sum(), rtol=1e-5)
