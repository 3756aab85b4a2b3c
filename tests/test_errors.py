"""How a command ends: numbers of flags, long values, exceptions that resist being printed."""

import errno
import sys

import pytest

from olmoe_jax import errors
from olmoe_jax.errors import ArgumentParser, UserError, outcome, run_command, whole_number
from olmoe_jax.files import user_path


def flags(*arguments: str, kind=int):
    parser = ArgumentParser(prog="command")
    parser.add_argument("--flag", type=kind)
    return parser.parse_args(arguments).flag


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("9" * 5000, int, f"argument --flag: {'9' * 79}…: expected a whole number (see command"),
        ("9" * 19, int, f"argument --flag: {'9' * 19}: expected a whole number (see"),
        ("x", int, "argument --flag: x: expected a whole number (see"),
        ("", int, "argument --flag: : expected a whole number"),
        ("0", whole_number(1), "argument --flag: 0: expected a whole number, 1 or more (see"),
        ("11", whole_number(1, 10), "argument --flag: 11: expected a whole number, 1 to 10 (see"),
        ("nan", float, "argument --flag: nan: expected a number (see"),
        ("1e999", float, "argument --flag: 1e999: expected a number (see"),
    ],
)
def test_numbers_of_flags(text, kind, expected):
    with pytest.raises(UserError) as caught:
        flags(f"--flag={text}", kind=kind)
    assert str(caught.value).startswith(expected)


def test_paths_of_flags():
    with pytest.raises(UserError, match="argument --flag: a path is empty: write a file or dir"):
        flags("--flag=", kind=user_path)


def test_good_numbers_of_flags():
    assert flags("--flag=-3") == -3
    assert flags("--flag", "1e-3", kind=float) == 1e-3
    assert flags("--flag=1", kind=whole_number(1)) == 1


class UnprintableError(Exception):
    def __str__(self):
        raise RuntimeError


def raised_by(module: str, statement: str) -> BaseException:
    try:
        exec(statement, {"__name__": module})
    except Exception as error:
        return error
    raise AssertionError


NO_DEVICES = "error: jax cannot start its devices; check JAX_PLATFORMS, and see what `python -m"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("a" * 5000 + "; write b"), 2, f"error: {'a' * 800} … {'a' * 388}; write b"),
        (UserError("a\nb"), 2, "error: a b"),
        (RuntimeError("Unable to initialize backend 'x': no\n(set JAX_PLATFORMS)"), 2, NO_DEVICES),
        (raised_by("jax._src.xla_bridge", "assert None"), 2, NO_DEVICES),
        (raised_by("jax._src.other", "assert None"), 70, "error: this is a defect in olmoe_jax"),
        (OSError(errno.ELOOP, "Loop", "x"), 2, "error: x: loop; its symbolic links lead in a"),
        (OSError(errno.ENOSPC, "No space"), 2, "error: no space; make room, or write"),
        (MemoryError(), 2, "error: not enough memory; "),
        (RuntimeError("RESOURCE_EXHAUSTED: Out"), 2, "error: not enough memory; "),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError("no errno, no file"), 70, "error: this is a defect in olmoe_jax (OSError: no"),
        (
            UnprintableError(),
            70,
            "error: this is a defect in olmoe_jax (UnprintableError: <",
        ),
    ],
)
def test_outcome(monkeypatch, tmp_path, error, code, line):
    monkeypatch.setattr(errors.tempfile, "tempdir", str(tmp_path))
    found, text = outcome(error)
    assert found == code
    assert text.startswith(line)
    assert "\n" not in text
    assert len(text) < 1300
    assert len(list(tmp_path.iterdir())) == (code == 70)


def test_an_argument_that_is_no_text(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["command", "--output=a\udcff"])
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, getattr(sys, stream))
    with pytest.raises(SystemExit) as caught:
        run_command(pytest.fail)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: --output=a\\udcff: is not UTF-8 text; write another\n"
