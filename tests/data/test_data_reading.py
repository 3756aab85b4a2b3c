import gzip
import json
import os
import time

import pyarrow
import pyarrow.parquet
import pytest

from olmoe_jax.data import reading
from olmoe_jax.data.reading import content_digest, read_rows, read_source
from olmoe_jax.errors import UserError
from olmoe_jax.files import LINE_LIMIT
from olmoe_jax.sources import SUFFIXES, Source, is_local

ROWS = [{"prompt": "é \u2028", "completion": "1"}, {"prompt": "b", "completion": "2"}]


def zstd(content):
    """Content as a zstd file."""
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as file:
        file.write(content)
    return sink.getvalue().to_pybytes()


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
    second = "row 2" if name == "list.json" else "line 3"
    first = second[:-1] + "1"
    assert [*read_rows(str(path))] == [
        (f"{path}: {first}", ROWS[0]),
        (f"{path}: {second}", ROWS[1]),
    ]


def test_compressed_files_tables_folders_and_patterns(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    (tmp_path / "b.jsonl.zst").write_bytes(zstd(LINES.encode()))
    (tmp_path / "c.csv").write_text('\ufeffprompt,completion\n"é \u2028",1\n\n"b",2\n', "utf-8")
    (tmp_path / "notes.txt").write_text("no data")
    (tmp_path / "._a.jsonl.gz").write_text("no data, which a Mac writes beside a file")
    for path in (str(tmp_path), f"{tmp_path}/?.*", f"{tmp_path.parent}/{tmp_path.name}/**/?.*"):
        assert [row for _, row in read_rows(path)] == ROWS * 3
    assert [place for place, _ in read_rows(f"{tmp_path}/c.csv")] == [
        f"{tmp_path}/c.csv: line {number}" for number in (2, 4)
    ]
    first = content_digest(Source(str(tmp_path)))
    assert first == content_digest(Source(f"{tmp_path}/?.*"))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"{}"))
    assert first != content_digest(Source(str(tmp_path)))


def test_parquet_file(tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert [*read_rows(str(path))] == [(f"{path}: row 1", ROWS[0]), (f"{path}: row 2", ROWS[1])]


def test_a_struct_of_a_table_has_the_fields_that_its_row_gave_it(tmp_path):
    calls = [{"arguments": {"city": "Oslo"}}, {"arguments": {"unit": "C", "tags": [None, "x"]}}]
    rows = [{"messages": [{"tool_calls": [call]}]} for call in calls]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert [row for _, row in read_rows(str(path))] == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "no such file or directory"),
        ("empty.jsonl", b"", "is empty"),
        ("blank.jsonl", b"\n \n", "is empty"),
        ("empty.json", b"", "is empty"),
        ("list.json", b"[]", "is empty"),
        ("bad.jsonl", b'{"a": 1}\n\n{"a": \n', "line 3: not JSON"),
        ("bad.json", b'[{"a": 1},\n{"a" 1}]', "row 2 is not JSON"),
        (
            "array.jsonl",
            b'{"a": 1}\n[1]',
            r"line 2: the content is \[1\]; it must be an object; write one JSON object a line, or",
        ),
        ("nested.json", b'{\n "data": [{"a": 1}]\n}', r"line 1: not JSON \(.*; write one JSON obj"),
        ("within.jsonl", b'{"a": 1,}', r"line 1: not JSON \([^;]*\)$"),
        ("items.json", b'[{"a": 1}, 2]', "row 2 is not a JSON object"),
        (
            "latin.jsonl",
            b'{"a": 1}\n{"a": "\xe9"}',
            r"line 2: not JSON \(invalid unicode [^;]*\); save the file as UTF-8$",
        ),
        ("wide.jsonl", '{"a": 1}'.encode("utf-16"), r"line 1: not JSON \(.*; save the file as UTF"),
        ("latin.json", b'[{"a": 1},\n{"a": "\xe9"}]', "row 2 is not UTF-8 text"),
        ("integer.jsonl", b'{"a": 1}\n{"a": %b}' % (b"9" * 5000), "line 2: not JSON"),
        ("integer.json", b'[{"a": 1}, {"a": %b}]' % (b"9" * 5000), "row 2 is not JSON"),
        ("deep.jsonl", b'{"a": %b}' % (b"[" * 100_000), "line 1: not JSON"),
        ("deep.json", b'[{"a": %b}]' % (b"[" * 100_000), "row 1 is not JSON"),
        ("no_comma.json", b'[{"a": 1} {"a": 2}]', "not JSON after row 1"),
        ("comma.json", b'[{"a": 1},]', "row 2 is not JSON"),
        ("open.json", b'[{"a": 1}', "not JSON after row 1"),
        ("rest.json", b'[{"a": 1}] {', "not JSON after row 1"),
        ("long.jsonl", b'{}\n{"a": "%b"}' % (b"x" * LINE_LIMIT), "line 2 is longer than 8 MiB"),
        ("long.json", b'[{}, {"a": "%b"}]' % (b"x" * LINE_LIMIT), "row 2 is longer than 8 MiB"),
        ("endless.json", b'[{}, {"a": "%b"}]' % (b"x" * 4 * LINE_LIMIT), "row 2 is not JSON of at"),
        ("table.txt", b"a,b", r"use .jsonl, .json, .parquet, .csv"),
        ("table.csv", b"a,b", "is empty"),
        ("fields.csv", b"a,b\n1,2\n3", "line 3 has 1 fields, and the header 2"),
        ("excel.csv", b"prompt;completion\na,b;c\n", "the header is one column, prompt;compl"),
        ("latin.csv", b"a,b\n\xe9,2\n", "not UTF-8; save it as UTF-8"),
        ("twice.csv", b"a,b,a\n1,2,3\n", "the header has a twice"),
        ("index.csv", b",a,b\n0,1,2\n", "the header has a column without a name"),
        ("open.csv", b'a\n"x', "not CSV after line"),
        ("bad.jsonl.gz", b"x", "is no gzip file that is whole"),
        ("bad.jsonl.zst", b"x", "is no zstd file that is whole"),
        (
            "torn.jsonl.gz",
            gzip.compress(LINES.encode(), mtime=0)[:-12],
            "is no gzip file that is whole",
        ),
        ("torn.jsonl.zst", zstd(LINES.encode())[:-3], "is no zstd file that is whole"),
        ("bad.parquet", b"PAR1", "not a Parquet file"),
    ],
)
def test_bad_files_name_the_file_and_the_line(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        [*read_rows(str(path))]
    assert name in str(error.value)


PARQUET = {
    "text": (pyarrow.array([b"a", b"\xff"]).cast(pyarrow.string(), safe=False), "row 2 cannot be"),
    "date": (pyarrow.array([0, 2**30], pyarrow.int32()).cast(pyarrow.date32()), "row 2 cannot be"),
    "zone": (pyarrow.array([None, 0], pyarrow.timestamp("s", "No/Where")), "row 2 cannot be read"),
    "long": (pyarrow.array(["a", "x" * (LINE_LIMIT + 1)]), r"row 2 cannot be read \(longer than 8"),
}


@pytest.mark.parametrize("name", PARQUET)
def test_bad_parquet_cells_name_the_row(tmp_path, name):
    column, message = PARQUET[name]
    table = pyarrow.table({"prompt": column})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=rf"rows\.parquet: {message}"):
        [*read_rows(str(tmp_path / "rows.parquet"))]


def test_parquet_pages_too_large_for_memory(tmp_path, monkeypatch):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    monkeypatch.setattr(reading, "_PAGE_LIMIT", 10)
    with pytest.raises(UserError, match="with a smaller row group size"):
        [*read_rows(str(tmp_path / "rows.parquet"))]


def test_a_list_longer_than_the_window(tmp_path, monkeypatch):
    """The text of a list is read part by part; a part ends anywhere in a row."""
    monkeypatch.setattr(reading, "LINE_LIMIT", 100)
    rows = [{"prompt": "é" * (i % 60), "completion": str(i)} for i in range(200)]
    (tmp_path / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    assert [row for _, row in read_rows(str(tmp_path / "rows.json"))] == rows


def test_many_rows_and_many_columns_take_time_in_proportion(tmp_path):
    """40,000 rows of a list, and 20,000 columns: 4 s each, if one looks at all others."""
    rows = [{"prompt": "x" * 100, "completion": str(i)} for i in range(40_000)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    columns = [f"c{i}" for i in range(20_000)]
    (tmp_path / "wide.csv").write_text("\n".join([",".join(columns)] * 2))
    begin = time.process_time()
    assert [row for _, row in read_rows(str(tmp_path / "rows.json"))] == rows
    assert [row for _, row in read_rows(str(tmp_path / "wide.csv"))] == [
        dict(zip(columns, columns, strict=True))
    ]
    assert time.process_time() - begin < 2


def test_a_fifo_is_refused_at_once(tmp_path):
    for suffix in SUFFIXES:
        os.mkfifo(tmp_path / f"rows{suffix}")
        for read in (read_source, content_digest):
            with pytest.raises(UserError, match="a FIFO or device, not a file"):
                [*read(Source(str(tmp_path / f"rows{suffix}")))]


@pytest.mark.parametrize("name", ["data-00000-of-00001.arrow", "dataset_dict.json"])
def test_what_datasets_saved_is_refused(tmp_path, name):
    for file in (name, "dataset_info.json"):
        (tmp_path / file).write_text("{}")
    with pytest.raises(UserError, match=r"save_to_disk of `datasets` wrote: .* name that file"):
        [*read_rows(str(tmp_path))]


def test_directory_and_nonsense_are_refused(tmp_path):
    with pytest.raises(UserError, match="is a directory"):
        [*read_rows(str(tmp_path))]
    for path in ("train", "owner/name:"):
        with pytest.raises(UserError, match="no hub id"):
            [*read_rows(path)]


def test_local_files_and_hub_ids_are_told_apart():
    assert is_local("train.jsonl")
    assert is_local("data/train.parquet")
    assert is_local("./owner/name")
    assert is_local("shards/part-*")
    assert not is_local("owner/name")
    assert not is_local("owner/name:train.jsonl")
