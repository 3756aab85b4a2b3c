import json

import pytest

from olmoe_jax.data.reading import content_digest, is_local, read_rows, row_location
from olmoe_jax.errors import UserError

ROWS = [{"prompt": "é \u2028", "completion": "1"}, {"prompt": "b", "completion": "2"}]
LINES = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", LINES.encode()),
        ("bom.jsonl", b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").encode()),
        ("lines.json", LINES.encode()),
        ("list.json", b"\xef\xbb\xbf" + json.dumps(ROWS, indent=1).encode()),
    ],
)
def test_json_files(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    assert read_rows(str(path)) == ROWS
    location = "row 2" if name == "list.json" else "line 3"
    assert row_location(str(path), 1) == location


def test_parquet_file(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert read_rows(str(path)) == ROWS
    assert row_location(str(path), 1) == "row 2"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "no data file at"),
        ("empty.jsonl", b"", "is empty"),
        ("blank.jsonl", b"\n \n", "is empty"),
        ("empty.json", b"", "is empty"),
        ("list.json", b"[]", "is empty"),
        ("bad.jsonl", b'{"a": 1}\n\n{"a": \n', "not JSON at line 3"),
        ("bad.json", b'[{"a": 1},\n{"a" 1}]', "not JSON at line 2"),
        ("array.jsonl", b'{"a": 1}\n[1]', "line 2 is not a JSON object"),
        ("items.json", b'[{"a": 1}, 2]', "row 2 is not a JSON object"),
        ("latin.jsonl", b'{"a": 1}\n{"a": "\xe9"}', "not UTF-8 text at line 2"),
        ("latin.json", b'[{"a": 1},\n{"a": "\xe9"}]', "not UTF-8 text at line 2"),
        ("table.csv", b"a,b", r"use .jsonl, .json or .parquet"),
        ("bad.parquet", b"PAR1", "not a Parquet file"),
    ],
)
def test_bad_files_name_the_file_and_the_line(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_rows(str(path))
    assert name in str(error.value)


def test_directory_and_nonsense_are_refused(tmp_path):
    with pytest.raises(UserError, match="is a directory"):
        read_rows(str(tmp_path))
    with pytest.raises(UserError, match="no hub id"):
        read_rows("train")


def test_local_files_and_hub_ids_are_told_apart():
    assert is_local("train.jsonl")
    assert is_local("data/train.parquet")
    assert is_local("./owner/name")
    assert not is_local("owner/name")
    assert not is_local("owner/name:train.jsonl")


def test_hub_data_sets_are_loaded_by_file_or_split(monkeypatch):
    import datasets

    calls = []

    def load_dataset(name, **arguments):
        calls.append((name, arguments))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_rows("owner/name:test.jsonl", "test") == ROWS
    assert read_rows("owner/name", "test") == ROWS
    assert calls == [
        ("owner/name", {"data_files": "test.jsonl", "split": "train"}),
        ("owner/name", {"split": "test"}),
    ]
    assert content_digest("owner/name") == content_digest("owner/name")


def test_unreachable_hub_is_one_clear_line(monkeypatch):
    import datasets

    def load_dataset(name, **arguments):
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"cannot load owner/name .*\(no network\)"):
        read_rows("owner/name")
