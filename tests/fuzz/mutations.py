"""Hypothesis strategies that damage files as people, editors, disks and attackers do.

A JSON document is damaged at one of its values, so that what is left still decodes; any file is
damaged in its bytes, or replaced by something that is no file.
"""

import dataclasses
import io
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

INSTEAD = ("missing", "directory", "fifo", "loop", "dangling", "/dev/zero", "/dev/null", "/")
"""What can stand where a file was: the last three are the targets of a symbolic link."""


@dataclasses.dataclass(frozen=True)
class Damage:
    """One damaged file of an input.

    Attributes:
      file: its path relative to the input's directory.
      content: its bytes, or one of `INSTEAD`.
    """

    file: str
    content: bytes | str

    def apply(self, directory: Path) -> None:
        """Damages the file in `directory`."""
        path = directory / self.file
        path.unlink()
        if isinstance(self.content, bytes):
            path.write_bytes(self.content)
        elif self.content == "directory":
            path.mkdir()
        elif self.content == "fifo":
            os.mkfifo(path)
        elif self.content == "loop":
            path.symlink_to(path.name)
        elif self.content == "dangling":
            path.symlink_to("nowhere")
        elif self.content != "missing":
            path.symlink_to(self.content)


class Raw(str):
    """JSON text that json.dumps would not write."""


VALUES = (
    *(None, True, False, 0, 1, -1, 2, 0.5, -0.5, 7.0, 255, 65536, 1e-320, 1e308),
    *(2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, -(2**63) - 1, 10**30),
    *(
        "",
        " ",
        "0",
        "1.5",
        "true",
        "null",
        "NaN",
        ".",
        "..",
        "/",
        "a/b",
        "../x",
        "~",
        "~nobody-x/a",
    ),
    *("\0", "\x1b[2J", "\u202eabc", "\u2028", "é" * 200, "x" * 300, "%s{}{0}", "\\", '"', "<b>&"),
    *([], {}, [None], [[]], [0, 1, 2], {"": None}, {"0": 0}, {"a": {"b": {"c": []}}}),
    *(Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1e999"), Raw("-0"), Raw("1E5")),
    *(Raw("1" * 5000), Raw("0." + "1" * 5000), Raw('"\\ud800"'), Raw('"\\u0000"'), Raw("")),
    *(Raw("[" * 100_000 + "]" * 100_000), Raw('{"a":' * 100_000 + "1" + "}" * 100_000)),
    *(Raw('"' + "x" * (1 << 20) + '"'), Raw("[" + "0," * 200_000 + "0]")),
    *(Raw('{"a": 1, "a": 2}'), Raw("'x'"), Raw("True"), Raw("1,"), Raw("/**/ 1")),
)
"""What can stand where a JSON value was."""


def json_texts(document: Any) -> st.SearchStrategy[bytes]:
    """Strategy of texts of a JSON document with one or two damaged values."""
    return st.lists(st.tuples(_places(document), _edits()), min_size=1, max_size=2).map(
        lambda edits: _text(document, edits)
    )


def _places(document: Any) -> st.SearchStrategy[tuple]:
    return st.sampled_from(list(_walk(document)))


def _walk(value: Any, path: tuple = ()):
    yield path
    if isinstance(value, dict):
        inside = value.items()
    else:
        inside = enumerate(value[:20]) if isinstance(value, list) else ()
    for key, child in inside:
        yield from _walk(child, (*path, key))


def _edits() -> st.SearchStrategy[tuple[str, Any]]:
    return st.one_of(
        st.tuples(st.just("replace"), st.sampled_from(VALUES)),
        st.tuples(st.just("replace"), st.integers(-(2**70), 2**70)),
        st.tuples(st.just("replace"), st.text(max_size=20)),
        st.tuples(st.just("add"), st.sampled_from(VALUES)),
        st.tuples(st.just("rename"), st.sampled_from(["", "x" * 300, "\x1b[1m", "0", "-1"])),
        st.tuples(st.sampled_from(["remove", "wrap", "unwrap", "twice", "type"]), st.none()),
    )


def _text(document: Any, edits: list[tuple[tuple, tuple[str, Any]]]) -> bytes:
    """Returns the document's JSON after the edits; an edit whose place is gone does nothing."""
    root = {"": json.loads(json.dumps(document))}
    raw: list[str] = []
    for path, (kind, value) in edits:
        *parents, last = ("", *path)
        inside: Any = root
        try:
            for key in parents:
                inside = inside[key]
            old = inside[last]
            inside[last] = old  # not into a text, which an edit before put there
        except (KeyError, IndexError, TypeError):
            continue
        new = value
        if isinstance(value, Raw):
            raw.append(value)
            new = f"@@{len(raw) - 1}@@"
        if kind == "replace":
            inside[last] = new
        elif kind == "add":
            if isinstance(old, dict):
                old["added"] = new
            elif isinstance(old, list):
                old.append(new)
            else:
                inside[last] = [old, new]
        elif kind in ("remove", "rename") and last != "":
            removed = inside.pop(last)
            if kind == "rename" and isinstance(inside, dict):
                inside[value] = removed
        elif kind == "unwrap" and isinstance(old, dict | list) and old:
            inside[last] = next(iter(old.values())) if isinstance(old, dict) else old[0]
        elif kind == "twice":
            inside[last] = [old, old]
        elif kind == "type":
            inside[last] = {int: float, float: str, str: len, bool: str}.get(type(old), bool)(old)
        else:
            inside[last] = {"value": old}
    text = json.dumps(root.get(""))
    for number, content in enumerate(raw):
        text = text.replace(f'"@@{number}@@"', content)
    return text.encode("utf-8", "surrogatepass")


def byte_texts(content: bytes) -> st.SearchStrategy[bytes]:
    """Strategy of the file's bytes with one fault."""
    size = len(content)
    places = st.integers(0, max(size - 1, 0))

    def flip(place: int, bit: int) -> bytes:
        if not size:
            return b"\0"
        return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]

    def splice(place: int, length: int, inserted: bytes) -> bytes:
        return content[:place] + inserted + content[place + length :]

    odd = [
        b"",
        b"\0",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\r",
        b"\n\n",
        "\u2028".encode(),
        b'"',
        b"{",
        b"]",
    ]
    whole = [b"", b"\0" * size, b"null", b"[]", b"{}", b"0", b"\n", b"\xef\xbb\xbf" + content]
    whole += [content * 2, content.decode("latin-1").encode("utf-16"), b"PK\3\4", b"\x1f\x8b\x08"]
    whole += [content.replace(b"\n", b"\r\n"), content.replace(b"\n", b"\r")]
    return st.one_of(
        st.builds(flip, places, st.integers(0, 7)),
        places.map(lambda place: content[:place]),
        st.builds(splice, places, st.integers(0, 64), st.sampled_from(odd)),
        st.builds(splice, places, st.just(0), st.binary(min_size=1, max_size=8)),
        st.sampled_from(whole),
    )


def damaged(files: Mapping[str, bytes]) -> st.SearchStrategy[Damage]:
    """Strategy of one damaged file among {relative path: content}."""
    return st.sampled_from(sorted(files)).flatmap(lambda name: _damaged(name, files[name]))


def _damaged(name: str, content: bytes) -> st.SearchStrategy[Damage]:
    anyhow = byte_texts(content) | st.sampled_from(INSTEAD)
    suffix = name.rpartition(".")[2]
    if suffix == "json":
        anyhow = json_texts(json.loads(content)) | json_texts(json.loads(content)) | anyhow
    elif suffix == "jsonl":
        anyhow = _json_lines(content) | _json_lines(content) | anyhow
    elif suffix == "safetensors":
        anyhow = _safetensors(content) | anyhow
    elif suffix == "parquet":
        anyhow = _parquet() | anyhow
    elif suffix == "py":
        anyhow = _python(content) | anyhow
    return anyhow.map(lambda damage: Damage(name, damage))


def _json_lines(content: bytes) -> st.SearchStrategy[bytes]:
    lines = content.splitlines()

    def replace(number: int) -> st.SearchStrategy[bytes]:
        def whole(line: bytes) -> bytes:
            return b"\n".join([*lines[:number], line, *lines[number + 1 :]]) + b"\n"

        long = b'{"prompt": "' + b"x" * (9 << 20) + b'"}'
        return (json_texts(json.loads(lines[number])) | st.just(long)).map(whole)

    return st.integers(0, len(lines) - 1).flatmap(replace)


def _safetensors(content: bytes) -> st.SearchStrategy[bytes]:
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    lengths = st.none() | st.sampled_from([0, 1, length - 1, length + 1, 1 << 31, 2**63, 2**64 - 1])

    def pack(text: bytes, said: int | None, kept: bytes) -> bytes:
        return struct.pack("<Q", len(text) if said is None else said) + text + kept

    texts = json_texts(header)
    special = st.sampled_from([float("nan"), float("inf"), 3e38]).map(
        lambda value: struct.pack("<f", value) * (len(data) // 4)
    )
    return st.builds(pack, texts, st.none() | lengths, st.just(data)) | special.map(
        lambda filled: pack(json.dumps(header).encode(), None, filled)
    )


def _columns(count: int) -> list[pa.Array]:
    """Columns of `count` rows of every kind that a row's field could be mistaken for."""
    text = pa.array(["a"] * count)
    lists, structs = [["a"]] * count, [{"role": "user", "content": "a"}] * count
    return [
        *(text, pa.nulls(count), pa.array([b"\xff\xfe"] * count)),
        pa.array([b"\xff\xfe"] * count).view(pa.string()),
        pa.array([2**53] * count).view(pa.timestamp("s")),
        pa.array([2**31 - 1] * count, pa.int32()).view(pa.date32()),
        pa.array([-(2**63)] * count).view(pa.duration("ns")),
        *(pa.array([value] * count) for value in (1, 1.5, float("nan"), True, "", "x" * 300)),
        *(pa.array(lists), pa.array(structs), pa.array([structs] * count), pa.array([[]] * count)),
        pa.array(["x" * (3 << 20)] * count),
        text.dictionary_encode(),
        pa.array([2**64 - 1] * count, pa.uint64()),
        pa.array([None if index % 2 else "a" for index in range(count)]),
    ]


def _parquet() -> st.SearchStrategy[bytes]:
    columns = st.sampled_from(_columns(3))
    names = st.sampled_from(
        [
            "prompt",
            "completion",
            "messages",
            "instruction",
            "output",
            "input",
            "other",
            "",
            "a" * 300,
        ]
    )

    def write(fields: list[tuple[str, pa.Array]]) -> bytes:
        stream = io.BytesIO()
        pq.write_table(pa.table([column for _, column in fields], [n for n, _ in fields]), stream)
        return stream.getvalue()

    named = st.lists(st.tuples(names, columns), max_size=4)
    whole = st.tuples(columns, columns).map(
        lambda pair: [*zip(("prompt", "completion"), pair, strict=True)]
    )
    return (named | whole | st.just([])).map(write)


_STATEMENTS = (
    *("raise SystemExit", "raise SystemExit(0)", "raise KeyboardInterrupt", "raise MemoryError"),
    *("raise BaseException", "raise Exception('a\\nb\\x1b[1m')", "1 / 0", "import missing_module"),
    *(
        "def get_config(): yield",
        "def get_config(): return None",
        "get_config = 3",
        "del get_config",
    ),
    *("class E(Exception):\n    def __str__(self): raise self\nraise E", "(", "\tx = 1", "return"),
    *("def get_config(): raise SystemExit(3)", "def get_config(a): return a", "x = '\\ud800'"),
    *("def get_config(): return get_config()", "import sys; sys.exit('bye')", "print('\\x1b[2J')"),
    *("async def get_config(): pass", "get_config = lambda: {}", "get_config = lambda: [1]"),
)


def _python(content: bytes) -> st.SearchStrategy[bytes]:
    lines = content.splitlines()
    return st.builds(
        lambda place, statement: b"\n".join([*lines[:place], statement.encode(), *lines[place:]]),
        st.integers(0, len(lines)),
        st.sampled_from(_STATEMENTS),
    )


PATHS = (
    *("", " ", ".", "..", "/", "//", "~", "~nobody-x/a", "a" * 300, "a/" * 3000, "/dev/null"),
    *("/dev/zero", "/dev/full", "/proc/self/mem", "/proc/1/x", "/sys/x", "a\0b", "a\nb", "\udcff"),
    *("{case}/loop", "{case}/fifo", "{case}/file/x", "{case}/file", "{case}", "-x", "é\u202e", "*"),
    *("hf://x", "https://example.com/x", "OWNER/NAME", "OWNER/NAME:train.jsonl", "{output_dir}/x"),
)
"""What can stand where a flag's path was; {case} is the input's directory."""
NUMBERS = ("", "0", "-1", "1.5", "1" * 5000, "nan", "inf", "1e9", "²", "١", "0x10", " 3 ", "None")
