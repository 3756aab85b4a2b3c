"""What a step on a mesh communicates, against the formulas of docs/cluster.md."""

import json
from collections import Counter
from pathlib import Path

import jax
import pytest
from helpers import equations

from olmoe_jax import methods
from olmoe_jax.checkpoints.source import read_model_config
from olmoe_jax.config import from_dict
from olmoe_jax.parallel import sharding
from olmoe_jax.plan.collectives import communication
from olmoe_jax.plan.programs import StepPrograms
from olmoe_jax.training.base_model import compute_settings, with_backends

D, F, E, K, V, L = 32, 16, 8, 2, 256, 2
TOKENS = 2 * 64  # of a device: two rows of 64
EXPERTS, ATTENTION, ROUTER, NORMS = 3 * E * D * F, 4 * D * D, D * E, 4 * D
MESHES = {
    "1x2x4": (1, 2, 4),
    "1x8x1": (1, 8, 1),
    "2x4x1": (2, 4, 1),
}
CASES = [("densemixer", mesh) for mesh in MESHES]
CASES += [("conventional", mesh) for mesh in ("1x2x4", "1x8x1")]


def accumulate(path: str, method: str, mesh: str):
    """The jaxpr and the optimised HLO of a step's accumulate program."""
    data, fsdp, expert = MESHES[mesh]
    config = from_dict(
        {
            "model": {"init": "random", "config_path": path, "compute_dtype": "bfloat16"},
            "data": {"train_path": "none.jsonl", "max_seq_length": 64},
            "method": {"name": method},
            "train": {"output_dir": "none", "rows_per_device": 2},
            "mesh": {"data": data, "fsdp": fsdp, "expert": expert},
        }
    )
    model = read_model_config(Path(path))
    chosen = methods.build(config.method, model)
    settings = chosen.model_settings(with_backends(compute_settings(config), model, "cpu"))
    step = StepPrograms(config, model, settings, chosen, sharding.make_mesh(data, fsdp, expert))
    shapes = step.shapes
    arguments = shapes.trained, shapes.frozen, shapes.accumulated, shapes.batch, shapes.position
    with jax.set_mesh(step.mesh):
        traced = step.functions.accumulate.trace(*arguments)
        return traced.jaxpr, traced.lower().compile().as_text()


def gathers(jaxpr):
    """(dtype, shape) of everything that is gathered explicitly."""
    for equation in equations(jaxpr):
        value = equation.outvars[0].aval if equation.outvars else None
        whole = equation.primitive.name == "sharding_constraint" and (
            equation.params["sharding"].is_fully_replicated
        )
        if whole or equation.primitive.name == "all_gather":
            yield str(value.dtype), value.shape


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """{"METHOD MESH": the "collectives" of the accumulate program, and what it gathers}"""
    path = tmp_path_factory.mktemp("model")
    model = {
        "model_type": "olmoe",
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": L,
        "num_attention_heads": 2,
        "num_experts": E,
        "num_experts_per_tok": K,
    }
    (path / "config.json").write_text(json.dumps(model))
    result = {}
    for method, mesh in CASES:
        jaxpr, hlo = accumulate(str(path), method, mesh)
        result[f"{method} {mesh}"] = {
            "collectives": [c._asdict() for c in communication(hlo).collectives],
            "gathered": list(gathers(jaxpr)),
        }
    return result


def formula(mesh: str, densemixer: bool) -> Counter:
    """{(kind, dtype): bytes}. CPUs send bfloat16 as float32, so that every element has 4 bytes.

    Where tokens travel, the layers run in a plain scan, and what the partitioner gathers
    (attention, router) has its gradients summed on every device. Elsewhere the loop of
    model/overlap.py gathers a layer more than there are, and scatters one more.
    """
    data, fsdp, expert = MESHES[mesh]
    tokens_travel = expert > 1
    group, split = expert * TOKENS, expert if tokens_travel else 1
    gathered = EXPERTS // split if fsdp > 1 or not tokens_travel else 0
    # Embedding and loss: the tokens of all devices that share the vocabulary.
    table = fsdp * expert * TOKENS
    scattered, summed = gathered, ATTENTION + ROUTER + NORMS
    turns, more = L, 0
    if not tokens_travel:
        scattered, summed = gathered + ATTENTION + ROUTER, NORMS
        turns, more = L + 1, 1
    elements = Counter(
        {
            ("all-gather", "f32"): (2 * L + more) * (ATTENTION + ROUTER + gathered)
            + table * (2 * D + 1),
            ("all-gather", "s32"): 2 * table,
            ("reduce-scatter", "f32"): turns * scattered + 2 * table * D,
            ("all-reduce", "f32"): turns * summed + L * (2 * E + 1) + (D + 1) + 3 * table,
        }
    )
    if tokens_travel:
        elements["all-gather", "f32"] += L * group * 3 * D
        # Which tokens are padding: a byte each, once for all layers.
        elements["all-gather", "pred"] += group // 4
        elements["reduce-scatter", "f32"] += L * group * 2 * D
    if data > 1:
        elements["all-reduce", "f32"] += (turns * scattered + 2 * V * D) // fsdp
    return Counter({key: 4 * count for key, count in elements.items()})


def measured(step) -> Counter:
    return Counter({(c["kind"], c["dtype"]): c["bytes"] for c in step["collectives"]})


@pytest.mark.parametrize("mesh", MESHES)
def test_bytes_follow_the_formula(steps, mesh):
    assert measured(steps[f"densemixer {mesh}"]) == formula(mesh, densemixer=True)


@pytest.mark.parametrize("mesh", ["1x8x1", "1x2x4"])
def test_densemixer_exchanges_nothing_more(steps, mesh):
    """Its backward shares the weights or the tokens that are there for the experts' gradients."""
    added = measured(steps[f"densemixer {mesh}"])
    added.subtract(measured(steps[f"conventional {mesh}"]))
    assert not {key: size for key, size in added.items() if size}


@pytest.mark.parametrize("mesh", MESHES)
def test_no_float32_weights_travel(steps, mesh):
    """Of the gathers that the model asks for in bfloat16, before a CPU makes them float32.

    Rows of weights, as those of tokens, are D or F wide; others are a number for each token.
    """
    gathered = [(dtype, shape[-1]) for dtype, shape in steps[f"densemixer {mesh}"]["gathered"]]
    assert {("bfloat16", D), ("bfloat16", F)} <= set(gathered)
    assert not {("float32", D), ("float32", F)} & set(gathered)
