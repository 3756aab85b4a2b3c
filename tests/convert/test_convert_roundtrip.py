"""HF -> JAX -> HF: the same bits and files, in little memory, and no half output."""

import json
import tracemalloc

import jax
import numpy as np
import pytest
from helpers import assert_same_bits, load_checkpoint_tensors, relative_error, write_json
from tiny import hf_config, make_model, tiny_config, write_hf_checkpoint

import olmoe_jax
from convert import from_hf, to_hf
from olmoe_jax.checkpoints import checksums, names
from olmoe_jax.checkpoints import huggingface as checkpoint_module
from olmoe_jax.errors import UserError

CONFIG = tiny_config(num_kv_heads=2)
INDEX = "model.safetensors.index.json"


def convert(model, output, *arguments):
    """Converts there and back; returns the exported directory."""
    from_hf.main([f"--model={model}", f"--output={output / 'ours'}"])
    to_hf.main([f"--checkpoint={output / 'ours'}", f"--output={output / 'theirs'}", *arguments])
    return output / "theirs"


@pytest.mark.parametrize(
    ("dtype", "shards_in", "max_shard_size", "tied"),
    [
        ("float32", 1, "5GB", False),
        ("float32", 3, "40KB", True),
        ("bfloat16", 1, "20KB", False),
        ("bfloat16", 3, "5GB", True),
    ],
)
def test_round_trip(tmp_path, dtype, shards_in, max_shard_size, tied):
    config = tiny_config(num_kv_heads=2, tie_word_embeddings=tied)
    tensors = write_hf_checkpoint(tmp_path / "model", config, dtype=dtype, shards=shards_in)
    exported = convert(tmp_path / "model", tmp_path, f"--max_shard_size={max_shard_size}")
    assert_same_bits(load_checkpoint_tensors(exported), tensors)
    original = (tmp_path / "model" / "config.json").read_bytes()
    assert (exported / "config.json").read_bytes() == original
    files = list(exported.glob("*.safetensors"))
    if max_shard_size == "5GB":
        assert [file.name for file in files] == ["model.safetensors"]
        assert not (exported / INDEX).exists()
        return
    index = json.loads((exported / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    assert {file.name for file in files} == set(index["weight_map"].values())
    assert len(files) > 2
    limit = to_hf.parse_size(max_shard_size)
    for file in files:
        names_inside = [n for n, f in index["weight_map"].items() if f == file.name]
        assert sum(tensors[name].nbytes for name in names_inside) <= limit


def test_export_straight_from_hugging_face_and_in_another_dtype(tmp_path):
    import ml_dtypes

    tensors = write_hf_checkpoint(tmp_path / "model", CONFIG)
    to_hf.main(
        [f"--checkpoint={tmp_path / 'model'}", f"--output={tmp_path / 'out'}", "--dtype=bfloat16"]
    )
    expected = {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()}
    assert_same_bits(load_checkpoint_tensors(tmp_path / "out"), expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == hf_config(CONFIG, torch_dtype="bfloat16")


def torch_model(config):
    """Returns a random model of transformers, with every weight different."""
    torch = pytest.importorskip("torch")
    from transformers import OlmoeConfig, OlmoeForCausalLM

    fields = hf_config(config)
    for name in ("architectures", "torch_dtype", "rope_scaling"):
        fields.pop(name)
    rope = {"rope_theta": fields.pop("rope_theta"), "rope_type": "default"}
    torch.manual_seed(0)
    model = OlmoeForCausalLM(OlmoeConfig(**fields, rope_parameters=rope))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpoints_that_transformers_saves(tmp_path, fused, dtype):
    """The per-expert and the fused layout both come back as the per-expert one, bit for bit."""
    torch = pytest.importorskip("torch")
    model = torch_model(CONFIG).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "default")
    expected = load_checkpoint_tensors(tmp_path / "default")
    saved = tmp_path / "default"
    if fused:
        saved = tmp_path / "fused"
        model.save_pretrained(saved, save_original_format=False)
        assert any(name.endswith("gate_up_proj") for name in load_checkpoint_tensors(saved))
    exported = convert(saved, tmp_path)
    assert_same_bits(load_checkpoint_tensors(exported), expected)
    assert (exported / "config.json").read_bytes() == (saved / "config.json").read_bytes()
    generation = "generation_config.json"
    assert (exported / generation).read_bytes() == (saved / generation).read_bytes()


@pytest.mark.slow
def test_transformers_loads_the_export_and_agrees(tmp_path):
    """from_pretrained of both directories agrees too."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    write_hf_checkpoint(tmp_path / "model", CONFIG)
    exported = convert(tmp_path / "model", tmp_path, "--max_shard_size=40KB")
    tokens = np.random.default_rng(0).integers(0, 61, (2, 9))
    theirs, info = AutoModelForCausalLM.from_pretrained(
        exported, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        logits = theirs(torch.tensor(tokens)).logits.numpy()
    forward = jax.jit(make_model(CONFIG).__call__)
    assert relative_error(forward(tokens), logits) < 1e-5
    for path in (exported, tmp_path / "ours"):
        model = olmoe_jax.from_pretrained(path)
        np.testing.assert_array_equal(jax.jit(model.__call__)(tokens), forward(tokens))


def test_tokenizer_and_generation_config_are_carried_over(tmp_path, tokenizer_dir):
    import shutil

    shutil.copytree(tokenizer_dir, tmp_path / "model")
    write_hf_checkpoint(tmp_path / "model", CONFIG)
    write_json(tmp_path / "model" / "generation_config.json", {"eos_token_id": 0, "odd": "\u00e9"})
    (tmp_path / "model" / "special_tokens_map.json").write_bytes(b'{ "eos_token": "x"}\r\n')
    (tmp_path / "model" / "unrelated.bin").write_bytes(b"not ours to carry")
    exported = convert(tmp_path / "model", tmp_path)
    carried = {file.name for file in exported.iterdir()} - {checksums.FILE}
    expected = {file.name for file in (tmp_path / "model").iterdir()} - {"unrelated.bin"}
    assert carried == expected > {"tokenizer.json", "tokenizer_config.json"}
    for name in carried - {"model.safetensors"}:
        assert (exported / name).read_bytes() == (tmp_path / "model" / name).read_bytes(), name


@pytest.mark.parametrize("error", [RuntimeError("pulled the plug"), KeyboardInterrupt()])
def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch, error):
    write_hf_checkpoint(tmp_path / "model", CONFIG)
    read = checkpoint_module.HFCheckpoint.read

    def interrupted(self, weight, layer, *experts):
        if (weight.name, layer) == ("layers.moe.experts.up", 1):
            raise error
        return read(self, weight, layer, *experts)

    monkeypatch.setattr(checkpoint_module.HFCheckpoint, "read", interrupted)
    model, output = tmp_path / "model", tmp_path / "out"
    for main, flag in ((from_hf.main, "model"), (to_hf.main, "checkpoint")):
        with pytest.raises(type(error)):
            main([f"--{flag}={model}", f"--output={output}"])
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    write_hf_checkpoint(tmp_path / "model", CONFIG)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module.FileWriter, "write", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/out'"):
        to_hf.main([f"--checkpoint={tmp_path / 'model'}", f"--output={tmp_path / 'out'}"])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("command", [from_hf, to_hf])
def test_an_output_that_exists_is_left_alone(tmp_path, command):
    write_hf_checkpoint(tmp_path / "model", CONFIG)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("data")
    (tmp_path / "file").write_text("data")
    flag = "model" if command is from_hf else "checkpoint"
    for output in ("out", "file"):
        with pytest.raises(UserError, match=f"{output}: exists already"):
            command.main([f"--{flag}={tmp_path / 'model'}", f"--output={tmp_path / output}"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "model", "out"]


def test_memory_is_bounded_by_a_layer_not_by_the_model(tmp_path):
    layers = 12
    config = tiny_config(num_layers=layers, hidden_size=64, intermediate_size=64, head_dim=16)
    tensors = write_hf_checkpoint(tmp_path / "model", config)
    model_bytes = sum(tensor.nbytes for tensor in tensors.values())
    layer_bytes = model_bytes / layers
    del tensors
    tracemalloc.start()
    try:
        peaks = {}
        for name, main, flag, source in (
            ("from_hf", from_hf.main, "model", "model"),
            ("to_hf", to_hf.main, "checkpoint", "from_hf"),
        ):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            main([f"--{flag}={tmp_path / source}", f"--output={tmp_path / name}"])
            peaks[name] = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert peaks["to_hf"] < 2 * layer_bytes
    assert peaks["from_hf"] < 4 * layer_bytes
    assert 4 * layer_bytes < model_bytes / 2


def test_sizes():
    assert to_hf.parse_size("5GB") == 5 * 10**9
    assert to_hf.parse_size("500mb") == 5 * 10**8
    assert to_hf.parse_size("1.5K") == 1500
    assert to_hf.parse_size("1000") == to_hf.parse_size("1000B") == 1000
    for text in ("", "GB", "-1GB", "0", "5TB", "5 apples"):
        with pytest.raises(UserError, match=": write a size such as 5GB"):
            to_hf.parse_size(text)


def test_shards_hold_layers_together(tmp_path):
    """The tensors of a layer lie together, as in Hugging Face's own files."""
    write_hf_checkpoint(tmp_path / "model", CONFIG)
    to_hf.main([f"--checkpoint={tmp_path / 'model'}", f"--output={tmp_path / 'out'}"])
    order = list(checkpoint_module.read_header(tmp_path / "out" / "model.safetensors"))
    layers = [int(name.split(".")[2]) for name in order if ".layers." in name]
    assert layers == sorted(layers)
    assert len(order) == sum(
        len(names.layer_indices(weight, CONFIG)) * (8 if weight.per_expert else 1)
        for weight in names.weights(CONFIG)
    )
