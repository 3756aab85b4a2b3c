"""Weights that are NaN or infinite: refused by the name of their tensor, written if asked for."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from helpers import load_checkpoint_tensors, message_of
from tiny import hf_tensors, random_adapters, tiny_config, write_hf_checkpoint, write_tensors

from convert import from_hf, merge_lora, to_hf
from olmoe_jax.checkpoints.huggingface import HFCheckpoint
from olmoe_jax.checkpoints.opening import RunCheckpoint, open_source
from olmoe_jax.checkpoints.peft import write_adapter
from olmoe_jax.checkpoints.safetensors_file import save
from olmoe_jax.model.config import LoraSettings

CONFIG = tiny_config()
EXPERT = "model.layers.1.mlp.experts.2.down_proj.weight"
LORA = LoraSettings(2, 4.0)


@pytest.fixture
def broken(tmp_path):
    """Changes one number of a sound model; returns its directory."""

    def apply(name, value):
        write_hf_checkpoint(tmp_path / "model", CONFIG)
        tensors = hf_tensors(CONFIG)
        tensors[name] = tensors[name].copy()
        tensors[name][(-1,) * tensors[name].ndim] = value
        write_tensors(tmp_path / "model", tensors)
        return tmp_path / "model"

    return apply


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("name", ["model.norm.weight", EXPERT])
@pytest.mark.parametrize(("command", "flag"), [(from_hf, "--model"), (to_hf, "--checkpoint")])
def test_a_model(broken, tmp_path, command, flag, name, value):
    model, output = broken(name, value), tmp_path / "out"
    arguments = [flag, str(model), "--output", str(output)]
    assert f"tensor {name} holds NaN or infinite values" in message_of(command.main, arguments)
    assert not output.exists()
    command.main([*arguments, "--allow_nonfinite"])
    assert open_source(str(output)).config.num_layers == CONFIG.num_layers


def test_a_cast_to_infinity(broken, tmp_path):
    """The largest float32 is infinite in bfloat16."""
    model = broken(EXPERT, np.finfo(np.float32).max)
    arguments = ["--checkpoint", str(model), "--output", str(tmp_path / "out")]
    assert f"tensor {EXPERT} " in message_of(to_hf.main, [*arguments, "--dtype", "bfloat16"])
    to_hf.main(arguments)


def test_an_adapter(tmp_path):
    write_hf_checkpoint(tmp_path / "model", CONFIG)
    adapters = random_adapters(CONFIG, LORA)
    adapters["layers.moe.experts.lora.up_b"][1, 3, 0, 0] = np.inf
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", adapters, LORA, "base")
    arguments = ["--model", str(tmp_path / "model"), "--adapter", str(tmp_path / "adapter")]
    arguments += ["--output", str(tmp_path / "out")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it would be a second line
        message = message_of(merge_lora.main, arguments)
        assert "tensor model.layers.1.mlp.experts.3.up_proj.weight holds" in message
        merge_lora.main([*arguments, "--allow_nonfinite"])
    assert not all(np.isfinite(t).all() for t in load_checkpoint_tensors(tmp_path / "out").values())


@pytest.mark.parametrize("kind", ["lora", "esft"])
def test_a_loss_of_the_run_below_an_adapter(tmp_path, monkeypatch, kind):
    """A run's weights are finite where it skipped the updates; its loss says what it is worth."""

    class Run(HFCheckpoint):
        path, step, check_losses = tmp_path / "run", 4, RunCheckpoint.check_losses
        checkpoint = path / "checkpoints" / "4"

    write_hf_checkpoint(tmp_path / "model", CONFIG)
    (Run.checkpoint / "report").mkdir(parents=True)
    (Run.checkpoint / "report" / "metadata").write_text(json.dumps({"nonfinite": ["loss"]}))
    monkeypatch.setattr(merge_lora, "open_source", lambda path: Run(Path(path)))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    if kind == "lora":
        write_adapter(adapter, random_adapters(CONFIG, LORA), LORA, "base")
    else:
        save(adapter / "trained.safetensors", {EXPERT: np.ones((32, 16), np.float32)})
    arguments = ["--model", str(tmp_path / "model"), "--adapter", str(adapter)]
    arguments += ["--output", str(tmp_path / "out")]
    message = message_of(merge_lora.main, arguments)
    assert message.startswith(f"{Run.path}: loss is not finite at step 4; export another step")
    assert not (tmp_path / "out").exists()
    merge_lora.main([*arguments, "--allow_nonfinite"])
