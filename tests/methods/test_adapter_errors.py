"""Adapters that do not fit: one line, nothing written."""

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import assert_same_bits, assert_user_error, run_module, write_json
from safetensors.numpy import save_file
from tiny import BYTES, LORA, random_adapters, short_run, tiny_config, write_base
from training.interruptions import training_error

from convert import from_hf, merge_lora, to_hf
from olmoe_jax.checkpoints import directory
from olmoe_jax.checkpoints.fingerprint import adapter_fingerprint
from olmoe_jax.checkpoints.huggingface import HFCheckpoint
from olmoe_jax.checkpoints.opening import RunCheckpoint, check_adapter
from olmoe_jax.checkpoints.peft import read_adapter, write_adapter
from olmoe_jax.checkpoints.peft_config import HISTORY, AdapterConfig
from olmoe_jax.checkpoints.safetensors_file import load
from olmoe_jax.errors import UserError
from olmoe_jax.model.lora import LoraSettings

CONFIG = tiny_config(**BYTES)
FIRST = "model.layers.0.self_attn.q_proj"
EXPERT = "model.layers.1.mlp.experts.7.gate_proj"
PREFIX = "base_model.model."


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
    ("changes", "named", "expected"),
    [
        (
            {"hidden_size": 48, "num_heads": 6},
            FIRST,
            ": lora_A has shape [4, 48] and lora_B [48, 4], but this model and rank 4 need [4, 32]",
        ),
        ({"num_layers": 1}, FIRST.replace("layers.0", "layers.1"), ".lora_A.weight is missing"),
        (
            {"num_experts": 7},
            EXPERT.replace("layers.1", "layers.0"),
            ".lora_A.weight is missing, but adapter_config.json names this matrix",
        ),
        (
            {"intermediate_size": 24},
            FIRST.replace("self_attn.q_proj", "mlp.experts.0.gate_proj"),
            ": lora_A has shape [4, 32] and lora_B [24, 4], but this model and rank 4 need [4, 32]",
        ),
        ({"num_layers": 3}, "adapts model.layers.2.", "of 2 layers and 8 experts; is it of"),
    ],
)
def test_adapter_for_another_base(tmp_path, changes, named, expected):
    """The first matrix that does not fit is named."""
    message = reading_error(make_adapter(tmp_path / "a", tiny_config(**(BYTES | changes))))
    assert named in message
    assert expected in message


def test_rank_mismatch(tmp_path):
    """The config says another rank than the tensors have."""
    message = reading_error(make_adapter(tmp_path / "a", r=8))
    assert f"{FIRST}: lora_A has shape [4, 32] and lora_B [32, 4]" in message
    assert "rank 8 need [8, 32] and [32, 8]" in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop(f"{PREFIX}{EXPERT}.lora_A.weight"), f"{EXPERT}.lora_A.weight is missing"),
        (lambda t: t.pop(f"{PREFIX}{EXPERT}.lora_B.weight"), f"{EXPERT}.lora_B.weight is missing"),
        (
            lambda t: [t.pop(name) for name in list(t) if EXPERT in name],
            f"{EXPERT}.lora_A.weight is missing, but adapter_config.json names this matrix",
        ),
        (
            lambda t: t.update({f"{PREFIX}lm_head.lora_{part}.weight": t[part] for part in "AB"}),
            "adapts lm_head, but adapters are read of the projections and the router (mlp.gate) of",
        ),
        (
            lambda t: t.update(
                {f"{PREFIX}model.{{x}}.lora_{part}.weight": t[part] for part in "AB"}
            ),
            "adapts {x}, but adapters are read of the projections and the router (mlp.gate) of",
        ),
        (
            lambda t: t.update({f"{{}}.{{0.a}}.mlp.experts.lora_{p}.weight": t[p] for p in "AB"}),
            "adapts {}.{0.a}.mlp.experts, but adapters are read of",
        ),
        (
            lambda t: (
                t.update({f"{PREFIX}model.layers.0.mlp.gate.lora_A.weight": t["A"]})
                or t.update({"layers.0.mlp.gate.lora_B.weight": np.zeros((8, 4))})
            ),
            "adapts model.layers.0.mlp.gate, but adapter_config.json does not name this matrix",
        ),
        (
            lambda t: t.update({f"_orig_mod.{FIRST}.lora_A.weight": t["A"]}),
            f"has two tensors lora_A of {FIRST}; remove one",
        ),
        (
            lambda t: t.update({f"{PREFIX}{FIRST}.lora_magnitude_vector": t["A"]}),
            f"unexpected tensor {PREFIX}{FIRST}.lora_magnitude_vector: only lora_A and lora_B are",
        ),
        (
            lambda t: t.update({f"{PREFIX}{FIRST}.lora_A.weight": np.array(1.0, np.float32)}),
            f"{FIRST}: lora_A has shape [] and",
        ),
        (
            lambda t: t.update(
                {f"model.layers.0.mlp.experts.lora_{part}.weight": t[part] for part in "AB"}
            ),
            "model.layers.0.mlp.experts: lora_A has shape [4, 32] and lora_B [4, 32], but this "
            "model and rank 4 need [32, 32] and [32, 32]",
        ),
        (dict.clear, "holds no tensor"),
    ],
)
def test_missing_and_unexpected_tensors(tmp_path, change, expected):
    def changed(tensors):
        spare = dict.fromkeys("AB", np.zeros((4, 32), np.float32))
        tensors |= spare
        change(tensors)
        for part in spare:
            tensors.pop(part, None)

    assert expected in reading_error(edit_tensors(make_adapter(tmp_path / "a"), changed))


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
        ({"peft_type": "IA3"}, 'not a LoRA adapter (peft_type "IA3"); write'),
        ({"peft_type": None}, "not a LoRA adapter (peft_type null); write"),
        ({"r": 0}, "r is 0; it must be greater than 0"),
        ({"r": 2**70}, "r is 1180591620717411303424; it must"),
        ({"r": "4"}, 'r is "4"; it must be a whole number'),
        ({"lora_alpha": None}, "lora_alpha is null; it must be a number"),
        ({"rank_pattern": 0.5}, "rank_pattern is 0.5; it must be an object"),
        ({"rank_pattern": {"q_proj": 1.5}}, "rank_pattern.q_proj is 1.5; it must be a whole"),
        ({"alpha_pattern": {"q_proj": [1]}}, "alpha_pattern.q_proj is [1]; it must be a number"),
        ({"rank_pattern": {"(q_proj": 8}}, "rank_pattern: (q_proj is no regular expression, or"),
        ({"target_modules": "(?=.*proj).*"}, "target_modules: (?=.*proj).* is no regular expr"),
        ({"target_modules": "(a{999}){999}"}, "target_modules: (a{999}){999} is no regular expr"),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights is "pissa", which is not plain LoRA'),
        ({"init_lora_weights": "pissa_niter_4"}, 'init_lora_weights is "pissa_niter_4", which'),
        ({"init_lora_weights": "lora_ga"}, 'init_lora_weights is "lora_ga", which'),
        ({"modules_to_save": ["lm_head"]}, 'modules_to_save is ["lm_head"], which is not plain'),
        ({"use_dora": True}, "use_dora is true, which is not plain LoRA; merge this adapter"),
        ({"of_the_future": 0.1}, "of_the_future is 0.1, which is not plain LoRA; merge"),
        ({"bias": "all"}, 'bias is "all", which is not plain LoRA'),
    ],
)
def test_unsupported_features(tmp_path, changes, expected):
    path = make_adapter(tmp_path / "a", **changes)
    assert reading_error(path).startswith(f"{path / 'adapter_config.json'}: {expected}")


def test_patterns_take_linear_time(tmp_path):
    """Python's engine would take years."""
    path = make_adapter(tmp_path / "a", target_modules=r"(([a-z_.0-9]+)+)+!")
    assert "does not name this matrix" in reading_error(path)


READ = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"}
READ |= {"exclude_modules", "target_parameters", "layers_to_transform", "layers_pattern"}
READ |= {"peft_type", "bias", "init_lora_weights"}
REFUSED = {"fan_in_fan_out", "modules_to_save", "megatron_config", "trainable_token_indices"}
REFUSED |= {"use_dora", "velora_config", "alora_invocation_tokens", "use_qalora", "kasa_config"}
REFUSED |= {"monteclora_config", "layer_replication", "lora_bias", "use_bdlora", "arrow_config"}


def test_every_field_of_peft_is_known(tmp_path):
    """What a new version of PEFT adds is looked at, and sorted in here or in HISTORY."""
    from peft import LoraConfig

    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields == READ | HISTORY | REFUSED
    LoraConfig(target_modules="all-linear").save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    content = json.loads(file.read_text())
    for changes in {}, dict.fromkeys(HISTORY, "anything"):
        write_json(file, content | changes)
        assert AdapterConfig(file).fields.r == 8
    for field in REFUSED:
        write_json(file, content | {field: [1]})
        with pytest.raises(
            UserError, match=rf"adapter_config.json: {field} is \[1\], which is not"
        ):
            AdapterConfig(file)


def test_pickles(base, tmp_path):
    """They are refused with a command that converts them."""
    import torch

    adapter, model = make_adapter(tmp_path / "an adapter"), tmp_path / "model"
    shutil.copytree(base, model)
    for path, stem, pickles in (
        (adapter, "adapter_model", ["adapter_model.bin"]),
        (model, "model", [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]),
    ):
        file = path / f"{stem}.safetensors"
        expected = load(file)
        for i, name in enumerate(pickles):
            part = list(expected)[i :: len(pickles)]
            torch.save({key: torch.tensor(expected[key]) for key in part}, path / name)
        file.unlink()
        with pytest.raises(UserError) as caught:
            read_adapter(path, CONFIG) if path == adapter else HFCheckpoint(path)
        message = str(caught.value)
        assert message.startswith(f"{path / pickles[0]}: a pickle, which can run any program")
        command = message.partition("convert it: ")[2].replace("python ", f"{sys.executable} ", 1)
        subprocess.run(command, shell=True, check=True)
        assert_same_bits(load(file), expected)


def test_the_router_of_the_reference(tmp_path):
    """gate.pth beside an adapter is never ignored; gate.safetensors is the same router."""
    import torch

    router = np.random.default_rng(0).normal(size=(2, 32, 8)).astype(np.float32)
    path = make_adapter(tmp_path / "a", router=router)
    tensors = load(path / "router.safetensors")
    _, expected = read_adapter(path, CONFIG)
    fingerprint = adapter_fingerprint(str(path))
    (path / "router.safetensors").rename(path / "gate.safetensors")
    assert_same_bits(read_adapter(path, CONFIG)[1], expected)
    assert adapter_fingerprint(str(path)) != fingerprint
    (path / "gate.safetensors").unlink()
    torch.save({name: torch.tensor(value) for name, value in tensors.items()}, path / "gate.pth")
    message = reading_error(path)
    assert message.startswith(f"{path / 'gate.pth'}: a pickle, which can run any program")
    command = message.partition("convert it: ")[2].replace("python ", f"{sys.executable} ", 1)
    subprocess.run(command, shell=True, check=True)
    assert_same_bits(read_adapter(path, CONFIG)[1], expected)
    shutil.copyfile(path / "router.safetensors", path / "gate.safetensors")
    assert "are both a router" in reading_error(path)


def test_router_of_another_base(tmp_path):
    path = make_adapter(tmp_path / "a", router=np.zeros((2, 32, 4), np.float32))
    message = reading_error(path)
    assert "router.safetensors: tensor model.layers.0.mlp.gate.weight is [4, 32], but" in message
    assert "this model needs [8, 32]" in message
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
    assert "adapts model.layers.2." in merge_error(base, other, tmp_path / "out")
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


@pytest.mark.parametrize("command", [from_hf, to_hf])
def test_an_adapter_in_the_place_of_a_model(tmp_path, command):
    adapter, output = make_adapter(tmp_path / "a"), str(tmp_path / "out")
    flag = "--model" if command is from_hf else "--checkpoint"
    with pytest.raises(UserError, match="a: holds an adapter and no model; write its base here"):
        command.main([flag, str(adapter), "--output", output])
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_adapter_of_the_run_that_is_opened(tmp_path):
    run = object.__new__(RunCheckpoint)
    run.path, run.lora, run.base = tmp_path / "run", LoraSettings(4, 8.0), "a/base"
    run.path.mkdir()
    own, other = make_adapter(run.path / "adapter"), make_adapter(tmp_path / "other")
    for adapter in (own, run.path):
        with pytest.raises(UserError, match=r"has its adapter merged already; .* base, a/base,"):
            check_adapter(run, str(run.path), adapter)
    check_adapter(run, str(run.path), other)


@pytest.mark.parametrize(
    ("base", "model", "warns"),
    [
        ("allenai/a", "allenai/b", True),
        ("allenai/a", "allenai/a", False),
        ("allenai/a", "/a/download", False),
        ("/where/it/lay", "allenai/b", False),
        (None, "allenai/b", False),
    ],
)
def test_an_adapter_of_another_base_on_the_hub(tmp_path, capsys, base, model, warns):
    adapter = make_adapter(tmp_path / "a", base_model_name_or_path=base)
    check_adapter(None, model, adapter)
    expected = f"warning: {adapter}: its base is {base}, not {model}; the outputs are wrong if"
    said = capsys.readouterr().err
    assert said.startswith(expected) if warns else not said


def test_to_hf_adapter_of_a_base(base, tmp_path):
    arguments = ["--checkpoint", str(base), "--output", str(tmp_path / "out"), "--adapter"]
    with pytest.raises(UserError, match="--adapter needs the directory of a LoRA or ESFT run"):
        to_hf.main(arguments)
    assert not (tmp_path / "out").exists()
