"""What benchmarks.serving prints, without a server."""

import json

import pytest

from benchmarks import serving
from benchmarks.serving_gguf import pre_tokenizer
from benchmarks.serving_models import Case
from olmoe_jax.quickstart import train_tokenizer


def answers(*ids):
    """Answers of prompt, tokens, prompt, tokens, …"""
    pairs = zip(ids[::2], ids[1::2], strict=True)
    return {"answers": [{"prompt": prompt, "tokens": tokens} for prompt, tokens in pairs]}


OURS = {"ends": [0], **answers([1], [5, 6], [2], [7])}


@pytest.mark.parametrize(
    ("theirs", "verdict"),
    [
        (answers([1], [5, 6, 0], [2], [7]), "2/2"),
        (answers([1], [5], [2], [7, 0, 0]), "1/2"),
        (answers([1], [5, 6], [3], [7]), "other prompts"),
        ({"error": "ValueError: no"}, "fails"),
        (None, "not run"),
    ],
)
def test_tokens_before_the_end_count(theirs, verdict):
    assert serving.verdict(OURS, theirs) == verdict


def test_table_names_what_did_not_run(tmp_path):
    case = Case("a method", "export", True, tmp_path, tmp_path)
    found = {server: {"version": "", "cases": {}} for server in serving.SERVERS}
    (vllm,) = (server for server in serving.SERVERS if server.flag == "vllm")
    found[vllm] = {"version": "vLLM 1", "cases": {case.name: {"error": "ValueError: no"}}}
    printed = serving.table([case], [OURS], found)
    assert "| a method | export | chats | not run | not run | fails | not run |" in printed
    assert "vLLM 1: a method, export, chats: ValueError: no" in printed


def test_llama_cpps_name_of_the_quickstarts_pre_tokenizer(tmp_path):
    train_tokenizer(["1 and 2"], 280, tmp_path)
    file = tmp_path / "tokenizer.json"
    assert pre_tokenizer(file) == "smollm"
    content = json.loads(file.read_text())
    content["pre_tokenizer"] = {"type": "ByteLevel", "use_regex": True}
    file.write_text(json.dumps(content))
    assert pre_tokenizer(file) == "gpt-2"
    content["pre_tokenizer"] = {"type": "Whitespace"}
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="Whitespace"):
        pre_tokenizer(file)
