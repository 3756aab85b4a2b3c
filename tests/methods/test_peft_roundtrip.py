"""Adapters go to PEFT and come from it, with the same logits; merges agree."""

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
    run_module,
    write_json,
)
from safetensors.numpy import save_file
from tiny import (
    BYTES,
    LORA,
    base_weights,
    make_model,
    random_adapters,
    short_run,
    tiny_config,
    write_base,
)

import olmoe_jax
from convert import merge_lora, to_hf
from olmoe_jax.checkpoints.huggingface import HFCheckpoint
from olmoe_jax.checkpoints.merging import with_router
from olmoe_jax.checkpoints.peft import ROUTER_FILE, read_adapter, to_peft, write_adapter
from olmoe_jax.model.lora import TARGETS, LoraSettings
from olmoe_jax.model.parameters import ROUTER
from olmoe_jax.parallel.sharding import make_mesh
from olmoe_jax.training.base_model import open_model
from olmoe_jax.training.parameters import initial_parameters

CONFIG = tiny_config(**BYTES)
TOKENS = np.random.default_rng(0).integers(2, 258, (2, 12)).astype(np.int32)
MODULES = {target: f"{target}_proj" for target in TARGETS}
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


def our_logits(base, adapter):
    source = HFCheckpoint(base)
    lora, parameters = with_router(*read_adapter(adapter, source.config), source)
    return np.asarray(make_model(source.config, base_weights(base) | parameters, lora=lora)(TOKENS))


def torch_base(base):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def torch_logits(model):
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(TOKENS).long()).logits.numpy()


def with_peft(base, adapter):
    from peft import PeftModel

    model = PeftModel.from_pretrained(torch_base(base), adapter)
    if (adapter / ROUTER_FILE).exists():
        import torch

        routers = {
            name: torch.from_numpy(value.copy())
            for name, value in load_safetensors(adapter / ROUTER_FILE).items()
        }
        unused = model.base_model.model.load_state_dict(routers, strict=False).unexpected_keys
        assert not unused
    return model.eval()


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
    ("targets", "rslora"),
    [
        (TARGETS, False),
        (("gate", "up", "down"), True),
        pytest.param(("q", "v"), False, marks=pytest.mark.slow),
        pytest.param(("gate", "up", "down"), False, marks=pytest.mark.slow),
        pytest.param(TARGETS, True, marks=pytest.mark.slow),
    ],
)
def test_per_expert_adapter_in_both(base, tmp_path, targets, rslora):
    """Adapters with random B agree with PEFT, whatever the targets."""
    lora = LoraSettings(4, 6.0, targets=targets, rslora=rslora)
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


@pytest.mark.parametrize(
    ("targets", "rank", "options"),
    [
        pytest.param(
            ("q", "v"), 4, {"target_modules": ["q_proj", "v_proj"]}, marks=pytest.mark.slow
        ),
        pytest.param(
            ATTENTION,
            4,
            {"target_modules": [MODULES[name] for name in ATTENTION]},
            marks=pytest.mark.slow,
        ),
        # On transformers 5 the experts are fused, and gate and up share an A of rank 2r.
        (TARGETS, 8, {"target_modules": list(MODULES.values())}),
        (TARGETS, 8, {"target_modules": list(MODULES.values()), "use_rslora": True}),
        pytest.param(("down",), 4, {"target_modules": ["down_proj"]}, marks=pytest.mark.slow),
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
            marks=pytest.mark.slow,
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


def test_fused_experts_as_wide_as_the_model(tmp_path):
    """A of gate and up has the shape of down's A."""
    base = write_base(tmp_path / "base", intermediate_size=32)
    for name, targets in ("gate_up_proj", ("gate", "up")), ("down_proj", ("down",)):
        parameters = {"target_parameters": [f"mlp.experts.{name}"]}
        expected = made_by_peft(base, tmp_path / name, target_modules=[], **parameters)
        assert read_adapter(tmp_path / name, HFCheckpoint(base).config)[0].targets == targets
        assert_close(our_logits(base, tmp_path / name), expected)


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
