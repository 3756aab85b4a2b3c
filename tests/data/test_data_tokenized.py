import json
import shutil

import numpy as np
import pytest

from olmoe_jax.data import held_out_split, load_tokenizer, tokenize_dataset
from olmoe_jax.data import tokenized as module
from olmoe_jax.data.cache import load_arrays, save_arrays
from olmoe_jax.errors import UserError

ROWS = [{"prompt": "ab", "completion": "c" * n} for n in (1, 2, 3)]
ROWS.append({"prompt": "p" * 50, "completion": "x"})


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "data.jsonl", ROWS)


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def tokenizations(monkeypatch):
    """The calls that were not answered from the cache."""
    calls, real = [], module._tokenize
    monkeypatch.setattr(module, "_tokenize", lambda *a: (calls.append(a), real(*a))[1])
    return calls


def test_examples_and_counts(data, tokenizer, tmp_path):
    dataset = tokenize_dataset(data, tokenizer, 20)
    assert (len(dataset), dataset.dropped_rows, dataset.total_rows) == (3, 1, 4)
    assert dataset.lengths.tolist() == [5, 6, 7]
    assert dataset.target_counts.tolist() == [3, 4, 5]
    example = dataset.subset([2, 1]).example(1)
    assert tokenizer.decode(example.tokens) == "ab cc<|endoftext|>"
    assert example.trained.tolist() == [False, False, True, True, True, True]
    assert example.prompt_length == 2
    assert (dataset.tokens.dtype, dataset.trained.dtype) == (np.int32, bool)
    assert dataset.offsets.dtype == np.int64


def test_more_rows_than_one_tokenizer_call(tokenizer, tmp_path, monkeypatch):
    data = write(tmp_path / "data.jsonl", [{"prompt": str(i), "completion": ""} for i in range(7)])
    monkeypatch.setattr(module, "_ROWS_PER_TOKENIZER_CALL", 3)
    dataset = tokenize_dataset(data, tokenizer, 20)
    texts = [tokenizer.decode(dataset.example(i).tokens) for i in range(7)]
    assert texts == [f"{i} <|endoftext|>" for i in range(7)]


def test_cache_is_used_until_data_tokenizer_or_settings_change(
    data, tokenizer, tokenizer_dir, tmp_path, tokenizations
):
    first = tokenize_dataset(data, tokenizer, 20)
    tokenizer("x", truncation=True, max_length=1)  # leaves its setting in the tokenizer
    again = tokenize_dataset(data, tokenizer, 20)
    assert len(tokenizations) == 1
    assert first.fingerprint == again.fingerprint
    np.testing.assert_array_equal(first.tokens, again.tokens)

    assert tokenize_dataset(data, tokenizer, 6).lengths.tolist() == [5, 6, 6]
    other_dir = tmp_path / "other"
    shutil.copytree(tokenizer_dir, other_dir)
    other = load_tokenizer(str(other_dir))
    other.add_tokens(["cc"])
    assert tokenize_dataset(data, other, 20).lengths.tolist() == [5, 5, 6]
    write(tmp_path / "data.jsonl", ROWS[:2])
    changed = tokenize_dataset(data, tokenizer, 20)
    assert len(changed) == 2
    assert changed.fingerprint != first.fingerprint
    assert len(tokenizations) == 4


def test_identity_names_the_part_that_changed(
    data, tokenizer, tokenizer_dir, tmp_path, cache, monkeypatch
):
    def identity(file=data, tokenizer=tokenizer, max_seq_length=20):
        return tokenize_dataset(file, tokenizer, max_seq_length).identity()

    original = identity()
    other_tokenizer = load_tokenizer(str(tokenizer_dir))
    other_tokenizer.add_tokens(["cc"])
    rules = module.RULES_VERSION

    def changed(actual):
        return [name for name in original if actual[name] != original[name]]

    assert changed(identity(tokenizer=other_tokenizer)) == ["tokenizer"]
    assert changed(identity(max_seq_length=19)) == ["max_seq_length"]
    assert changed(identity(write(tmp_path / "other.jsonl", ROWS[::-1]))) == ["content"]
    # A new layout of the cache is no new data: the rows are tokenised anew, into another directory.
    monkeypatch.setattr(module, "_CACHE_VERSION", module._CACHE_VERSION + 1)
    assert changed(identity()) == []
    assert len(list((cache / "tokenized").iterdir())) == 5
    monkeypatch.setattr(module, "RULES_VERSION", rules + 1)
    assert changed(identity()) == ["rules"]
    assert json.loads(json.dumps(original)) == original


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing", "no_json"])
def test_damaged_cache_is_rebuilt(data, tokenizer, cache, tokenizations, damage):
    first = tokenize_dataset(data, tokenizer, 20)
    tokens = np.array(first.tokens)
    (file,) = cache.rglob("tokens.npy")
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-4])
    elif damage == "altered":
        file.write_bytes(file.read_bytes()[:-4] + b"\7\0\0\0")
    elif damage == "missing":
        file.unlink()
    else:
        file.with_name("meta.json").write_text("{")
    again = tokenize_dataset(data, tokenizer, 20)
    np.testing.assert_array_equal(again.tokens, tokens)
    assert len(tokenizations) == 2
    tokenize_dataset(data, tokenizer, 20)
    assert len(tokenizations) == 2
    assert len(list((cache / "tokenized").iterdir())) == 1


def test_second_of_two_writers_keeps_the_first_result(tmp_path):
    arrays = {"a": np.arange(3)}
    save_arrays(tmp_path / "x", arrays, {"from": 1})
    save_arrays(tmp_path / "x", arrays, {"from": 2})
    assert load_arrays(tmp_path / "x")[1] == {"from": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_default_cache_is_in_the_home_directory(data, tokenizer, tmp_path, monkeypatch):
    monkeypatch.delenv("OLMOE_JAX_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    tokenize_dataset(data, tokenizer, 20)
    assert (tmp_path / ".cache/olmoe_jax/tokenized").is_dir()


def test_errors_are_one_line_for_the_user(tokenizer, tmp_path, cache, monkeypatch):
    data = write(tmp_path / "a.jsonl", [ROWS[0], {"text": "x"}])
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: unknown fields"):
        tokenize_dataset(data, tokenizer, 20)
    data = write(tmp_path / "b.jsonl", ROWS[3:])
    with pytest.raises(UserError, match=r"max_seq_length=20; raise data\.max_seq_length"):
        tokenize_dataset(data, tokenizer, 20)
    (tmp_path / "file").write_text("")
    data = write(tmp_path / "c.jsonl", ROWS)
    assert not cache.exists()
    monkeypatch.setenv("OLMOE_JAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot write the token cache"):
        tokenize_dataset(data, tokenizer, 20)


def test_held_out_split(make_dataset):
    dataset = make_dataset([3] * 50)
    train, evaluation = held_out_split(dataset, 0.1, seed=7)
    assert (len(train), len(evaluation)) == (45, 5)
    assert sorted([*train.rows, *evaluation.rows]) == list(range(50))
    assert train.tokens is dataset.tokens
    first, same = evaluation.example(0), dataset.example(evaluation.rows[0])
    np.testing.assert_array_equal(first.tokens, same.tokens)
    again, _ = held_out_split(dataset, 0.1, seed=7)
    other, _ = held_out_split(dataset, 0.1, seed=8)
    assert train.fingerprint == again.fingerprint != other.fingerprint
    different = train.identity().items() ^ other.identity().items()
    assert {name for name, _ in different} == {"split"}
    assert [len(part) for part in held_out_split(make_dataset([3, 3]), 0.01, seed=0)] == [1, 1]
    with pytest.raises(UserError, match=r"set data\.eval_path"):
        held_out_split(make_dataset([3]), 0.1, seed=0)


def test_tokenizers_that_do_not_work_are_refused(tokenizer_dir, tmp_path):
    with pytest.raises(UserError, match="no tokenizer directory"):
        load_tokenizer(str(tmp_path / "none"))
    with pytest.raises(UserError, match="cannot load a tokenizer"):
        load_tokenizer(str(tmp_path))
    no_eos = tmp_path / "no_eos"
    no_eos.mkdir()
    shutil.copy(tokenizer_dir / "tokenizer.json", no_eos)
    (no_eos / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    with pytest.raises(UserError, match="no end-of-text token"):
        load_tokenizer(str(no_eos))
