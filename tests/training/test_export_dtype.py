"""The dtype of a run's export: the base's, or train.export_dtype."""

import json

import numpy as np
import pytest
from helpers import load_checkpoint_tensors
from tiny import short_run, write_base

import olmoe_jax
from convert import to_hf


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "asked"),
    [("float16", None), pytest.param("float64", "float16", marks=pytest.mark.exhaustive)],
)
def test_a_base_in_float16_or_float64(files, tmp_path, dtype, asked):
    base = write_base(tmp_path / "base", dtype)
    changes = {"train__max_steps": 1, "train__export_dtype": asked}
    assert olmoe_jax.train(short_run(files, base, tmp_path / "run", **changes)).finished
    for name, flags in ("run/hf", None), ("again", []), ("double", ["--dtype", "float64"]):
        path = tmp_path / name
        if flags is not None:
            to_hf.main(["--checkpoint", str(tmp_path / "run"), "--output", str(path), *flags])
        expected = "float64" if flags else "float16"
        tensors = load_checkpoint_tensors(path)
        assert {str(value.dtype) for value in tensors.values()} == {expected}
        assert json.loads((path / "config.json").read_text())["torch_dtype"] == expected
        # A step moved the weights, by little.
        before = load_checkpoint_tensors(base)
        moved = [np.abs(before[key] - value.astype(float)).max() for key, value in tensors.items()]
        assert 0 < max(moved) < 0.1
