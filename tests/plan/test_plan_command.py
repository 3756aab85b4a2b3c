"""`olmoe_jax.plan`: what a run needs, without its devices."""

import json
from pathlib import Path

import pytest
from helpers import assert_user_error, on_eight_devices, run_module

from olmoe_jax.plan.devices import parse_topology

MODEL = {
    "model_type": "olmoe",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan")
    (path / "config.json").write_text(json.dumps(MODEL))
    return [
        "--config",
        "configs/densemixer_gsm.py",
        "--config.model.init=random",
        f"--config.model.config_path={path}",
        "--config.data.max_seq_length=64",
    ]


@pytest.fixture(scope="module")
def planned(flags):
    code, out, error = run_module("olmoe_jax.plan", *flags, "--topology", "cpu:8", "--json")
    assert code == 0, error
    return json.loads(out)


def test_json_says_what_a_run_needs(planned):
    d, f, e, v, layers = 32, 16, 8, 256, 2
    layer = 4 * d * d + e * d + 3 * e * d * f + 4 * d  # projections, router, experts, norms
    assert planned["parameters_trained"] == layers * layer + 2 * v * d + d
    assert planned["parameters_frozen"] == 0
    assert planned["fits"] is True
    assert 0 < planned["peak_gib_per_device"] < planned["capacity_gib"]
    # Master copy, two moments and gradients in float32, an eighth of each on a device.
    assert planned["peak_gib_per_device"] * 2**30 > 16 * planned["parameters_trained"] / 8
    assert planned["collective_bytes_per_step"] > 0
    matmuls = layers * (4 * d * d + e * d + 2 * 3 * d * f) + v * d
    assert planned["flops_per_token"] > 3 * 2 * matmuls


def test_loops_multiply_what_they_communicate():
    found = on_eight_devices(Path(__file__).with_name("collectives_worker.py"))
    for layers in (3, 7):
        assert found[str(layers)] == [["all-gather", "f32", layers, layers * 16 * 16 * 4]]


@pytest.mark.parametrize(("name", "count"), [("h100:8", 8), ("v5e:2x4", 8), ("v5p:4", 4)])
def test_topologies(name, count):
    assert parse_topology(name).count == count


@pytest.mark.parametrize("topology", ["h200:8", "h100", "h100:0", "v5e:3x5", "cpu:eight"])
def test_wrong_topologies_are_one_line(topology, flags):
    assert_user_error(run_module("olmoe_jax.plan", *flags, "--topology", topology), topology)


def test_unknown_model_is_one_line():
    result = run_module(
        "olmoe_jax.plan",
        "--config",
        "configs/densemixer_gsm.py",
        "--config.model.path=someone/model",
        "--topology=cpu:8",
    )
    assert_user_error(result, "someone/model", "config.json")
