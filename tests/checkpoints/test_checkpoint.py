"""Opening checkpoints: both of Hugging Face's layouts read alike, messages name what is wrong."""

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from helpers import message_of, write_json
from tiny import (
    hf_config,
    hf_tensors,
    random_weights,
    tiny_config,
    write_hf_checkpoint,
    write_tensors,
)

from olmoe_jax.checkpoints import directory, names
from olmoe_jax.checkpoints.fingerprint import model_fingerprint
from olmoe_jax.checkpoints.huggingface import HFCheckpoint, serving_warnings
from olmoe_jax.checkpoints.opening import RunCheckpoint, open_source
from olmoe_jax.errors import UserError

CONFIG = tiny_config(num_kv_heads=2, intermediate_size=32)  # square experts
INDEX = "model.safetensors.index.json"
Q = "model.layers.1.self_attn.q_proj.weight"
EXPERT = "model.layers.0.mlp.experts.3.up_proj.weight"


def fused(tensors):
    """Fuses the experts as transformers 5 does: gate and up of all experts in one tensor."""
    out = {name: value for name, value in tensors.items() if ".experts." not in name}
    for layer in range(CONFIG.num_layers):
        prefix = f"model.layers.{layer}.mlp.experts."
        gate, up, down = (
            np.stack([tensors[f"{prefix}{e}.{part}_proj.weight"] for e in range(8)])
            for part in ("gate", "up", "down")
        )
        out[prefix + "gate_up_proj"] = np.concatenate([gate, up], axis=1)
        out[prefix + "down_proj"] = down
    return out


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_reading(tmp_path, layout, shards):
    weights = random_weights(CONFIG)
    tensors = hf_tensors(CONFIG, weights)
    write_tensors(tmp_path, fused(tensors) if layout == "fused" else tensors, shards)
    write_json(tmp_path / "config.json", hf_config(CONFIG))
    source = open_source(str(tmp_path))
    assert isinstance(source, HFCheckpoint)
    assert source.config.num_kv_heads == 2
    for weight in names.weights(CONFIG):
        assert source.dtype(weight) == np.float32
        for layer in names.layer_indices(weight, CONFIG):
            expected = weights[weight.name] if layer is None else weights[weight.name][layer]
            np.testing.assert_array_equal(source.read(weight, layer), expected)
            if weight.per_expert:
                part = source.read(weight, layer, slice(2, 5))
                np.testing.assert_array_equal(part, expected[2:5])


@pytest.fixture
def model(tmp_path):
    """A sound checkpoint in three shards, for a test to break."""
    write_hf_checkpoint(tmp_path / "model", CONFIG, shards=3)
    return tmp_path / "model"


def edit_config(path, **changes):
    write_json(path / "config.json", json.loads((path / "config.json").read_text()) | changes)


def edit_tensors(path, change):
    """Rewrites the weights as one file after `change(tensors)`."""
    tensors = hf_tensors(CONFIG)
    change(tensors)
    for file in [*path.glob("*.safetensors"), path / INDEX]:
        file.unlink()
    write_tensors(path, tensors)


def truncate(file, size):
    file.write_bytes(file.read_bytes()[:size])


def rename_in_index(path, old, new):
    index = json.loads((path / INDEX).read_text())
    index["weight_map"][new] = index["weight_map"].pop(old)
    write_json(path / INDEX, index)


def put(name, value):
    return lambda tensors: tensors.__setitem__(name, value(tensors))


SHARD = "model-00002-of-00003.safetensors"
# What is done to a sound checkpoint, and what the message must name.
BREAKS = {
    "no_directory": (shutil.rmtree, ["no such directory"]),
    "no_config": (lambda p: (p / "config.json").unlink(), ["config.json: no such file"]),
    "config_not_json": (
        lambda p: (p / "config.json").write_text('{"model_type": '),
        ["config.json: not JSON"],
    ),
    "config_not_an_object": (
        lambda p: (p / "config.json").write_text("[1, 2]"),
        ["config.json", "object"],
    ),
    "other_architecture": (lambda p: edit_config(p, model_type="mixtral"), ["'mixtral'"]),
    "no_weights": (
        lambda p: [f.unlink() for f in p.glob("model*")],
        ["model.safetensors", INDEX],
    ),
    "missing_shard": (lambda p: (p / SHARD).unlink(), [SHARD, "no such file"]),
    "truncated_shard": (lambda p: truncate(p / SHARD, -5), [SHARD, "truncated"]),
    "truncated_header": (lambda p: truncate(p / SHARD, 50), [SHARD, "truncated"]),
    "empty_shard": (lambda p: truncate(p / SHARD, 0), [SHARD, "truncated"]),
    "index_not_json": (lambda p: (p / INDEX).write_text("{"), [INDEX, "not JSON"]),
    "index_without_map": (lambda p: write_json(p / INDEX, {}), [INDEX, "weight_map"]),
    "index_names_an_absent_tensor": (
        lambda p: rename_in_index(p, Q, "model.layers.7.self_attn.q_proj.weight"),
        [INDEX, "model.layers.7.self_attn.q_proj.weight"],
    ),
    "tensor_in_two_files": (
        lambda p: safetensors.numpy.save_file({Q: hf_tensors(CONFIG)[Q]}, p / SHARD),
        [Q],
    ),
    "two_models": (
        lambda p: write_tensors(p, hf_tensors(CONFIG)),
        ["holds model.safetensors and an index of other files", "remove those"],
    ),
    "unexpected_tensor": (
        lambda p: edit_tensors(p, put("model.layers.0.extra", lambda t: t[Q])),
        ["unexpected tensor model.layers.0.extra"],
    ),
    "quantized": (
        lambda p: (
            edit_tensors(p, put(f"{Q}.absmax", lambda t: t[Q])),
            edit_config(p, quantization_config={"load_in_4bit": True}),
        ),
        [f"unexpected tensor {Q}.absmax", "quantized: write the checkpoint from which"],
    ),
    "one_layer_too_many": (
        lambda p: edit_config(p, num_hidden_layers=1),
        ["unexpected tensor model.layers.1."],
    ),
    "missing_tensor": (lambda p: edit_tensors(p, lambda t: t.pop(EXPERT)), [EXPERT, "missing"]),
    "experts_missing": (lambda p: edit_config(p, num_experts=9), ["experts.8.", "5 more"]),
    "wrong_shape": (
        lambda p: edit_tensors(p, put(Q, lambda t: t[Q][:, :-1].copy())),
        [Q, "[32, 31]", "[32, 32]"],
    ),
    "wrong_shape_of_an_expert": (
        lambda p: edit_tensors(p, put(EXPERT, lambda t: t[EXPERT][:4].copy())),
        [EXPERT, "[4, 32]"],
    ),
    "mixed_dtypes": (
        lambda p: edit_tensors(p, put(EXPERT, lambda t: t[EXPERT].astype(ml_dtypes.bfloat16))),
        ["up_proj", "bfloat16", "float32"],
    ),
    "untied_head": (
        lambda p: edit_config(p, tie_word_embeddings=True),
        ["lm_head.weight", "tie_word_embeddings"],
    ),
    "no_head": (lambda p: edit_tensors(p, lambda t: t.pop("lm_head.weight")), ["lm_head.weight"]),
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_is_wrong_is_named(model, name):
    break_it, culprits = BREAKS[name]
    break_it(model)
    with pytest.raises(UserError) as caught:
        open_source(str(model))
    message = str(caught.value)
    assert str(model) in message
    assert "\n" not in message
    for culprit in culprits:
        assert culprit in message


def test_tied_checkpoint_may_repeat_its_head(tmp_path):
    tied = tiny_config(tie_word_embeddings=True)
    tensors = hf_tensors(tied)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write_tensors(tmp_path, tensors)
    write_json(tmp_path / "config.json", hf_config(tied))
    checkpoint = HFCheckpoint(tmp_path)
    assert "lm_head" not in {weight.name for weight in names.weights(checkpoint.config)}


def test_serving_warnings():
    assert serving_warnings(tiny_config()) == []
    odd = tiny_config(rms_norm_eps=1e-6, norm_topk_prob=True, clip_qkv=8.0)
    warnings = serving_warnings(odd)
    assert len(warnings) == 3
    for field in ("rms_norm_eps", "norm_topk_prob", "clip_qkv"):
        assert any(field in warning for warning in warnings)


def test_new_directory(tmp_path):
    output = tmp_path / "parent" / "output"
    with directory.new_directory(output) as partial:
        (partial / "file").write_text("x")
        assert not output.exists()
    assert (output / "file").read_text() == "x"
    with pytest.raises(UserError, match="exists already"), directory.new_directory(output):
        pytest.fail("an output that exists must not be written over")
    assert (output / "file").read_text() == "x"
    (tmp_path / "empty").mkdir()
    with directory.new_directory(tmp_path / "empty") as partial:
        (partial / "file").touch()
    assert (tmp_path / "empty" / "file").exists()


def test_new_directory_behind_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with directory.new_directory(tmp_path / "link") as partial:
        (partial / "file").touch()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "file").exists()
    assert len(list(tmp_path.iterdir())) == 2


def test_directories_that_cannot_be_replaced(tmp_path, monkeypatch):
    """It shows before the work, not at its end."""
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: str(path) == str(mounted))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"mounted: a mount point, .* write a new one in it"):
        directory.new_directory(mounted).__enter__()
    mounted.rmdir()
    for output in (".", tmp_path):
        with pytest.raises(UserError, match="or the current directory, cannot be replaced"):
            directory.new_directory(output).__enter__()


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(28, "No space left on device"), OSError),
        (ValueError("a bug"), ValueError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_new_directory_leaves_nothing_after_an_error(tmp_path, error, raised):
    def write():
        with directory.new_directory(tmp_path / "new" / "output") as partial:
            (partial / "file").write_text("x")
            raise error

    with pytest.raises(raised, match="/new/output" if raised is OSError else None):
        write()
    assert list(tmp_path.iterdir()) == []


def test_new_file(tmp_path):
    file = tmp_path / "out.safetensors"
    with directory.new_file(file) as partial:
        partial.write_text("old")

    def fail():
        with directory.new_file(file) as partial:
            partial.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: '.*/out\.safetensors'"):
        fail()
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


REFUSED = {
    "a" * 300: errno.ENAMETOOLONG,
    f"new/{'a' * 300}": errno.ENAMETOOLONG,
    "file/new": errno.ENOTDIR,
    "loop/new": errno.ELOOP,
    "../../../../../../../../proc/new": errno.ENOENT,
}
"""What the operating system has against writing there."""


@pytest.mark.parametrize("write", ["new_directory", "new_file", "check_writable"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_comes_first_and_names_the_path(tmp_path, write, name):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    if name.startswith("new/") and write == "new_file":
        (tmp_path / "new").mkdir()
    with pytest.raises(OSError, match=os.strerror(REFUSED[name])) as caught:
        contextlib.ExitStack().enter_context(getattr(directory, write)(tmp_path / name))
    assert str(caught.value.filename) == str(tmp_path / name)
    assert {p.name for p in tmp_path.iterdir()} <= {"file", "loop", "new"}
    assert not (tmp_path / "new").exists() or write == "new_file"


def test_new_file_over_a_directory(tmp_path):
    for path in (tmp_path, Path("/")):
        with pytest.raises(IsADirectoryError), directory.new_file(path):
            pytest.fail("a directory must not be replaced")


def test_check_writable_leaves_nothing(tmp_path):
    for name in (".", "new", "new/er"):
        directory.check_writable(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("prefix", ["tuned", "selected"])
def test_the_tuned_experts_of_a_run(tmp_path, prefix):
    """Runs of the first version store the tuned experts as `selected.gate` and so on."""
    import orbax.checkpoint as ocp

    write_hf_checkpoint(tmp_path / "base", CONFIG)
    run, random = tmp_path / "run", np.random.default_rng(0)
    (run / "model").mkdir(parents=True)
    write_json(run / "model" / "config.json", hf_config(CONFIG))
    write_json(
        run / "config.json",
        {"model": {"path": str(tmp_path / "base")}, "method": {"lora_rank": None}},
    )
    write_json(run / "experts.json", {"experts": {"1": [5], "2": [0, 3]}})
    tuned = {
        name: random.normal(size=(3, 32, 32)).astype(np.float32) for name in ("gate", "up", "down")
    }
    with ocp.StandardCheckpointer() as checkpointer:
        state = {"parameters": {f"{prefix}.{name}": value for name, value in tuned.items()}}
        checkpointer.save(run / "checkpoints" / "4" / "state", state)
    base, source = open_source(str(tmp_path / "base")), open_source(str(run))
    assert isinstance(source, RunCheckpoint)
    assert source.trained().keys() == {f"tuned.{name}" for name in tuned}
    for weight in names.weights(CONFIG):
        for layer in names.layer_indices(weight, CONFIG):
            expected = base.read(weight, layer)
            if weight.per_expert:
                stacked = tuned[weight.name.rpartition(".")[2]]
                for place, (tuned_layer, expert) in enumerate([(0, 5), (1, 0), (1, 3)]):
                    if tuned_layer == layer:
                        expected[expert] = stacked[place]
                part = source.read(weight, layer, slice(2, 6))
                np.testing.assert_array_equal(part, expected[2:6])
            np.testing.assert_array_equal(source.read(weight, layer), expected)


@pytest.mark.parametrize("folder", ["checkpoints", "checkpoints/500"])
def test_a_model_beside_a_folder_of_checkpoints(tmp_path, folder):
    write_hf_checkpoint(tmp_path, CONFIG)
    fingerprint = model_fingerprint(str(tmp_path))
    (tmp_path / folder).mkdir(parents=True)
    assert type(open_source(str(tmp_path))) is HFCheckpoint
    assert model_fingerprint(str(tmp_path)) == fingerprint
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    assert "pytorch_model.bin: a pickle, which" in message_of(open_source, str(tmp_path))
