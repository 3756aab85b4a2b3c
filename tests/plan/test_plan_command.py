"""The command `python -m olmoe_jax.plan`."""

import json
import subprocess
import sys

import pytest
from helpers import ROOT, assert_user_error, run_module

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


@pytest.mark.parametrize("end", ["pass", "os.abort()", "raise SystemExit('last')"])
def test_lines_that_are_no_errors_are_not_shown(end):
    """All others are, what a compiler writes before it aborts too."""
    script = f"""
import os
from olmoe_jax.plan.__main__ import without_lines
with without_lines("base limit"):
    for line in (b"first", b"(7) exceeds the base limit (5). This", b"unfinished"):
        os.write(2, line + b"\\n")
    {end}
os.write(2, b"last")
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    said = done.stderr.splitlines()
    assert said[:2] == ["first", "unfinished"]
    assert said[2:] == ([] if "abort" in end else ["last"])


@pytest.mark.parametrize("topology", ["h200:8", "h100", "h100:0", "v5e:3x5", "cpu:eight"])
def test_wrong_topologies_are_one_line(topology):
    assert_user_error(run_module("olmoe_jax.plan", *CONFIG, "--topology", topology), topology)


def test_unknown_model_is_one_line():
    path = "--config.model.path=someone/model"
    result = run_module("olmoe_jax.plan", *CONFIG, path, "--topology=cpu:8")
    assert_user_error(result, "someone/model", "config.json")
