"""One nasty text through every outlet: terminal, pipe, report, TensorBoard."""

import html
import os
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from helpers import ROOT
from tiny_report import write_evaluation, write_result, write_run

from eval.report.__main__ import main as write_report
from olmoe_jax.checkpoints.metrics import Metrics
from olmoe_jax.errors import printable
from olmoe_jax.plots import plot_losses
from olmoe_jax.training.event_file import EventFile

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


NAME = NASTY.translate(dict.fromkeys(map(ord, "\0\ud800/\n")))
"""What a directory can be called."""


def test_a_report_gets_escapes(tmp_path):
    run = write_run(tmp_path / NAME, NAME, f"{NAME}.jsonl")
    write_evaluation(run / "eval", str(run))
    written = NASTY.replace("\ud800", "")
    write_result(run / "eval", "gsm", "exact_match", [1.0], output=written)
    output = tmp_path / "report"
    write_report([str(run), "--output", str(output)])
    for file in output.iterdir():
        text = file.read_text()
        if file.suffix == ".svg":
            assert printable(NAME) in "".join(ElementTree.fromstring(text).itertext())
        assert_harmless(text)
    shown = printable(written.replace("\r\n", "\n"))
    assert f"```text\n{shown}\n```" in (output / "report.md").read_text()
    assert f"<pre>{html.escape(shown)}</pre>" in (output / "report.html").read_text()


def test_tensorboard_gets_escapes(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "events.out.tfevents.of_another").touch()
    file = EventFile(tmp_path)
    file.text("x", NASTY)
    file.hyperparameters({"method.name": NASTY, "train.seed": 0}, NASTY)
    file.close()
    events = EventAccumulator(str(tmp_path), {"tensors": 0}).Reload()
    (value,) = events.Tensors("x")[0].tensor_proto.string_val
    assert value.decode() == printable(NASTY)
    hyperparameters = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert hyperparameters.count(ESCAPED.strip()) == 2


def test_a_title_is_no_formula(tmp_path):
    plot_losses([Metrics(1, 2.0)], NAME + "$\\frac$", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").exists()
