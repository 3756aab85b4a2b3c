"""Adapters that do not fit, and options that do not go together: one line, nothing written."""

import json

import numpy as np
import pytest
from helpers import assert_user_error, run_command_line, run_module
from safetensors.numpy import save_file
from tiny import BYTES, LORA, random_adapters, short_run, tiny_config, write_base

import olmoe_jax
from convert import merge_lora, to_hf
from olmoe_jax.checkpoints import directory
from olmoe_jax.checkpoints.peft import read_adapter, write_adapter
from olmoe_jax.checkpoints.safetensors_file import load
from olmoe_jax.errors import UserError
from olmoe_jax.model.lora import LoraSettings

CONFIG = tiny_config(**BYTES)
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
EXPERT = "base_model.model.model.layers.1.mlp.experts.7.gate_proj.lora_A.weight"


def make_adapter(path, config=CONFIG, lora=None, router=None, **changes):
    """Writes an adapter; `changes` are fields of adapter_config.json. Returns its directory."""
    lora = lora or LoraSettings(4, 8.0)
    path.mkdir()
    trained = {} if router is None else {"layers.moe.router": router}
    write_adapter(path, random_adapters(config, lora) | trained, lora, "base")
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return path


def edit_tensors(path, change):
    file = path / "adapter_model.safetensors"
    tensors = {name: value.copy() for name, value in load(file).items()}
    change(tensors)
    save_file(tensors, file)
    return path


def reading_error(path, config=CONFIG) -> str:
    with pytest.raises(UserError) as caught:
        read_adapter(path, config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "named", "shapes"),
    [
        (
            {"hidden_size": 48, "num_heads": 6},
            FIRST,
            "[4, 48], but this model and rank need [4, 32]",
        ),
        (
            {"num_layers": 1},
            FIRST.replace("layers.0", "layers.1"),
            "is missing; is this an adapter",
        ),
        ({"num_experts": 7}, EXPERT.replace("layers.1", "layers.0"), "is missing; is this an"),
        (
            {"intermediate_size": 24},
            FIRST.replace("self_attn.q_proj.lora_A", "mlp.experts.0.gate_proj.lora_B"),
            "[24, 4], but this model and rank need [16, 4]",
        ),
    ],
)
def test_adapter_for_another_base(tmp_path, changes, named, shapes):
    """The first tensor that does not fit is named."""
    other = tiny_config(**(BYTES | changes))
    message = reading_error(make_adapter(tmp_path / "a", other))
    assert f"tensor {named} " in message
    assert shapes in message


def test_adapter_of_a_larger_base(tmp_path):
    message = reading_error(make_adapter(tmp_path / "a", tiny_config(**BYTES, num_layers=3)))
    assert "unexpected tensor base_model.model.model.layers.2." in message


def test_rank_mismatch(tmp_path):
    """The config says another rank than the tensors have."""
    message = reading_error(make_adapter(tmp_path / "a", r=8))
    assert f"tensor {FIRST} has shape [4, 32], but this model and rank need [8, 32]" in message


def test_missing_and_unexpected_tensors(tmp_path):
    a = edit_tensors(make_adapter(tmp_path / "a"), lambda tensors: tensors.pop(EXPERT))
    assert f"tensor {EXPERT} is missing" in reading_error(a)
    name = "base_model.model.lm_head.lora_A.weight"
    b = edit_tensors(
        make_adapter(tmp_path / "b"), lambda tensors: tensors.update({name: np.zeros((4, 32))})
    )
    assert f"unexpected tensor {name}" in reading_error(b)
    c = edit_tensors(make_adapter(tmp_path / "c"), dict.clear)
    assert "no tensor of q, k, v, o, gate, up, down projections" in reading_error(c)


def test_missing_files(tmp_path):
    a, b, c = (make_adapter(tmp_path / name) for name in "abc")
    (a / "adapter_model.safetensors").unlink()
    (b / "adapter_config.json").unlink()
    (c / "adapter_config.json").write_text("{")
    assert "a/adapter_model.safetensors: no such file" in reading_error(a)
    assert "b: holds no adapter_config.json; write the directory of a" in reading_error(b)
    assert "c/adapter_config.json: not JSON" in reading_error(c)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"peft_type": "IA3"}, "not a LoRA adapter (peft_type 'IA3')"),
        ({"r": 0}, "r is 0; it must be a positive number"),
        ({"r": "4"}, "r is '4'; it must be"),
        ({"lora_alpha": None}, "lora_alpha is None; it must be"),
        ({"use_dora": True}, "use_dora is set, but only plain LoRA is read; merge this adapter"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern is set, but only"),
        ({"alpha_pattern": {"layers.0": 8}}, "alpha_pattern is set, but only"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set, but only"),
        ({"layers_to_transform": [0]}, "layers_to_transform is set, but only"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is set, but only"),
        ({"lora_bias": True}, "lora_bias is set, but only"),
        ({"bias": "all"}, "bias is 'all'; only adapters with bias none are read"),
    ],
)
def test_unsupported_features(tmp_path, changes, expected):
    path = make_adapter(tmp_path / "a", **changes)
    assert reading_error(path).startswith(f"{path / 'adapter_config.json'}: {expected}")


def test_router_of_another_base(tmp_path):
    path = make_adapter(tmp_path / "a", router=np.zeros((2, 32, 4), np.float32))
    message = reading_error(path)
    assert "router.safetensors: tensor model.layers.0.mlp.gate.weight has shape [4, 32]" in message
    assert "need [8, 32]" in message
    path = make_adapter(tmp_path / "b", router=np.zeros((1, 32, 8), np.float32))
    assert "tensor model.layers.1.mlp.gate.weight is missing" in reading_error(path)


def merge_error(base, adapter, output) -> str:
    arguments = ["--model", str(base), "--adapter", str(adapter), "--output", str(output)]
    with pytest.raises(UserError) as caught:
        merge_lora.main(arguments)
    assert not output.exists()
    return str(caught.value)


def test_merging(base, tmp_path):
    other = make_adapter(tmp_path / "other", tiny_config(**BYTES, num_layers=3))
    assert "unexpected tensor" in merge_error(base, other, tmp_path / "out")
    missing = tmp_path / "nothing"
    assert f"{missing}: no such directory" in merge_error(base, missing, tmp_path / "out")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "empty: holds no adapter_config.json" in merge_error(base, empty, tmp_path / "out")
    trained = tmp_path / "trained"
    trained.mkdir()
    name = "model.layers.5.mlp.experts.0.gate_proj.weight"
    save_file({name: np.zeros((16, 32), np.float32)}, trained / "trained.safetensors")
    message = merge_error(base, trained, tmp_path / "out")
    assert f"tensor {name} [16, 32] is not one of this base's; is it of another model?" in message
    good = make_adapter(tmp_path / "good")
    full = write_base(tmp_path / "full")
    arguments = ["--model", str(base), "--adapter", str(good), "--output", str(full)]
    with pytest.raises(UserError, match="exists already; write another --output or remove it"):
        merge_lora.main(arguments)


def test_merging_in_a_process(base, tmp_path):
    adapter = make_adapter(tmp_path / "a", r=8)
    arguments = ("--model", base, "--adapter", adapter, "--output", tmp_path / "out")
    assert_user_error(run_module("convert.merge_lora", *arguments), adapter, FIRST)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_adapter_of_a_hub_id_is_downloaded_whole(monkeypatch, tmp_path):
    """The download includes adapter_config.json, which is not among a model's files."""
    import fnmatch

    import huggingface_hub

    files = ["adapter_config.json", "adapter_model.safetensors", "router.safetensors"]
    files += ["expert_config.json", "trained.safetensors"]

    def snapshot_download(name, allow_patterns):
        assert name == "someone/adapter"
        for file in files:
            assert any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns), file
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert directory.resolve("someone/adapter") == tmp_path


def training_error(config) -> str:
    with pytest.raises(UserError) as caught:
        olmoe_jax.train(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("lora", "expected"),
    [
        # The same alpha / rank, but not the same rank.
        (LoraSettings(8, 16.0), "has rank 8, alpha 16, targets q,k,v,o,gate,up,down; set"),
        (LoraSettings(4, 4.0), "has rank 4, alpha 4, targets q,k,v,o,gate,up,down; set"),
        (LoraSettings(4, 8.0, targets=("q", "up")), "has rank 4, alpha 8, targets q,up; set"),
    ],
)
def test_start_from_an_adapter_of_another_size(run_files, base, tmp_path, lora, expected):
    adapter = make_adapter(tmp_path / "adapter", lora=lora)
    output = tmp_path / "out"
    config = short_run(
        run_files, base, output, method__name="frozen", method__adapter_path=str(adapter), **LORA
    )
    message = training_error(config)
    assert message.startswith(f"method.adapter_path={adapter}: {expected} method.lora_rank")
    assert not output.exists()


def test_start_from_an_adapter_that_does_not_fit(run_files, base, tmp_path):
    output = tmp_path / "out"

    def error(adapter, **changes):
        options = {"method__adapter_path": str(adapter)} | LORA | changes
        message = training_error(short_run(run_files, base, output, **options))
        assert not output.exists()
        return message

    other = make_adapter(tmp_path / "other", tiny_config(**BYTES, num_layers=1))
    assert "layers.1.self_attn.q_proj.lora_A.weight is missing" in error(other)
    assert "nothing: no such directory" in error(tmp_path / "nothing")
    router = make_adapter(tmp_path / "router", router=np.zeros((2, 32, 8), np.float32))
    assert "holds a trained router, but method.name=frozen keeps the base's; write" in error(
        router, method__name="frozen"
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"method__experts_path": "e.json"},
            "method.experts_path=e.json: only for method.name=esft_gate or "
            "esft_token, not densemixer; write",
        ),
        (
            {"method__esft_top_p": 0.5},
            "method.esft_top_p=0.5: only for method.name=esft_gate or esft_token",
        ),
        (
            {"method__esft_densemixer": True},
            "method.esft_densemixer=true: only for method.name=esft_gate",
        ),
        (
            {"method__esft_train_head": False},
            "method.esft_train_head=false: only for method.name=esft_gate",
        ),
        (
            {"method__name": "esft_gate", "method__lora_rank": 4},
            "method.lora_rank=4: only for method.name=frozen, conventional "
            "or densemixer, not esft_gate",
        ),
        (
            {"method__name": "esft_gate", "method__router_gradient_experts": 4},
            "method.router_gradient_experts=4: with esft_gate, only read "
            "with method.esft_densemixer=true",
        ),
        (
            {
                "method__name": "esft_gate",
                "method__experts_path": "e.json",
                "method__esft_top_p": 0.3,
            },
            "method.esft_top_p=0.3: not read with method.experts_path, which says what trains",
        ),
        ({"method__adapter_path": "a"}, "method.adapter_path=a: only read with method.lora_rank"),
        ({"method__lora_targets": "q"}, "method.lora_targets=q: only read with method.lora_rank"),
        (
            {"method__lora_rank": 4, "method__lora_targets": "q,router"},
            "method.lora_targets=q,router: must be some of q,k,v,o,gate,up,down, separated by",
        ),
        (
            {"method__lora_rank": 4, "method__lora_targets": ""},
            "method.lora_targets=: must be some of q,k,v,o,gate,up,down",
        ),
        ({"method__lora_rank": 0}, "method.lora_rank=0: must be from 1 to 65536"),
        ({"method__lora_rank": 4, "method__lora_dropout": 1.0}, "method.lora_dropout=1.0: must be"),
        ({"method__name": "esft_gate", "method__esft_top_p": 1.1}, "method.esft_top_p=1.1: must"),
        ({"method__name": "esft_token", "method__esft_top_p": 0.0}, "method.esft_top_p=0.0: must"),
    ],
)
def test_options_that_do_not_go_together(run_files, base, tmp_path, changes, expected):
    output = tmp_path / "out"
    assert training_error(short_run(run_files, base, output, **changes)).startswith(expected)
    assert not output.exists()


@pytest.mark.slow
def test_training_mistake_in_a_process(run_files, tmp_path):
    """experts_path of another model: exit code 2, one line, nothing written."""
    experts = tmp_path / "experts.json"
    experts.write_text(json.dumps({"experts": {"1": [0], "2": [99]}}))
    changes = {"method__name": "esft_gate", "method__experts_path": str(experts)}
    result = run_command_line("train.py", *run_files.arguments(tmp_path / "out", **changes))
    assert_user_error(result, experts, "layer 2 has [99]; write different ids from 0 to 7")
    assert [path.name for path in tmp_path.iterdir()] == ["experts.json"]


def test_to_hf_adapter_of_a_base(base, tmp_path):
    arguments = ["--checkpoint", str(base), "--output", str(tmp_path / "out"), "--adapter"]
    with pytest.raises(UserError, match="--adapter needs the directory of a LoRA or ESFT run"):
        to_hf.main(arguments)
    assert not (tmp_path / "out").exists()
