"""The table of weight names: complete, one to one, and transposed where it must be."""

import itertools

import numpy as np
import pytest
from tiny import random_weights, tiny_config

from olmoe_jax.checkpoints import names
from olmoe_jax.checkpoints.loading import parameter_specs

# Square matrices everywhere: only values can tell a transposed one.
SQUARE = tiny_config(
    hidden_size=8, num_experts=8, intermediate_size=8, num_heads=2, num_kv_heads=2, head_dim=4
)


def hf_names(config):
    """Yields the names in Hugging Face's OLMoE checkpoints, written by hand."""
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
            yield f"{prefix}self_attn.{part}.weight"
        yield from (f"{prefix}{part}_layernorm.weight" for part in ("input", "post_attention"))
        yield f"{prefix}mlp.gate.weight"
        for expert in range(config.num_experts):
            for part in ("gate", "up", "down"):
                yield f"{prefix}mlp.experts.{expert}.{part}_proj.weight"
    yield from ("model.embed_tokens.weight", "model.norm.weight")
    if not config.tie_word_embeddings:
        yield "lm_head.weight"


@pytest.mark.parametrize("tied", [False, True])
def test_every_name_exactly_once(tied):
    config = tiny_config(tie_word_embeddings=tied)
    made = [name for name, _ in names.all_to_hf(random_weights(config), config)]
    assert len(made) == len(set(made))
    assert set(made) == set(hf_names(config))


def test_the_table_has_every_parameter_in_its_shape():
    config = tiny_config(num_kv_heads=2)
    specs = parameter_specs(config)
    assert {weight.name for weight in names.TABLE} == set(specs)
    assert {weight.name for weight in names.weights(config)} == set(specs)
    for weight in names.weights(config):
        shape = names.layer_shape(weight, config)
        layers = (config.num_layers,) if weight.per_layer else ()
        assert specs[weight.name].shape == layers + shape, weight.name


def test_values_go_where_they_belong():
    """Matrices turn from [in, out] to [out, in]; embedding, head and norms stay as they are."""
    weights = random_weights(SQUARE)
    tensors = dict(names.all_to_hf(weights, SQUARE))
    plain = {"embed": "model.embed_tokens", "lm_head": "lm_head", "norm": "model.norm"}
    for ours, theirs in plain.items():
        np.testing.assert_array_equal(tensors[f"{theirs}.weight"], weights[ours])
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for ours, theirs in {
            "attention_norm": "input_layernorm",
            "moe_norm": "post_attention_layernorm",
            "attention.q_norm": "self_attn.q_norm",
            "attention.k_norm": "self_attn.k_norm",
        }.items():
            value = tensors[f"{prefix}{theirs}.weight"]
            np.testing.assert_array_equal(value, weights[f"layers.{ours}"][layer])
        for ours, theirs in {
            **{f"attention.{name}": f"self_attn.{name}_proj" for name in "qkvo"},
            "moe.router": "mlp.gate",
        }.items():
            value = tensors[f"{prefix}{theirs}.weight"]
            np.testing.assert_array_equal(value, weights[f"layers.{ours}"][layer].T)
        for expert, part in itertools.product(range(8), ("gate", "up", "down")):
            value = tensors[f"{prefix}mlp.experts.{expert}.{part}_proj.weight"]
            expected = weights[f"layers.moe.experts.{part}"][layer, expert].T
            np.testing.assert_array_equal(value, expected)


def test_a_part_of_the_parameters():
    """A dict without the router, as gradients of a frozen router are, gives no router."""
    config = tiny_config()
    weights = random_weights(config)
    del weights["layers.moe.router"]
    made = {name for name, _ in names.all_to_hf(weights, config)}
    assert set(hf_names(config)) - made == {f"model.layers.{i}.mlp.gate.weight" for i in range(2)}
