"""LoRA, ESFT and merges against the golden numbers of the PyTorch reference, in process.

A few cases; tools/check_reference.py runs all of them through the commands.
"""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from helpers import load_checkpoint_tensors, load_safetensors

from convert import merge_lora, parity
from olmoe_jax.checkpoints.peft import ROUTER_FILE

GRADIENTS = (
    "lora/densemixer_router_unfrozen",
    "lora/conventional_router_frozen",
    "esft/experts_only_densemixer",
    "esft/empty_layer",
    "esft/non_expert_modules",
    "esft/experts_only_tied",
)


def assert_within(actual, expected, tolerance, name):
    error = np.abs(np.asarray(actual, np.float64) - np.asarray(expected, np.float64)).max()
    limit = tolerance["rtol"] * np.abs(expected).max() + tolerance["atol"]
    assert error <= limit, f"{name}: {error:.3g} over {limit:.3g}"


@pytest.mark.slow
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(shared, tmp_path, name):
    folder = shared / "reference" / name
    case = json.loads((folder / "case.json").read_text())
    output = tmp_path / "out.safetensors"
    arguments = ["--model", folder / case["checkpoint"], "--batch", folder / case["batch"]]
    arguments += ["--method", case["method"], "--output", output]
    if case["lora"]:
        router = {"frozen": "frozen", "unfrozen": "trained"}[case["lora"]["router"]]
        arguments += ["--adapter", folder / case["lora"]["adapter"], "--router", router]
    if case["esft"]:
        experts = tmp_path / "experts.json"
        experts.write_text(json.dumps(case["esft"]))
        arguments += ["--experts", experts]
    parity.main(list(map(str, arguments)))
    ours, expected = load_safetensors(output), {}
    for file in case["expected"]:
        expected |= load_safetensors(folder / file)
    expected = {key: expected[key] for key in expected.keys() - set(case["absent"])}
    mask = load_safetensors(folder / case["batch"])["attention_mask"].astype(bool)
    compared = 0
    for key in expected:
        kind = key.split(".")[0]
        if kind == "aux_loss":
            continue
        pair = (ours[key], expected[key])
        if kind in ("logits", "router_logits"):
            pair = (part.reshape(mask.size, -1)[mask.ravel()] for part in pair)
        assert_within(*pair, case["tolerances"][kind], key)
        compared += kind == "grad"
    assert compared == sum(key.startswith("grad.") for key in expected) > 0
    trained = {key for key in ours if key.startswith("grad.")}
    assert not [key for key in trained - expected.keys() if ours[key].any()]


@pytest.mark.parametrize("name", ["merged_float32", "merged_float32_gate", "merged_bfloat16_gate"])
def test_merges(shared, tmp_path, name):
    folder = shared / "reference" / "lora" / name
    case = json.loads((folder / "case.json").read_text())
    adapter, output = tmp_path / "adapter", tmp_path / "merged"
    shutil.copytree(folder / case["lora"]["adapter"], adapter)
    if case["lora"].get("gate"):
        shutil.copyfile(folder / case["lora"]["gate"], adapter / ROUTER_FILE)
    base = folder / case["checkpoint"]
    arguments = ["--model", base, "--adapter", adapter, "--output", output]
    merge_lora.main([*map(str, arguments), "--dtype", case["dtype"]])
    dtype = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[case["dtype"]]
    merged = load_checkpoint_tensors(output)
    expected = {key: value.astype(dtype) for key, value in load_checkpoint_tensors(base).items()}
    changed = {}
    for file in case["expected"]:
        changed |= load_safetensors(folder / file)
    assert merged.keys() == expected.keys()
    for key, value in (expected | changed).items():
        if key in changed:
            actual = merged[key].astype(np.float32)
            assert_within(actual, value.astype(np.float32), case["tolerances"]["weight"], key)
        else:
            assert merged[key].tobytes() == value.tobytes(), key
