"""The golden numbers of the PyTorch reference, DenseMixer of every variant, without the processes.

The whole suite is tools/check_reference.py beside the numbers; this is what a developer runs.
"""

import argparse
import json

import jax
import numpy as np
import pytest
from helpers import load_safetensors

from convert import parity
from olmoe_jax.checkpoints.source import read_model_config
from olmoe_jax.model.decoder import load_balancing_loss
from olmoe_jax.ops.routing import RouterStatistics

VARIANTS = (
    *("base", "gqa", "norm_topk", "clip_qkv", "top4", "tied", "rope_theta", "experts64"),
    "combined",
)
QUICK = ("combined",)


def check(folder, method):
    """Compares everything that the reference computed, at its own tolerances."""
    case = json.loads((folder / method / "case.json").read_text())
    expected = {}
    for file in case["expected"]:
        expected |= load_safetensors(folder / method / file)
    arguments = argparse.Namespace(
        model=str(folder / "checkpoint"),
        batch=folder / "batch.safetensors",
        method=method,
        adapter=None,
        experts=None,
        optimizer_steps=None,
        learning_rate=0.0,
        weight_decay=0.0,
        warmup_steps=0,
    )
    with jax.default_matmul_precision("highest"):
        actual = parity.compute(arguments)
    real = load_safetensors(folder / "batch.safetensors")["attention_mask"].astype(bool)
    config = read_model_config(folder / "checkpoint")
    actual["aux_loss"] = aux_loss(actual, real, config)
    gradients = {f"grad.{name}" for name in case["trainable"]}
    assert {name for name in actual if name.startswith("grad.")} == gradients <= expected.keys()
    for name in expected.keys() - set(case["absent"]):
        kind = name.split(".")[0]
        ours, theirs = (np.asarray(tensors[name], np.float64) for tensors in (actual, expected))
        if kind in ("logits", "router_logits"):
            ours, theirs = (a.reshape(*real.shape, -1)[real] for a in (ours, theirs))
        tolerance = case["tolerances"][kind]
        limit = tolerance["rtol"] * np.abs(theirs).max() + tolerance["atol"]
        assert ours.shape == theirs.shape, name
        assert np.abs(ours - theirs).max() <= limit, name


def aux_loss(actual, real, config):
    """Ours, of the router logits that the command wrote; padding is not counted."""
    probabilities, loads = [], []
    for layer in range(config.num_layers):
        logits = actual[f"router_logits.{layer}"].astype(np.float64)[real.reshape(-1)]
        p = np.asarray(jax.nn.softmax(logits))
        chosen = np.argsort(-p, axis=1)[:, : config.num_experts_per_token]
        probabilities.append(p.sum(0))
        loads.append(np.bincount(chosen.ravel(), minlength=config.num_experts))
    statistics = RouterStatistics(np.array(loads), np.array(probabilities), None, None)
    return load_balancing_loss(statistics, config)


@pytest.mark.parametrize(
    "variant",
    [pytest.param(v, marks=[] if v in QUICK else [pytest.mark.slow]) for v in VARIANTS],
)
def test_densemixer(shared, variant):
    check(shared / "reference" / "core" / variant, "densemixer")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["conventional", "frozen"])
def test_other_methods(shared, method):
    check(shared / "reference" / "core" / "combined", method)
