"""Files that others wrote, the paths to them, and how a command ends."""

import dataclasses
import errno
import os
import sys
from typing import Annotated, Any

import pydantic
import pytest
from helpers import run_command_line

from olmoe_jax.errors import UserError, printable, run_command
from olmoe_jax.files import (
    LINE_LIMIT,
    STRICT,
    FileName,
    Size,
    decode,
    expand,
    read_bytes,
    read_json,
    read_lines,
    read_text,
)


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True)
class Example:
    size: Size
    share: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.5
    names: dict[str, FileName] = dataclasses.field(default_factory=dict)
    rest: Any = None


def test_a_declared_file(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"size": 3, "share": 1, "names": {"a": "b.bin"}, "unknown": [1]}')
    assert read_json(Example, file) == Example(3, 1.0, {"a": "b.bin"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not JSON (EOF while parsing a value at column 0)"),
        ("[" * 100_000, "not JSON (recursion limit exceeded at column 202)"),
        ('{\n"a" 1}', "not JSON (expected `:` at line 2 column 5)"),
        ('{"size": 1, "rest": ' + '{"a":' * 100_000, "not JSON (recursion limit exceeded"),
        (f'{{"size": 1, "rest": 1{"0" * 5000}}}', "not JSON (number out of range"),
        (b'{"size": 1, "rest": "\xff"}', "not JSON (invalid unicode code point"),
        (r'{"size": 1, "rest": "\ud800"}', "not JSON ("),
        ("[1]", "the content is [1]; it must be an object"),
        ("null", "the content is null; it must be an object"),
        ("{}", "field size is missing"),
        ('{"size": "3"}', 'size is "3"; it must be a whole number'),
        ('{"size": true}', "size is true; it must be a whole number"),
        ('{"size": 3.0}', "size is 3.0; it must be a whole number"),
        ('{"size": 0}', "size is 0; it must be greater than 0"),
        (f'{{"size": 1{"0" * 200}}}', f"size is 1{'0' * 58}…; it must be less than 2147483648"),
        ('{"size": 1, "share": NaN}', "share is NaN; it must be a finite number"),
        ('{"size": 1, "share": 1e999}', "share is Infinity; it must be a finite number"),
        ('{"size": 1, "share": 1e308}', "share is 1e+308; it must be less than or equal to 1"),
        ('{"size": 1, "names": []}', "names is []; it must be an object"),
        ('{"size": 1, "names": {"a": ""}}', 'names.a is ""; it must be the name of a file'),
        ('{"size": 1, "names": {"a": "../b"}}', 'names.a is "../b"; it must be the name of a'),
        ('{"size": 1, "names": {"a": "b\\u0000"}}', "names.a is "),
        ('{"size": %s}' % ([1] * 100), "size is a list; it must be a whole number"),
    ],
)
def test_what_is_wrong_is_named(content, message):
    with pytest.raises(UserError) as caught:
        decode(Example, content, "a.json")
    assert str(caught.value).startswith(f"a.json: {message}")


def make_fifo(path):
    os.mkfifo(path)


def make_loop(path):
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file or directory; check the path"),
        (lambda path: path.mkdir(), "a directory, not a file"),
        (make_fifo, "a FIFO or device, not a file"),
        (make_loop, "its symbolic links lead in a circle"),
        (lambda path: path.write_bytes(b"x" * 100), "larger than"),
        (lambda path: path.symlink_to("/dev/zero"), "a FIFO or device, not a file"),
    ],
)
def test_a_path_that_cannot_be_read(tmp_path, make, message):
    make(tmp_path / "it")
    with pytest.raises(UserError, match=r"/it: .*" + message):
        read_bytes(tmp_path / "it", limit=99)


def test_a_name_too_long_and_a_file_as_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file name too long; write a shorter path"):
        read_bytes(tmp_path / ("a" * 300))
    with pytest.raises(UserError, match="not a directory; a part of the path is a file"):
        read_bytes(tmp_path / "file" / "a")


def test_lines(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\xef\xbb\xbf1\r\n\n 2 \n" + "3\u2028".encode())
    assert [*read_lines(file)] == [(1, b"1"), (3, b"2"), (4, "3\u2028".encode())]
    file.write_bytes(b"1\n" + b"x" * (LINE_LIMIT + 1))
    with pytest.raises(UserError, match="line 2 is longer than 8 MiB"):
        [*read_lines(file)]


def test_text(tmp_path):
    file = tmp_path / "text"
    file.write_bytes("\ufeffä".encode())
    assert read_text(file) == "ä"
    file.write_bytes(b"a\nb\xe4")
    with pytest.raises(UserError, match="not UTF-8 text at line 2"):
        read_text(file)


def test_paths_as_users_spell_them(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert expand("~/runs") == "/home/somebody/runs"
    assert expand("a~b") == "a~b"
    for path in ("", " ", "a\0b", "a\ud800", "~nobody_has_this_name/a"):
        with pytest.raises(UserError, match="write"):
            expand(path)


def test_text_for_a_terminal():
    assert printable("a\x1b[31m\u202eb\u2066\x9b\u2028\ud800\x00") == (
        r"a\x1b[31m\u202eb\u2066\x9b\u2028\ud800\x00"
    )
    assert printable("ä\t漢\n👩\u200d🚀 שלום") == "ä\t漢\n👩\u200d🚀 שלום"


def fail(error):
    raise error


@pytest.mark.parametrize(
    ("main", "code", "line"),
    [
        (lambda _: fail(UserError("a\n b\x1b")), 2, r"error: a b\x1b"),
        (
            lambda _: os.listdir("none/file"),
            2,
            "error: none/file: no such file or directory; check the",
        ),
        (lambda _: fail(OSError(errno.ENOSPC, "No space")), 2, "error: no space; make room"),
        (lambda _: fail(MemoryError()), 2, "error: not enough memory"),
        (lambda _: fail(KeyboardInterrupt()), 130, "interrupted"),
        (lambda _: {}["key"], 70, "error: this is a defect in olmoe_jax (KeyError: 'key'); please"),
        (
            lambda _: fail(OSError("what")),
            70,
            "error: this is a defect in olmoe_jax (OSError: what",
        ),
    ],
)
def test_how_a_command_ends(tmp_path, monkeypatch, capsys, main, code, line):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        run_command(main)
    stderr = capsys.readouterr().err
    assert ended.value.code == code
    assert stderr.startswith(line)
    assert len(stderr.splitlines()) == 1
    kept = [*tmp_path.iterdir()]
    assert len(kept) == (code == 70)
    for file in kept:
        assert str(file) in stderr
        assert "Traceback" in file.read_text()


def test_a_reader_that_goes():
    program = (
        "from olmoe_jax.errors import run_command; run_command(lambda _: print('line\\n' * 99999))"
    )
    shell = f'{sys.executable} -c "{program}" | head -1'
    _, stdout, stderr = run_command_line("-c", f"import os; os.system({shell!r})")
    assert (stdout, stderr) == ("line\n", "")
