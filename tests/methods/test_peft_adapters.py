"""Adapters that PEFT made are read, merged and trained on, and give PEFT's logits."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from helpers import (
    assert_close,
    assert_same_bits,
    load_checkpoint_tensors,
    load_safetensors,
    relative_error,
    write_json,
)
from peft_logits import CONFIG, TOKENS, our_logits, torch_base, torch_logits, with_peft
from safetensors.numpy import save_file
from tiny import make_model, random_adapters, short_run, write_base

from convert import merge_lora
from olmoe_jax.checkpoints.huggingface import HFCheckpoint
from olmoe_jax.checkpoints.peft import read_adapter, write_adapter
from olmoe_jax.checkpoints.turn_ends import keep_turn_ends, read_turn_ends
from olmoe_jax.model.lora import TARGETS, LoraSettings
from olmoe_jax.model.parameters import ROUTER
from olmoe_jax.parallel.sharding import make_mesh
from olmoe_jax.training.base_model import open_model
from olmoe_jax.training.parameters import initial_parameters

MODULES = {target: f"{target}_proj" for target in TARGETS}


def made_by_peft(base, output, **options):
    """Lets PEFT save an adapter with random numbers everywhere; returns the logits."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(
        r=4, lora_alpha=6, task_type="CAUSAL_LM", init_lora_weights=False, **options
    )
    model = get_peft_model(torch_base(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    model.save_pretrained(output)
    return torch_logits(model.eval())


ATTENTION = ("q", "k", "v", "o")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("targets", "rank", "options"),
    [
        pytest.param(
            ("q", "v"), 4, {"target_modules": ["q_proj", "v_proj"]}, marks=pytest.mark.exhaustive
        ),
        pytest.param(
            ATTENTION,
            4,
            {"target_modules": [MODULES[name] for name in ATTENTION]},
            marks=pytest.mark.exhaustive,
        ),
        # On transformers 5 the experts are fused, and gate and up share an A of rank 2r.
        (TARGETS, 8, {"target_modules": list(MODULES.values())}),
        (TARGETS, 8, {"target_modules": list(MODULES.values()), "use_rslora": True}),
        pytest.param(("down",), 4, {"target_modules": ["down_proj"]}, marks=pytest.mark.exhaustive),
        (
            ("q", "gate", "up", "down"),
            4,
            {
                "target_modules": ["q_proj"],
                "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            },
        ),
        pytest.param(
            ("gate", "up"),
            4,
            {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]},
            marks=pytest.mark.exhaustive,
        ),
        ((*TARGETS, "router"), 8, {"target_modules": "all-linear"}),
        # Adapters of some layers. PEFT has them in all layers where the experts are fused.
        (("q", "down"), 4, {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}),
        (
            ("q", "gate", "up"),
            4,
            {
                "target_modules": ["q_proj"],
                "target_parameters": ["layers.1.mlp.experts.gate_up_proj"],
                "layers_to_transform": 0,
                "layers_pattern": "layers",
            },
        ),
        (
            ("q", "v", "router"),
            4,
            {
                "target_modules": ["q_proj", "v_proj", "layers.0.mlp.gate"],
                "exclude_modules": ["layers.0.self_attn.q_proj"],
            },
        ),
        # Ranks and scales of their own.
        (
            ("q", "k", "down"),
            8,
            {
                "target_modules": ["q_proj", "k_proj", "down_proj"],
                "rank_pattern": {"q_proj": 8, r"layers\.1\.self_attn\.k_proj": 2, "experts.*": 1},
                "alpha_pattern": {"k_proj": 3, r"model\.layers.[02].*down_proj": 1},
            },
        ),
        (
            ("v", "router"),
            4,
            {"target_modules": ["v_proj", "gate"], "rank_pattern": {"v_proj": 2}}
            | {"alpha_pattern": {"gate.weight": 1}, "use_rslora": True},
        ),
    ],
)
def test_adapter_made_by_peft(base, tmp_path, targets, rank, options):
    expected = made_by_peft(base, tmp_path / "a", **options)
    lora, _ = read_adapter(tmp_path / "a", CONFIG)
    assert (lora.targets, lora.rank) == (targets, rank)
    assert_close(our_logits(base, tmp_path / "a"), expected)
    assert relative_error(torch_logits(torch_base(base)), expected) > 0.01


@pytest.mark.slow
def test_fused_experts_as_wide_as_the_model(tmp_path):
    """A of gate and up has the shape of down's A."""
    base = write_base(tmp_path / "base", intermediate_size=32)
    for name, targets in ("gate_up_proj", ("gate", "up")), ("down_proj", ("down",)):
        parameters = {"target_parameters": [f"mlp.experts.{name}"]}
        expected = made_by_peft(base, tmp_path / name, target_modules=[], **parameters)
        assert read_adapter(tmp_path / name, HFCheckpoint(base).config)[0].targets == targets
        assert_close(our_logits(base, tmp_path / name), expected)


@pytest.mark.slow
def test_all_linear_adapter_merged_as_peft_merges(base, tmp_path):
    """With the router, and in bfloat16 as PEFT merges into a base in bfloat16."""
    made_by_peft(base, tmp_path / "a", target_modules="all-linear")
    arguments = ["--model", str(base), "--adapter", str(tmp_path / "a")]
    merge_lora.main([*arguments, "--output", str(tmp_path / "m")])
    with_peft(base, tmp_path / "a").merge_and_unload().save_pretrained(tmp_path / "peft")
    ours, theirs = (load_checkpoint_tensors(tmp_path / name) for name in ("m", "peft"))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert relative_error(ours[name], value) <= 1e-6, name


def test_prompts_and_answers_of_a_merged_model_are_its_adapters(base, tokenizer_dir, tmp_path):
    """Tokenizer, chat template and ends of turns: the base's count no more."""
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base" / "chat_template.json").write_text('{"chat_template": "the base\'s"}')
    shutil.copytree(tokenizer_dir, adapter)
    (adapter / "chat_template.jinja").write_text("the adapter's")
    keep_turn_ends(adapter, [3, 7])
    lora = LoraSettings(4, 6.0)
    write_adapter(adapter, random_adapters(HFCheckpoint(base).config, lora), lora, "base")
    flags = ("--model", tmp_path / "base", "--adapter", adapter, "--output", merged)
    merge_lora.main([str(flag) for flag in flags])
    assert read_turn_ends(merged) == {3, 7}
    assert (merged / "chat_template.jinja").read_text() == "the adapter's"
    assert not (merged / "chat_template.json").exists()
    assert (merged / "tokenizer.json").exists()


def test_adapter_of_some_experts(base, tmp_path):
    """A pattern names them; PEFT gets zeros for the others."""
    lora = LoraSettings(4, 6.0, targets=("gate", "down"))
    kept = r".*layers\.1\.mlp\.experts\.[25]\.(gate|down)_proj"
    for path in (tmp_path / "all", tmp_path / "some"):
        path.mkdir()
        write_adapter(path, random_adapters(CONFIG, lora), lora, str(base))
    tensors = load_safetensors(tmp_path / "all" / "adapter_model.safetensors")
    some = {name: value for name, value in tensors.items() if re.match(kept, name)}
    assert len(some) == 8
    save_file(some, tmp_path / "some" / "adapter_model.safetensors")
    file = tmp_path / "some" / "adapter_config.json"
    write_json(file, json.loads(file.read_text()) | {"target_modules": kept})
    zeros = {name: value * (name in some) for name, value in tensors.items()}
    # On transformers 5 PEFT adapts gate and up together.
    zeros |= {n.replace("gate_proj", "up_proj"): v * 0 for n, v in tensors.items() if "gate" in n}
    save_file(zeros, tmp_path / "all" / "adapter_model.safetensors")
    file = tmp_path / "all" / "adapter_config.json"
    modules = ["gate_proj", "up_proj", "down_proj"]
    write_json(file, json.loads(file.read_text()) | {"target_modules": modules})
    expected = torch_logits(with_peft(base, tmp_path / "all"))
    assert_close(our_logits(base, tmp_path / "some"), expected)
    assert relative_error(torch_logits(torch_base(base)), expected) > 1e-4


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("base_model.model."),
        lambda name: name.removeprefix("base_model."),
        lambda name: "_orig_mod." + name,
        lambda name: "module._orig_mod." + name,
        lambda name: "model." + name,
        lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
        lambda name: name.replace(".weight", ".default.weight"),
    ],
)
def test_prefixes(base, tmp_path, rename):
    """Names of torch.compile, DDP and plain state_dicts mean what PEFT's names mean."""
    made_by_peft(base, tmp_path, target_modules=["q_proj", "gate"])
    expected = read_adapter(tmp_path, CONFIG)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {rename(name): value for name, value in load_safetensors(file).items()}
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, file)
    settings, parameters = read_adapter(tmp_path, CONFIG)
    assert settings == expected[0]
    assert_same_bits(parameters, expected[1])


def test_training_starts_from_an_all_linear_adapter(run_files, base, tmp_path):
    """The router trains from W + scale * A B."""
    expected = made_by_peft(base, tmp_path / "a", target_modules="all-linear")
    config = short_run(
        run_files,
        base,
        tmp_path / "out",
        method__name="conventional",
        method__adapter_path=str(tmp_path / "a"),
        method__lora_rank=8,
        method__lora_alpha=12.0,
    )
    mesh = make_mesh(devices=jax.devices()[:1])
    model = open_model(config)
    trained, frozen = jax.device_get(initial_parameters(config, model, mesh))
    assert ROUTER in trained
    assert_close(make_model(CONFIG, trained | frozen, lora=model.settings.lora)(TOKENS), expected)
