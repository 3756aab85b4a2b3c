import json
import os
import shutil

import numpy as np
import pytest

from olmoe_jax.data import formats, held_out_split, load_tokenizer, tokenize_dataset
from olmoe_jax.data import tokenized as module
from olmoe_jax.data.cache import load_arrays, save_arrays
from olmoe_jax.data.counts import Counts
from olmoe_jax.data.formats import encode_batch, format_row
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
    assert len(dataset) == 3
    assert dataset.counts == Counts(rows=4, dropped=1, cut=1, tokens=18, trained=12)
    assert dataset.lengths.tolist() == [5, 6, 7]
    assert dataset.target_counts.tolist() == [3, 4, 5]
    example = dataset.subset([2, 1]).example(1)
    assert tokenizer.decode(example.tokens) == "ab cc<|endoftext|>"
    assert example.in_loss.tolist() == [False, False, True, True, True, True]
    assert example.prompt_length == 2
    assert (dataset.tokens.dtype, dataset.in_loss.dtype) == (np.int32, bool)
    assert dataset.offsets.dtype == np.int64


def test_answers_that_say_nothing_are_counted(tokenizer, tmp_path):
    """They train, to end at once."""
    asked = {"role": "user", "content": "q"}
    rows = [{"prompt": "a", "completion": text} for text in ("", " ", "b", "x" * 50)]
    rows += [{"messages": [asked, {"role": "assistant", "content": text}]} for text in ("", "b")]
    dataset = tokenize_dataset(write(tmp_path / "data.jsonl", rows), tokenizer, 20)
    assert (len(dataset), dataset.counts.empty) == (6, 3)
    assert dataset.counts.describe(20).endswith("the end of an answer, 3 with an empty answer")


@pytest.mark.parametrize("limit", ["_BATCH_ROWS", "LONG_TEXT"])
def test_more_rows_than_one_tokenizer_call(tokenizer, tmp_path, monkeypatch, limit):
    data = write(tmp_path / "data.jsonl", [{"prompt": str(i), "completion": ""} for i in range(7)])
    monkeypatch.setattr(module, limit, 3)
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
    assert first.identity() == again.identity()
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
    assert changed.identity() != first.identity()
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
    (file,) = cache.rglob("tokens")
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-4])
    elif damage == "altered":
        file.write_bytes(file.read_bytes()[:-4] + b"\7\0\0\0")
    elif damage == "missing":
        file.unlink()
    else:
        file.with_name("checks.json").write_text("{")
    again = tokenize_dataset(data, tokenizer, 20)
    np.testing.assert_array_equal(again.tokens, tokens)
    assert len(tokenizations) == 2
    tokenize_dataset(data, tokenizer, 20)
    assert len(tokenizations) == 2
    assert len(list((cache / "tokenized").iterdir())) == 1


def test_no_damage_of_the_cache_changes_an_array(tmp_path):
    """One bit flipped in any byte, and other things in place of the files."""
    dtypes = {"a": np.int32, "b": np.bool_}
    arrays = {"a": np.arange(40, dtype=np.int32), "b": np.arange(9) % 2 == 0}
    save_arrays(tmp_path / "x", dtypes, [arrays])

    def same():
        loaded = load_arrays(tmp_path / "x", dtypes)
        return loaded and all(np.array_equal(loaded[name], arrays[name]) for name in arrays)

    assert same()
    for file in [*(tmp_path / "x").iterdir()]:
        content = file.read_bytes()
        for index in range(len(content)):
            changed = bytearray(content)
            changed[index] ^= 1 << index % 8
            file.write_bytes(changed)
            assert same() is not False
            assert file.name == "checks.json" or same() is None
        file.unlink()
        for make in (os.mkfifo, os.mkdir, lambda file: file.symlink_to(file)):
            make(file)
            assert same() is None
            file.rmdir() if file.is_dir() else file.unlink()
        file.write_bytes(content)
    assert same()


def test_second_of_two_writers_keeps_the_first_result(tmp_path):
    for first in (1, 2):
        parts = [{"a": np.array([first])}, {"a": np.array([5])}]
        save_arrays(tmp_path / "x", {"a": np.int64}, parts)
    assert load_arrays(tmp_path / "x", {"a": np.int64})["a"].tolist() == [1, 5]
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_default_cache_is_in_the_home_directory(data, tokenizer, tmp_path, monkeypatch):
    monkeypatch.delenv("OLMOE_JAX_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    tokenize_dataset(data, tokenizer, 20)
    assert (tmp_path / ".cache/olmoe_jax/tokenized").is_dir()


def test_errors_are_one_line_for_the_user(tokenizer, tmp_path, cache, monkeypatch):
    data = write(tmp_path / "a.jsonl", [ROWS[0], {"txt": "x"}])
    with pytest.raises(UserError, match=r"a\.jsonl: line 2: unknown fields"):
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
    assert sorted([*train.members, *evaluation.members]) == list(range(50))
    assert train.tokens is dataset.tokens
    first, same = evaluation.example(0), dataset.example(evaluation.members[0])
    np.testing.assert_array_equal(first.tokens, same.tokens)
    again, _ = held_out_split(dataset, 0.1, seed=7)
    other, _ = held_out_split(dataset, 0.1, seed=8)
    assert train.identity() == again.identity() != other.identity()
    different = train.identity().items() ^ other.identity().items()
    assert {name for name, _ in different} == {"split"}
    assert [len(part) for part in held_out_split(make_dataset([3, 3]), 0.01, seed=0)] == [1, 1]
    with pytest.raises(UserError, match=r"set data\.eval_path"):
        held_out_split(make_dataset([3]), 0.1, seed=0)


def test_tokenizers_that_do_not_work_are_refused(tokenizer_dir, tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        load_tokenizer(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"tokenizer\.json: no such file"):
        load_tokenizer(str(tmp_path))
    no_eos = tmp_path / "no_eos"
    no_eos.mkdir()
    shutil.copy(tokenizer_dir / "tokenizer.json", no_eos)
    (no_eos / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    with pytest.raises(UserError, match="end-of-text token"):
        load_tokenizer(str(no_eos))


@pytest.mark.parametrize("value", [[], {}, "4096", None, 1e308, {"__type": "AddedToken"}])
def test_the_tokenizers_own_limit_does_not_count(tokenizer_dir, tmp_path, value):
    shutil.copytree(tokenizer_dir, tmp_path / "it")
    settings = json.loads((tmp_path / "it/tokenizer_config.json").read_text())
    (tmp_path / "it/tokenizer_config.json").write_text(
        json.dumps(settings | {"model_max_length": value})
    )
    assert len(load_tokenizer(str(tmp_path / "it"))("a" * 5000).input_ids) == 5000


def test_a_panic_in_the_library_is_one_line(tokenizer_dir, tmp_path, capfd):
    """Rust prints a page, and its exception is none that `except Exception` catches."""
    shutil.copytree(tokenizer_dir, tmp_path / "it")
    content = json.loads((tmp_path / "it/tokenizer.json").read_text())
    broken = content | {"pre_tokenizer": {"type": "FixedLength", "length": 0}}
    (tmp_path / "it/tokenizer.json").write_text(json.dumps(broken))
    with pytest.raises(UserError, match=r"does not work .*chunk size must be non-zero"):
        load_tokenizer(str(tmp_path / "it"))
    assert capfd.readouterr().err == ""


BROKEN_TOKENIZERS = {
    "no_unknown": {"type": "WordLevel", "vocab": {"a": 1}, "unk_token": "?"},
    "unigram": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": None},
    "type": {"type": "BPE", "vocab": [], "merges": 5},
}


@pytest.mark.parametrize("name", BROKEN_TOKENIZERS)
def test_tokenizers_that_the_library_refuses(tokenizer_dir, tmp_path, name):
    shutil.copytree(tokenizer_dir, tmp_path / "it")
    content = json.loads((tmp_path / "it/tokenizer.json").read_text())
    (tmp_path / "it/tokenizer.json").write_text(
        json.dumps(content | {"model": BROKEN_TOKENIZERS[name]})
    )
    with pytest.raises(UserError, match=r"tokenizer\.json: the tokenizer does not work"):
        load_tokenizer(str(tmp_path / "it"))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizer_files_that_are_no_files(tokenizer_dir, tmp_path, name):
    shutil.copytree(tokenizer_dir, tmp_path / "it")
    (tmp_path / "it" / name).unlink()
    os.mkfifo(tmp_path / "it" / name)
    with pytest.raises(UserError, match=f"{name}: a FIFO or device"):
        load_tokenizer(str(tmp_path / "it"))


def test_a_long_text_is_tokenised_as_far_as_it_trains(tokenizer, tmp_path, monkeypatch):
    rows = [
        {"prompt": "abc " * 9, "completion": "d" * 60},
        {"prompt": "q" * 400, "completion": "x"},
        {"messages": [{"role": r, "content": "hi " * 3} for r in ("user", "assistant")] * 9},
        {"prompt": "a", "completion": "b"},
    ]
    texts = [format_row(row, tokenizer.eos_token) for row in rows]
    lengths = []

    def counted(texts, **settings):
        lengths.extend(map(len, texts))
        return tokenizer(texts, **settings)

    counted.added_tokens_decoder = tokenizer.added_tokens_decoder
    counted.backend_tokenizer = tokenizer.backend_tokenizer
    for max_seq_length in (5, 20, 90):
        whole = [*encode_batch(texts, tokenizer, max_seq_length)]
        monkeypatch.setattr(formats, "_WHOLE_TEXT", 32)
        parts = [*encode_batch(texts, counted, max_seq_length)]
        monkeypatch.undo()
        assert max(lengths) <= max(32, 16 * max_seq_length)
        for one, other in zip(whole, parts, strict=True):
            np.testing.assert_array_equal(one.tokens, other.tokens)
            np.testing.assert_array_equal(one.in_loss, other.in_loss)
            assert one.prompt_length == other.prompt_length
