"""What plan compiles is what training runs; its figures, counted by hand."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from olmoe_jax import data
from olmoe_jax.config import Config, from_dict
from olmoe_jax.parallel import sharding
from olmoe_jax.parallel.batch import place_batch
from olmoe_jax.plan.collectives import communication
from olmoe_jax.plan.planning import plan
from olmoe_jax.plan.report import facts, to_text
from olmoe_jax.training.base_model import open_model
from olmoe_jax.training.program import build_program

D, F, E, V, L = 32, 16, 8, 256, 2
MODEL = {
    "model_type": "olmoe",
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": L,
    "num_attention_heads": 2,
    "num_experts": E,
    "num_experts_per_tok": 2,
}
MATRICES = L * (4 * D * D + 3 * E * D * F)
BASE = MATRICES + L * (4 * D + E * D) + 2 * V * D + D


def configuration(path: str, eval_fraction: float = 0.0, **method) -> Config:
    return from_dict(
        {
            "model": {"init": "random", "config_path": path, "compute_dtype": "float32"},
            "data": {
                "train_path": "none.jsonl",
                "tokenizer_path": path,
                "max_seq_length": 64,
                "eval_fraction": eval_fraction,
            },
            "method": method,
            "train": {"output_dir": "none", "rows_per_device": 2},
        }
    )


def trained(config):
    """What the compiled accumulate program of a run takes and communicates."""
    mesh = sharding.make_mesh(1, -1)
    with jax.set_mesh(mesh):
        program = build_program(config, open_model(config), mesh, 10)
        rows = np.ones((16, 64), np.int32)
        batch = place_batch(data.Batch(rows, rows, rows, rows, rows.astype(np.float32)), mesh)
        arguments = program.state.parameters, program.frozen
        position = np.zeros(2, np.uint32)
        compiled = program.accumulate.lower(
            *arguments, program.zero_sums(), batch, position
        ).compile()
    stats = compiled.memory_analysis()
    return {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "communicated": communication(compiled.as_text()).total("bytes"),
    }


def too_small(planned, divided: float):
    """The plan on devices that have half of what it needs; `divided`: share of weights and state.

    (In the tiny model's plans the temporaries are nearly everything.)
    """
    kind = dataclasses.replace(planned.topology.kind, capacity=planned.peak // 2)
    topology = dataclasses.replace(planned.topology, kind=kind)
    return dataclasses.replace(planned, topology=topology, divided=int(divided * planned.peak))


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """{name: a plan as JSON, with "text"}; the first also has "training", what training takes."""
    path = str(tmp_path_factory.mktemp("plans"))
    (Path(path) / "config.json").write_text(json.dumps(MODEL))
    full = configuration(path, 0.1, name="densemixer", router_aux_loss_coefficient=0.1)
    planned = {
        "full": plan(full, "cpu:8", rows_per_step=40),
        "esft": plan(configuration(path, name="esft_gate"), "cpu:8", tuned_experts=2),
    }
    quantized = configuration(path, name="densemixer", lora_rank=4)
    base = dataclasses.replace(
        quantized.model,
        init="pretrained",
        path=path,
        config_path=None,
        base_quantization="nf4",
    )
    planned["nf4"] = plan(dataclasses.replace(quantized, model=base), "cpu:8")
    planned["state too large"] = too_small(planned["full"], 0.9)
    planned["temporaries too large"] = too_small(planned["full"], 0.1)
    result = {name: {**facts(p), "text": to_text(facts(p))} for name, p in planned.items()}
    result["full"]["training"] = trained(full)
    return result


def test_the_program_is_trainings(plans):
    full = plans["full"]
    training, planned = full["training"], full["memory"]["accumulate"]
    for part in ("arguments", "outputs", "aliased", "temporaries"):
        assert planned[part] == training[part], part
    own = [c for c in full["collectives"] if c["program"] == "accumulate"]
    assert sum(c["bytes"] for c in own) == training["communicated"]


def test_memory_by_hand(plans):
    full = plans["full"]["memory"]
    # Weights, gradients and two moments, float32; norms and scalars are on every device.
    shard = 4 * BASE / 8
    assert full["accumulate"]["resident"] == pytest.approx(2 * shard, rel=0.05)
    batch = 5 * 4 * 2 * 64
    assert full["accumulate"]["arguments"] == pytest.approx(2 * shard + batch, rel=0.05)
    assert full["update"]["arguments"] == pytest.approx(4 * shard, rel=0.05)
    assert full["update"]["aliased"] == pytest.approx(3 * shard, rel=0.05)
    assert full["update"]["resident"] == 0
    for memory in full.values():
        own = memory["arguments"] + memory["outputs"] - memory["aliased"] + memory["temporaries"]
        assert memory["peak"] == own + memory["code"] + memory["resident"]
    peak = max(memory["peak"] for memory in full.values())
    assert plans["full"]["peak_gib_per_device"] == peak / 2**30


def test_collectives_by_hand(plans):
    """The layers' matrices are gathered in the forward and again in the backward."""
    kinds = {}
    for entry in plans["full"]["collectives"]:
        if entry["program"] == "accumulate":
            kinds[entry["kind"]] = kinds.get(entry["kind"], 0) + entry["bytes"]
    assert kinds["all-gather"] >= 2 * 4 * MATRICES
    assert kinds["all-gather"] < 2 * 4 * MATRICES + 16 * 4 * V * D
    assert kinds["reduce-scatter"] >= 4 * L * 3 * E * D * F


def test_steps_of_several_microbatches(plans):
    full = plans["full"]
    assert (full["rows_per_microbatch"], full["rows_per_step"]) == (16, 40)
    assert full["microbatches_per_step"] == 3
    assert full["tokens_per_step"] == 40 * 64
    assert full["flops_per_step"] == full["flops_per_token"] * 40 * 64
    per_run = {"expert_load": 0, "accumulate": 0, "update": 0, "evaluate": 0}
    for entry in full["collectives"]:
        per_run[entry["program"]] += entry["bytes"]
        runs = {"expert_load": 3, "accumulate": 3, "update": 1, "evaluate": 0}
        assert entry["runs_per_step"] == runs[entry["program"]]
    step = 3 * (per_run["expert_load"] + per_run["accumulate"]) + per_run["update"]
    assert full["collective_bytes_per_step"] == step


def test_adapters_and_tuned_experts(plans):
    adapters = L * 4 * (4 * 2 * D + E * 3 * (D + F))
    lora, esft = plans["nf4"], plans["esft"]
    assert lora["parameters_trained"] == adapters + L * E * D
    assert lora["parameters_frozen"] == BASE - L * E * D
    assert esft["parameters_trained"] == L * 2 * 3 * D * F + V * D
    # The base's copies of the tuned experts count once, as trained.
    assert esft["parameters_frozen"] == BASE - esft["parameters_trained"]
    assert "2 tuned experts in each layer" in esft["assumptions"][1]
    # Nothing to evaluate on: nothing to compile for it.
    assert set(esft["memory"]) == {"accumulate", "update", "hold_tuned"}
    assert lora["flops_per_token"] < plans["full"]["flops_per_token"]


def test_a_quantized_base(plans):
    """Half a byte per number and two per block, of matrices filled up to one block of 64 rows."""
    nf4 = plans["nf4"]
    columns = L * (4 * D + E * (2 * F + D))
    others = 4 * (L * 4 * D + D) + 4 * 2 * V * D // 8
    # The frozen weights stay while the adapters are updated.
    assert nf4["memory"]["update"]["resident"] == (32 + 2) * columns // 8 + others
    assert (nf4["lora_rank"], nf4["base_quantization"]) == (4, "nf4")
    assert f"{'base quantization':34}nf4" in nf4["text"].splitlines()


def test_verdict_and_advice(plans):
    full = plans["full"]
    assert full["fits"] is True
    assert full["advice"] == []
    assert full["text"].splitlines()[-1].startswith("fits: peak")
    for name, expected in (
        # 0.9 of the peak on twice as many devices, and the rest, are still more than half of it.
        (
            "state too large",
            [
                "more devices: about 32",
                "method.lora_rank=64",
                "optimizer.moments_dtype=bfloat16 (",
                "train.rows_per_device=1",
            ],
        ),
        (
            "temporaries too large",
            ["train.rows_per_device=1", "method.lora_rank=64", "optimizer.moments_dtype=bfloat16"],
        ),
    ):
        large = plans[name]
        assert large["fits"] is False
        assert large["headroom_gib"] < 0
        assert len(large["advice"]) == len(expected)
        assert all(map(str.startswith, large["advice"], expected))
        verdict = large["text"].splitlines()[-1 - len(expected)]
        assert verdict.startswith("does not fit: peak")
