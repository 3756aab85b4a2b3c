"""The command `python -m olmoe_jax.plan`."""

import json

import pytest
from helpers import assert_user_error, run_module

CONFIG = ("--config", "configs/densemixer_gsm.py")


@pytest.mark.slow
def test_json(tmp_path):
    model = {
        "model_type": "olmoe",
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(model))
    flags = ("--config.model.init=random", f"--config.model.config_path={tmp_path}")
    length = "--config.data.max_seq_length=64"
    code, out, error = run_module(
        "olmoe_jax.plan", *CONFIG, *flags, length, "--topology=cpu:8", "--json"
    )
    assert code == 0, error
    planned = json.loads(out)
    assert planned["fits"] is True
    assert 0 < planned["peak_gib_per_device"] < planned["capacity_gib"]
    assert planned["collective_bytes_per_step"] > 0
    # The experts alone take this much without DenseMixer.
    assert planned["flops_per_token"] > 6 * 2 * 2 * 3 * 32 * 16


@pytest.mark.parametrize("topology", ["h200:8", "h100", "h100:0", "v5e:3x5", "cpu:eight"])
def test_wrong_topologies_are_one_line(topology):
    assert_user_error(run_module("olmoe_jax.plan", *CONFIG, "--topology", topology), topology)


def test_unknown_model_is_one_line():
    path = "--config.model.path=someone/model"
    result = run_module("olmoe_jax.plan", *CONFIG, path, "--topology=cpu:8")
    assert_user_error(result, "someone/model", "config.json")
