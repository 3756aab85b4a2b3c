"""The examples run, and do what their headers say."""

import json
import shutil
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT, load_checkpoint_tensors, write_json
from tiny import hf_config, tiny_config, write_hf_checkpoint

from examples import chat, lora_on_my_data, router_gradient
from olmoe_jax.config.methods import METHODS
from olmoe_jax.generation import command


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_fits_one_screen(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60


def test_router_gradient_is_that_by_hand():
    by_hand, ours, conventional = router_gradient.main()
    scale = float(jnp.abs(by_hand).max())
    np.testing.assert_allclose(ours, by_hand, atol=1e-5 * scale)
    assert float(jnp.abs(conventional - by_hand).max()) > 0.1 * scale


@pytest.fixture
def base(tmp_path, tokenizer_dir):
    """A random tiny OLMoE with a tokenizer of bytes."""
    path, config = tmp_path / "base", tiny_config(vocab_size=258)
    write_hf_checkpoint(path, config)
    write_json(path / "config.json", hf_config(config, max_position_embeddings=4096))
    shutil.copytree(tokenizer_dir, path, dirs_exist_ok=True)
    return path


def write_rows(file, count):
    """Writes `count` rows of four different kinds."""
    rows = [{"prompt": f"after {a}:", "completion": b} for a, b in ("AB", "BC", "CD", "DA")]
    rows = rows * (count // len(rows))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.mark.slow
def test_lora_learns_rows_of_ones_own(base, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", 160)
    share = lora_on_my_data.train_and_score(
        str(base), data, tmp_path / "output", rate=2e-2, epochs=10
    )
    assert share > 0.9
    assert (tmp_path / "output/run/adapter/adapter_model.safetensors").exists()


@pytest.mark.slow
def test_new_method_trains_the_attention_alone(base, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", 40)
    with mock.patch.dict(METHODS):  # the import adds a row, which other tests must not see
        from examples import new_method

        run = new_method.train(str(base), data, tmp_path / "run", rate=1e-2, epochs=1)
    before, after = load_checkpoint_tensors(base), load_checkpoint_tensors(run / "hf")
    changed = {name for name, value in after.items() if (value != before[name]).any()}
    assert changed == {name for name in before if ".self_attn." in name}


@pytest.mark.exhaustive
def test_chat_model_answers_as_it_was_taught(tmp_path, capsys):
    """By the chat door: without a system turn and with one, and a question that follows another."""
    model = chat.train(tmp_path / "inputs", tmp_path / "run")
    texts = ["Be brief.", "What is the capital of Peru?", "Lima.", "And of Cuba?"]
    roles = ["system", "user", "assistant", "user"]
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    asked = [turns[1:2], turns]
    lines = [json.dumps({"messages": messages}) + "\n" for messages in asked]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    capsys.readouterr()
    command.main(["--model", str(model), "--chat", "--prompts", str(tmp_path / "rows.jsonl")])
    found = [json.loads(line)["messages"] for line in capsys.readouterr().out.splitlines()]
    assert [messages[:-1] for messages in found] == asked
    answers = [messages[-1]["content"] for messages in found]
    assert answers == ["The capital of Peru is Lima.", "Havana."]
