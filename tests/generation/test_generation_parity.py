"""Greedy tokens equal transformers' generate: batched, one by one, with and without adapters."""

from types import SimpleNamespace

import numpy as np
import pytest
from tiny import random_adapters, random_weights, tiny_config, write_hf_checkpoint

import olmoe_jax
from olmoe_jax.checkpoints.huggingface import HFCheckpoint
from olmoe_jax.checkpoints.peft import write_adapter
from olmoe_jax.model.lora import LoraSettings

CORE = ("base", "clip_qkv", "combined", "experts64", "gqa", "norm_topk", "rope_theta", "tied")


class Numbers:
    """A tokenizer whose texts are token ids; no text ends before its limit."""

    eos_token_id = -1

    def __call__(self, text, **_):
        return SimpleNamespace(input_ids=[int(number) for number in text.split()])

    def decode(self, tokens):
        return " ".join(map(str, tokens))


def theirs(checkpoint, prompts, count, adapter):
    """transformers' tokens, left-padded, with PEFT's adapter beside the weights."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    width = max(map(len, prompts))
    padded = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with torch.inference_mode():
        out = model.eval().generate(
            input_ids=padded,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count,
            eos_token_id=None,
            pad_token_id=0,
        )
    return [" ".join(map(str, row[width:].tolist())) for row in out]


def compare(checkpoint, rows, count, adapter=None, alone=2):
    """All rows in batches, and the first `alone` one by one."""
    random = np.random.default_rng(0)
    vocabulary = HFCheckpoint(checkpoint).config.vocab_size
    longest = 40
    prompts = [
        random.integers(3, vocabulary, random.integers(1, longest)).tolist() for _ in range(rows)
    ]
    expected = theirs(checkpoint, prompts, count, adapter)
    model, numbers = olmoe_jax.from_pretrained(checkpoint, adapter=adapter), Numbers()
    texts = [numbers.decode(prompt) for prompt in prompts]
    asked = {"max_new_tokens": count, "allow_extrapolation": True}  # the tiny models have 64
    assert olmoe_jax.generate(model, numbers, texts, batch_size=32, **asked) == expected
    for text, tokens in zip(texts[:alone], expected, strict=False):
        assert olmoe_jax.generate(model, numbers, [text], **asked) == [tokens]
    return expected


@pytest.mark.exhaustive
def test_small_model(tmp_path):
    pytest.importorskip("torch")
    config = tiny_config(num_kv_heads=2)
    write_hf_checkpoint(tmp_path, config)
    compare(tmp_path, 4, 6, alone=1)


@pytest.mark.slow
def test_small_model_with_and_without_adapter(tmp_path):
    pytest.importorskip("peft")
    config, lora = tiny_config(num_kv_heads=2), LoraSettings(4, 6.0)
    write_hf_checkpoint(tmp_path / "base", config, random_weights(config))
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", random_adapters(config, lora), lora, "base")
    plain = compare(tmp_path / "base", 6, 10)
    assert compare(tmp_path / "base", 6, 10, tmp_path / "adapter") != plain


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*CORE[:1], *(pytest.param(name, marks=pytest.mark.exhaustive) for name in CORE[1:])]
)
def test_reference_checkpoints(shared, name):
    pytest.importorskip("torch")
    compare(shared / "reference" / "core" / name / "checkpoint", 64, 64, alone=4)


@pytest.mark.exhaustive
def test_reference_adapter(shared):
    pytest.importorskip("peft")
    folder = shared / "reference" / "lora"
    plain = compare(folder / "checkpoint", 64, 64)
    assert compare(folder / "checkpoint", 64, 64, folder / "adapter") != plain
