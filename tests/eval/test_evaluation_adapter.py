"""Evaluations of a model with an adapter: names, backends, the same texts as merged."""

import json
import shutil
import sys

import numpy as np
import pytest
from echo import Echo
from helpers import message_of
from tiny import random_adapters

from convert import merge_lora
from eval import run
from eval.backends import Sampling, check_backend, open_backend
from olmoe_jax.checkpoints.fingerprint import adapter_fingerprint
from olmoe_jax.checkpoints.huggingface import HFCheckpoint
from olmoe_jax.checkpoints.peft import write_adapter
from olmoe_jax.model.lora import LoraSettings
from olmoe_jax.model.parameters import ROUTER

LORA = LoraSettings(4, 8.0)


@pytest.fixture(scope="module")
def adapters(tiny_model, tmp_path_factory):
    """Returns two adapters of the tiny model with routers, as runs export them."""
    config = HFCheckpoint(tiny_model).config
    paths = []
    for seed in (0, 1):
        path = tmp_path_factory.mktemp("run")
        (path / "adapter").mkdir()
        shape = config.num_layers, config.hidden_size, config.num_experts
        router = np.random.default_rng(seed).normal(size=shape)
        numbers = random_adapters(config, LORA, seed)
        parameters = numbers | {ROUTER: router.astype(np.float32)}
        write_adapter(path / "adapter", parameters, LORA, "base")
        paths.append(path)
    return paths


def test_the_adapter_names_the_evaluation(tiny_model, adapters, data_dir, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(run, "open_backend", lambda *arguments: opened.append(arguments) or Echo())
    command = ["--model", str(tiny_model), "--data", str(data_dir), "--output", str(tmp_path / "e")]
    command += ["--tasks", "gsm"]
    first, second = adapters
    run.main([*command, "--adapter", str(first)])
    assert opened == [("jax", str(tiny_model), "float32", str(first), None, None, "none")]
    model = json.loads((tmp_path / "e/gsm/result.json").read_text())["model"]
    assert model["adapter"] == str(first)
    assert model["adapter_fingerprint"] == adapter_fingerprint(str(first / "adapter"))
    message = message_of(run.main, [*command, "--adapter", str(second)])
    assert f"adapter_fingerprint={model['adapter_fingerprint']}, now it is" in message
    assert "now it is None" in message_of(run.main, command)
    # The content counts, not where it lies.
    shutil.copytree(first / "adapter", tmp_path / "moved")
    run.main([*command, "--adapter", str(tmp_path / "moved")])
    (tmp_path / "moved/router.safetensors").unlink()
    assert "adapter_fingerprint" in message_of(
        run.main, [*command, "--adapter", str(tmp_path / "moved")]
    )
    other = ["--output", str(tmp_path / "other")]
    assert "holds no adapter_config" in message_of(
        run.main, [*command, *other, "--adapter", str(tmp_path)]
    )
    assert not (tmp_path / "other").exists()


def test_an_adapter_as_the_model_leaves_no_output(adapters, data_dir, tmp_path):
    """Else the same output directory would be refused to the corrected command."""
    command = ["--model", str(adapters[0] / "adapter"), "--tasks", "gsm", "--data", str(data_dir)]
    message = message_of(run.main, [*command, "--output", str(tmp_path / "e")])
    assert "holds an adapter and no model" in message
    assert not (tmp_path / "e").exists()


def test_backends_that_read_no_adapter(tiny_model, adapters, monkeypatch):
    arguments = str(tiny_model), str(adapters[0])
    message = message_of(check_backend, "vllm", *arguments)
    assert "convert.merge_lora" in message
    monkeypatch.setitem(sys.modules, "torch", type(sys)("torch"))  # the real one takes long
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "pip install peft" in message_of(check_backend, "hf", *arguments)


@pytest.mark.slow
def test_the_same_texts_beside_and_merged(tiny_model, adapters, data_dir, tmp_path):
    pytest.importorskip("peft")
    adapter = str(adapters[0])
    merge = ["--model", str(tiny_model), "--adapter", str(adapters[0] / "adapter")]
    merge_lora.main([*merge, "--output", str(tmp_path / "merged")])
    prompts, greedy = [f"{n} + {n}?" for n in range(3)], Sampling(12, 0.0, 0, ())
    texts = [
        open_backend(*arguments).generate(prompts, greedy)
        for arguments in [
            ("jax", str(tiny_model), "float32", adapter),
            ("hf", str(tiny_model), "float32", adapter),
            ("jax", str(tmp_path / "merged"), "float32"),
            ("jax", str(tiny_model), "float32"),
        ]
    ]
    assert texts[0] == texts[1] == texts[2]
    assert texts[0] != texts[3]
