"""Reading config.json: transformers 4 and 5 write it differently, and every mistake is named."""

import pytest
from tiny import hf_config, tiny_config

from olmoe_jax.errors import UserError
from olmoe_jax.model.config import model_config_from_hf

CONFIG = tiny_config(
    num_kv_heads=2,
    norm_topk_prob=True,
    clip_qkv=0.5,
    tie_word_embeddings=True,
    pad_token_id=1,
    rope_theta=5e5,
    rms_norm_eps=1e-6,
    initializer_range=0.1,
    max_position_embeddings=64,
)


def without(config: dict, *names: str) -> dict:
    return {name: value for name, value in config.items() if name not in names}


def transformers_5(config, **changes) -> dict:
    old = without(hf_config(config), "rope_theta", "rope_scaling", "torch_dtype")
    rope = {"rope_theta": config.rope_theta, "rope_type": "default"}
    return old | {"dtype": "float32", "rope_parameters": rope} | changes


def test_transformers_4():
    assert model_config_from_hf(hf_config(CONFIG)) == CONFIG


def test_transformers_5():
    assert model_config_from_hf(transformers_5(CONFIG)) == CONFIG


def test_a_config_that_transformers_writes(tmp_path):
    """What the installed transformers makes of the same architecture."""
    import json

    from transformers import OlmoeConfig

    fields = without(hf_config(CONFIG), "architectures", "torch_dtype", "rope_scaling")
    rope = {"rope_theta": fields.pop("rope_theta"), "rope_type": "default"}
    OlmoeConfig(**fields, rope_parameters=rope).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in written
    assert model_config_from_hf(written) == CONFIG


def test_optional_fields_have_olmoe_values():
    required = without(
        hf_config(tiny_config()),
        *("num_key_value_heads", "clip_qkv", "norm_topk_prob", "tie_word_embeddings"),
        *("pad_token_id", "hidden_act", "attention_bias", "rope_scaling", "rope_theta"),
        *("rms_norm_eps", "initializer_range", "attention_dropout"),
    )
    assert model_config_from_hf(required) == tiny_config(max_position_embeddings=64)


@pytest.mark.parametrize(
    ("changes", "culprits"),
    [
        ({"model_type": "mixtral"}, ["'mixtral'", "olmoe"]),
        ({"model_type": None}, ["model_type"]),
        ({"hidden_size": None}, ["hidden_size"]),
        ({"vocab_size": "61"}, ["vocab_size"]),
        ({"num_experts_per_tok": None}, ["num_experts_per_tok"]),
        ({"intermediate_size": None}, ["intermediate_size"]),
        ({"hidden_act": "gelu"}, ["hidden_act"]),
        ({"attention_bias": True}, ["attention_bias"]),
        ({"attention_dropout": 0.1}, ["attention_dropout"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_scaling"]),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, ["rope"]),
        ({"num_hidden_layers": 0}, ["greater than 0"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads=3", "num_attention_heads=4"]),
        ({"num_experts_per_tok": 9}, ["num_experts_per_tok=9", "num_experts=8"]),
        ({"hidden_size": 36, "num_key_value_heads": 4}, ["head size 9"]),
    ],
)
def test_errors_name_the_field(changes, culprits):
    with pytest.raises(UserError) as caught:
        model_config_from_hf(hf_config(tiny_config(), **changes), "some/config.json")
    message = str(caught.value)
    assert message.startswith("some/config.json: ")
    assert "\n" not in message
    for culprit in culprits:
        assert culprit in message
