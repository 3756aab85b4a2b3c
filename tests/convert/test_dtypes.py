"""Bases and adapters in float16 and float64, and of several dtypes: read, merged, exported."""

import json

import numpy as np
import pytest
import safetensors.numpy
from helpers import assert_same_bits, load_checkpoint_tensors, message_of, write_json
from tiny import (
    hf_config,
    hf_tensors,
    random_adapters,
    tiny_config,
    write_hf_checkpoint,
    write_tensors,
)

from convert import from_hf, merge_lora, to_hf
from olmoe_jax.checkpoints.export import export_hf
from olmoe_jax.checkpoints.huggingface import DTYPES, HFCheckpoint
from olmoe_jax.checkpoints.peft import to_peft, write_adapter
from olmoe_jax.model.config import LoraSettings

CONFIG = tiny_config()
LORA = LoraSettings(2, 4.0, targets=("q", "down"))
DOWN = "model.layers.1.mlp.experts.2.down_proj.weight"


def mixed_tensors():
    """Returns tensors whose dtypes differ from weight to weight."""
    kinds = {"norm": "float32", "experts": "float16", "embed": "float64"}
    return {
        name: value.astype(
            next((d for kind, d in kinds.items() if kind in name), DTYPES["bfloat16"])
        )
        for name, value in hf_tensors(CONFIG).items()
    }


@pytest.mark.parametrize("dtype", ["float16", "float64", "mixed"])
def test_conversions_keep_every_bit(tmp_path, dtype):
    if dtype == "mixed":
        write_tensors(tmp_path / "model", mixed_tensors())
        write_json(tmp_path / "model" / "config.json", hf_config(CONFIG))
    else:
        write_hf_checkpoint(tmp_path / "model", CONFIG, dtype=dtype)
    from_hf.main(["--model", str(tmp_path / "model"), "--output", str(tmp_path / "ours")])
    to_hf.main(["--checkpoint", str(tmp_path / "ours"), "--output", str(tmp_path / "theirs")])
    expected = load_checkpoint_tensors(tmp_path / "model")
    assert_same_bits(load_checkpoint_tensors(tmp_path / "theirs"), expected)


@pytest.mark.parametrize("base_dtype", ["float16", "float64", "bfloat16"])
@pytest.mark.parametrize("adapter_dtype", ["float16", "float64"])
def test_merged(tmp_path, base_dtype, adapter_dtype):
    """The sum is float32; it is rounded once, to the base's dtype."""
    before = write_hf_checkpoint(tmp_path / "model", CONFIG, dtype=base_dtype)
    adapters, adapter = random_adapters(CONFIG, LORA), tmp_path / "adapter"
    adapter.mkdir()
    write_adapter(adapter, adapters, LORA, "base")
    stored = {
        name: np.ascontiguousarray(value).astype(adapter_dtype)
        for name, value in to_peft(adapters, LORA)
    }
    safetensors.numpy.save_file(stored, adapter / "adapter_model.safetensors")
    arguments = ["--model", str(tmp_path / "model"), "--adapter", str(adapter)]
    merge_lora.main([*arguments, "--output", str(tmp_path / "out")])
    after = load_checkpoint_tensors(tmp_path / "out")
    for name, value in before.items():
        module = "base_model.model." + name.removesuffix(".weight")
        expected = value
        if f"{module}.lora_A.weight" in stored:
            a, b = (stored[f"{module}.lora_{part}.weight"].astype("float32") for part in "AB")
            expected = value.astype(np.float32) + np.float32(LORA.scale) * (b @ a)
        np.testing.assert_allclose(
            after[name].astype(np.float64), expected.astype(value.dtype).astype(np.float64), 1e-2
        )
        assert after[name].dtype == value.dtype
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == base_dtype


def test_what_float16_cannot_hold(tmp_path, monkeypatch, capsys):
    """Refused where the user names the dtype; else the export is in float32, and a line says so."""
    write_hf_checkpoint(tmp_path / "model", CONFIG)
    tensors = hf_tensors(CONFIG)
    tensors[DOWN] = tensors[DOWN] * np.float32(1e6)
    write_tensors(tmp_path / "model", tensors)
    arguments = ["--checkpoint", str(tmp_path / "model"), "--output", str(tmp_path / "out")]
    message = message_of(to_hf.main, [*arguments, "--dtype", "float16"])
    assert message == (
        f"tensor {DOWN} has numbers that are too large for float16; write --dtype float32"
    )
    assert not (tmp_path / "out").exists()
    for own, reason in (
        ("float16", f"tensor {DOWN} has numbers that are too large for float16"),
        ("auto", "dtype auto of the base's config.json is unknown"),
    ):
        monkeypatch.setattr(HFCheckpoint, "export_dtype", lambda self, own=own: own)
        export_hf(HFCheckpoint(tmp_path / "model"), tmp_path / own, None)
        assert f"note: exporting in float32, since {reason}\n" in capsys.readouterr().out
        assert_same_bits(load_checkpoint_tensors(tmp_path / own), tensors)
        assert json.loads((tmp_path / own / "config.json").read_text())["torch_dtype"] == "float32"


def test_weights_that_are_no_floats(tmp_path):
    write_hf_checkpoint(tmp_path, CONFIG)
    tensors = hf_tensors(CONFIG)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)
    write_tensors(tmp_path, tensors)
    assert message_of(HFCheckpoint, tmp_path).endswith(
        "tensor model.norm.weight is int8; weights are read in float32, bfloat16, float16, float64"
    )
