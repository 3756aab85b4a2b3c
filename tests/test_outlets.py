"""One nasty text through every outlet: terminal, pipe, report, TensorBoard."""

import os
import subprocess
import sys

import pytest
from helpers import ROOT

from olmoe_jax.errors import printable

NASTY = "a\x1b]0;b\x07c\x9b2J\u202ed\u2067\x00\ud800|\r\ne</pre>`$x$[l](javascript:f)"
PROGRAM = f"""
import sys
from olmoe_jax.errors import UserError, data_output, run_command
NASTY = {NASTY!a}

def main(_):
    CODE

run_command(main)
"""
ESCAPED = printable(NASTY).encode() + b"\n"
EXACT = NASTY.encode(errors="backslashreplace") + b"\n"


def assert_harmless(text: str) -> None:
    assert "a\\x1b]0;b" in text
    assert not set("\x1b\x07\x9b\u202e\u2067\x00\ud800\r") & set(text)


def run(code: str, **streams) -> subprocess.CompletedProcess:
    program = [sys.executable, "-c", PROGRAM.replace("CODE", code)]
    return subprocess.run(program, cwd=ROOT, timeout=60, check=False, **streams)


@pytest.mark.parametrize(
    ("code", "stdout", "stderr"),
    [
        ("print(NASTY)", ESCAPED, b""),
        ("sys.stdout.writelines([NASTY, '\\n'])", ESCAPED, b""),
        ("print(NASTY, file=data_output())", EXACT, b""),
        ("print(NASTY, file=sys.stderr)", b"", ESCAPED),
        ("raise UserError(NASTY)", b"", b"error: " + ESCAPED.replace(b"\\x0d\n", b" ", 1)),
        # A progress bar begins a line anew, and goes up where several bars stand.
        (
            "print('\\r\\x1b[A\\x1b[A' + NASTY, file=sys.stderr)",
            b"",
            b"\r\x1b[A\x1b[A" + ESCAPED,
        ),
    ],
)
def test_a_pipe_gets_escapes_but_exact_data(code, stdout, stderr):
    result = run(code, capture_output=True)
    assert (result.stdout, result.stderr) == (stdout, stderr)


def test_a_terminal_gets_escapes_in_data_too():
    terminal, stream = os.openpty()
    run("print(NASTY, file=data_output())", stdout=stream)
    os.close(stream)
    assert os.read(terminal, 10_000).replace(b"\r\n", b"\n") == ESCAPED


def test_a_closed_output_is_no_defect():
    shell = ["sh", "-c", f'{sys.executable} -c "$0" >&-', PROGRAM.replace("CODE", "print(NASTY)")]
    result = subprocess.run(shell, cwd=ROOT, capture_output=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (0, b"")
