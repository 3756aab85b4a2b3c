"""Merges against the golden numbers of the PyTorch reference, bit by bit where no adapter is."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from helpers import load_checkpoint_tensors, load_safetensors

from convert import merge_lora
from olmoe_jax.checkpoints.peft import ROUTER_FILE


def assert_within(actual, expected, tolerance, name):
    error = np.abs(np.asarray(actual, np.float64) - np.asarray(expected, np.float64)).max()
    limit = tolerance["rtol"] * np.abs(expected).max() + tolerance["atol"]
    assert error <= limit, f"{name}: {error:.3g} over {limit:.3g}"


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
