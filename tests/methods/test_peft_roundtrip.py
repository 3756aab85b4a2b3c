"""Adapters go to PEFT and come from it, with the same logits; merges agree."""

import json
import shutil

import jax
import numpy as np
import pytest
from helpers import (
    assert_close,
    assert_same_bits,
    load_checkpoint_tensors,
    load_safetensors,
    message_of,
    relative_error,
    run_module,
)
from peft_logits import CONFIG, TOKENS, our_logits, torch_base, torch_logits, with_peft
from safetensors.numpy import save_file
from tiny import LORA, base_weights, make_model, random_adapters, short_run

import olmoe_jax
from convert import merge_lora, to_hf
from eval.backends import check_backend
from olmoe_jax.checkpoints.huggingface import HFCheckpoint
from olmoe_jax.checkpoints.peft import ROUTER_FILE, read_adapter, to_peft, write_adapter
from olmoe_jax.model.lora import TARGETS, LoraSettings
from olmoe_jax.model.parameters import ROUTER
from olmoe_jax.parallel.sharding import make_mesh
from olmoe_jax.training.base_model import open_model
from olmoe_jax.training.parameters import initial_parameters

PREFIX = "base_model.model.model.layers"


@pytest.fixture(scope="module")
def run(run_files, base, tmp_path_factory):
    """A tiny DenseMixer LoRA run: adapters of all seven targets and a trained router."""
    output = tmp_path_factory.mktemp("runs") / "lora"
    options = {"method__name": "densemixer", "optimizer__learning_rate": 0.02}
    options |= {"train__checkpoint_every": 2} | LORA
    result = olmoe_jax.train(short_run(run_files, base, output, **options))
    assert result.finished
    return output


@pytest.mark.slow
def test_our_adapter_in_peft(run, base):
    adapter = run / "adapter"
    model = with_peft(base, adapter)
    expected = torch_logits(model)
    assert_close(our_logits(base, adapter), expected)
    # The adapter matters, all of it: not the base's logits, nor those without the router.
    assert relative_error(torch_logits(torch_base(base)), expected) > 1e-3
    lora, adapters = read_adapter(adapter, CONFIG)
    assert all(value.any() for value in adapters.values())
    del adapters[ROUTER]
    without = make_model(CONFIG, base_weights(base) | adapters, lora=lora)(TOKENS)
    assert relative_error(without, expected) > 1e-4


@pytest.mark.slow
def test_merged_as_peft_merges(run, base, tmp_path):
    """The command writes what merge_and_unload saves, tensor by tensor."""
    merge_lora.main(
        ["--model", str(base), "--adapter", str(run / "adapter"), "--output", str(tmp_path / "m")]
    )
    with_peft(base, run / "adapter").merge_and_unload().save_pretrained(tmp_path / "peft")
    ours, theirs = (load_checkpoint_tensors(tmp_path / name) for name in ("m", "peft"))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert relative_error(ours[name], value) <= 1e-6, name
    assert_close(torch_logits(torch_base(tmp_path / "m")), our_logits(base, run / "adapter"))


@pytest.mark.slow
def test_export_is_what_trained(run, base, tmp_path):
    """The run, its adapter merged by the command, and convert.to_hf of the run: the same bytes."""
    to_hf.main(["--checkpoint", str(run), "--output", str(tmp_path / "merged")])
    to_hf.main(["--checkpoint", str(run), "--output", str(tmp_path / "adapter"), "--adapter"])
    merge_lora.main(
        [
            *("--model", str(base)),
            *("--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "again")),
        ]
    )
    merged = load_checkpoint_tensors(tmp_path / "merged")
    assert_same_bits(load_checkpoint_tensors(tmp_path / "again"), merged)
    for file in ("adapter_model.safetensors", "adapter_config.json", ROUTER_FILE, "tokenizer.json"):
        exported = (tmp_path / "adapter" / file).read_bytes()
        assert exported == (run / "adapter" / file).read_bytes(), file
    # Of the base, what trained differs and nothing else.
    before = load_checkpoint_tensors(base)
    changed = {name for name in before if before[name].tobytes() != merged[name].tobytes()}
    assert changed == {
        name for name in before if "_proj." in name or name.endswith("mlp.gate.weight")
    }


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["", "adapter"])
def test_the_adapter_of_the_run_that_is_opened(run, base, run_files, tmp_path, adapter):
    """A run is opened with its adapter merged, which would count twice."""
    own, out = str(run / adapter), tmp_path / "out"
    config = short_run(run_files, run, out, method__adapter_path=own, **LORA)
    merge = ["--model", str(run), "--adapter", own, "--output", str(out)]
    for refused in (
        lambda: merge_lora.main(merge),
        lambda: olmoe_jax.from_pretrained(run, adapter=own),
        lambda: check_backend("jax", str(run), own),
        lambda: olmoe_jax.train(config),
    ):
        message = message_of(refused)
        assert message.startswith(f"{run}: has its adapter merged already; leave {own} out, or")
        assert f"the run's base, {base}, in" in message
    assert not out.exists()


@pytest.mark.slow
def test_step_of_a_run(run, tmp_path):
    """--step exports an earlier checkpoint's adapter."""
    to_hf.main(
        ["--checkpoint", str(run), "--output", str(tmp_path / "a"), "--adapter", "--step", "2"]
    )
    early, last = (
        load_safetensors(path / "adapter_model.safetensors")
        for path in (tmp_path / "a", run / "adapter")
    )
    assert early.keys() == last.keys()
    assert any((early[name] != last[name]).any() for name in last)


@pytest.mark.slow
def test_key_names(run):
    """PEFT, vLLM and SGLang look for a module's full name, then lora_A or lora_B."""
    tensors = load_safetensors(run / "adapter" / "adapter_model.safetensors")
    expected = {}
    for layer in range(2):
        for name, (width, out) in {
            **dict.fromkeys(("q", "o"), (32, 32)),
            **dict.fromkeys(("k", "v"), (32, 16)),
        }.items():
            module = f"{PREFIX}.{layer}.self_attn.{name}_proj"
            expected[f"{module}.lora_A.weight"] = (4, width)
            expected[f"{module}.lora_B.weight"] = (out, 4)
        for expert in range(8):
            for name, (width, out) in {"gate": (32, 16), "up": (32, 16), "down": (16, 32)}.items():
                module = f"{PREFIX}.{layer}.mlp.experts.{expert}.{name}_proj"
                expected[f"{module}.lora_A.weight"] = (4, width)
                expected[f"{module}.lora_B.weight"] = (out, 4)
    assert {name: value.shape for name, value in tensors.items()} == expected
    assert f"{PREFIX}.1.mlp.experts.7.gate_proj.lora_A.weight" in tensors
    assert {value.dtype for value in tensors.values()} == {np.dtype(np.float32)}
    routers = load_safetensors(run / "adapter" / ROUTER_FILE)
    assert {name: value.shape for name, value in routers.items()} == {
        f"model.layers.{layer}.mlp.gate.weight": (8, 32) for layer in range(2)
    }


@pytest.mark.slow
def test_adapter_config(run, base):
    """vLLM refuses an adapter whose lora_dropout is not 0, or with modules_to_save."""
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": 4,
        "lora_alpha": 8.0,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "target_modules": [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    assert (run / "adapter" / "tokenizer.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "targets",
    [TARGETS, ("gate", "up", "down"), pytest.param(("q", "v"), marks=pytest.mark.exhaustive)],
)
def test_per_expert_adapter_in_both(base, tmp_path, targets):
    """Adapters with random B agree with PEFT, whatever the targets."""
    lora = LoraSettings(4, 6.0, targets=targets)
    adapters = random_adapters(CONFIG, lora)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_adapter(adapter, adapters, lora, str(base))
    settings, again = read_adapter(adapter, CONFIG)
    assert (settings.rank, settings.targets) == (4, targets)
    assert settings.scale == lora.scale
    assert_same_bits(again, adapters)
    expected = torch_logits(with_peft(base, adapter))
    assert_close(our_logits(base, adapter), expected)
    assert relative_error(torch_logits(torch_base(base)), expected) > 0.01


@pytest.mark.slow
def test_router_and_dtype(run, base, tmp_path):
    """The router replaces the base's; --dtype rounds the base, then the sum."""
    output = tmp_path / "merged"
    code, _, stderr = run_module(
        *("convert.merge_lora", "--model", base, "--adapter", run / "adapter"),
        *("--output", output, "--dtype", "bfloat16"),
    )
    assert code == 0, stderr
    ours = load_checkpoint_tensors(output)
    assert {str(value.dtype) for value in ours.values()} == {"bfloat16"}
    lora, parameters = read_adapter(run / "adapter", CONFIG)
    peft = dict(to_peft(parameters, lora))
    for name, value in load_checkpoint_tensors(base).items():
        rounded = value.astype(ours[name].dtype)
        if name.endswith("mlp.gate.weight"):
            rounded = parameters[ROUTER][int(name.split(".")[2])].T.astype(rounded.dtype)
        elif "_proj." in name:
            module = "base_model.model." + name.removesuffix(".weight")
            a, b = (peft[f"{module}.lora_{part}.weight"] for part in "AB")
            exact = rounded.astype(np.float64) + 2.0 * b.astype(np.float64) @ a
            # One rounding of bfloat16 (8 bits) of what is exact.
            error = np.abs(ours[name].astype(np.float64) - exact)
            assert (error <= np.abs(exact) * 2**-8 + 1e-7).all(), name
            continue
        assert ours[name].tobytes() == np.ascontiguousarray(rounded).tobytes(), name
    config = json.loads((output / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"


@pytest.mark.slow
def test_training_starts_from_an_adapter(run, run_files, base, tmp_path):
    """A run starts with the numbers of the adapter and its router: the same logits."""
    adapter = tmp_path / "adapter"
    shutil.copytree(run / "adapter", adapter)
    lora, parameters = read_adapter(adapter, CONFIG)
    config = short_run(
        run_files,
        base,
        tmp_path / "out",
        method__name="conventional",
        method__adapter_path=str(adapter),
        **LORA,
    )
    mesh = make_mesh(devices=jax.devices()[:1])
    trained, frozen = jax.device_get(initial_parameters(config, open_model(config), mesh))
    assert_same_bits(trained, parameters)
    model = make_model(CONFIG, trained | frozen, lora=lora)
    assert_close(model(TOKENS), torch_logits(with_peft(base, adapter)))


def test_shared_adapter(shared):
    """The adapter that PEFT wrote for the golden numbers, on its base."""
    folder = shared / "reference" / "lora"
    config = HFCheckpoint(folder / "checkpoint").config
    lora, adapters = read_adapter(folder / "adapter", config)
    assert (lora.rank, lora.alpha, lora.targets) == (4, 8, TARGETS)
    stored = load_safetensors(folder / "adapter" / "adapter_model.safetensors")
    assert_same_bits(
        {name: np.ascontiguousarray(value) for name, value in to_peft(adapters, lora)}, stored
    )


def test_stored_in_half_precision(base, tmp_path):
    """Adapters in bfloat16 or float16 files are read as float32."""
    lora = LoraSettings(4, 8.0)
    adapters = random_adapters(CONFIG, lora)
    write_adapter(tmp_path, adapters, lora, str(base))
    tensors = {
        name: np.ascontiguousarray(value).astype(np.float16)
        for name, value in to_peft(adapters, lora)
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    _, again = read_adapter(tmp_path, CONFIG)
    for name, value in adapters.items():
        np.testing.assert_array_equal(again[name], value.astype(np.float16).astype(np.float32))
