"""`python -m olmoe_jax.generate`, and the function of the same name."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT, message_of, run_module
from training import processes

from olmoe_jax.generation import command


def main(arguments):
    """Runs the command without importing the module: its name is the function's."""
    spec = importlib.util.spec_from_file_location("command", ROOT / "olmoe_jax" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(arguments)


def test_the_name_stays_the_function():
    """Running the module or importing the package leaves `olmoe_jax.generate` the function."""
    code = "import olmoe_jax; from olmoe_jax import generate; print(olmoe_jax.generate.__module__)"
    program = [sys.executable, "-c", code]
    out = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "olmoe_jax.generation.decoding"


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["--prompt", "x"], "--model"),
        (["--model", "m"], "write --prompt TEXT"),
        (["--model", "m", "--prompts", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--model", "nowhere", "--prompt", "x"], "nowhere: no such directory"),
        (["--model", "m", "--prompt", "x", "--temprature", "1"], "--temprature"),
        (["--model", "m", "--prompt", "x", "--top_p", "0.9"], "--top_p=0.9: greedy decoding draws"),
        (["--model", "m", "--max_new_tokens", "9" * 18], "a whole number, 1 to 1048576"),
        (["--model", "m", "--prompts", "rows.jsonl"], "--prompts rows.jsonl: holds rows, where a"),
        (["--model", "m", "--chat", "--top_k", "5"], "--top_k=5: greedy decoding draws no token"),
    ],
)
def test_mistakes(arguments, culprit):
    assert culprit in message_of(main, arguments)


def test_escapes_that_a_shell_keeps(capsys):
    flags = ["--model", "nowhere", "--prompt", r"Q: 2?\nA:", "--stop", "\n", "--prompt", "a\\b"]
    message_of(main, flags)
    assert capsys.readouterr().err == (
        r"note: --prompt holds \n, a backslash and an n; where it is to end a line, write "
        "--prompt $'...\\n...'\n"
    )


def test_prompts_are_the_lines_of_the_file(tmp_path):
    """Only a newline ends a line: not U+2028, U+0085, form feed, nor vertical tab."""
    lines = ["a \u2028 b", "c \x85 d", "e \f f \v g", "h \x1c \r i", " j "]
    (tmp_path / "prompts").write_bytes(("\ufeff" + "\r\n\n".join(lines) + "\n").encode())
    flags = ["--model", "m", "--prompt", "0", "--prompts", str(tmp_path / "prompts")]
    assert command._prompts(command.parser().parse_args(flags)) == ["0", *lines]


def test_prompts_that_are_no_text_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "latin").write_bytes(b"a\n\xe9\n")
    for name, message in (("fifo", "a FIFO or device"), ("latin", "not UTF-8 text at line 2")):
        assert message in message_of(main, ["--model", "m", "--prompts", str(tmp_path / name)])


@pytest.mark.slow
def test_the_command(tiny_model, tmp_path, capsys):
    flags = ["--model", str(tiny_model), "--max_new_tokens", "8"]
    (tmp_path / "prompts").write_text("3 + 4 is\n\nwhat?\n")
    code, out, stderr = run_module("olmoe_jax.generate", *flags, "--prompts", tmp_path / "prompts")
    assert code == 0, stderr
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["prompt"] for row in rows] == ["3 + 4 is", "what?"]
    main([*flags, "--prompt", "3 + 4 is"])
    assert capsys.readouterr().out == rows[0]["text"] + "\n"
    wrong = [*flags, "--prompt", "x", "--adapter", str(tmp_path)]
    assert "adapter_config.json" in message_of(main, wrong)
    assert "top_p=2" in message_of(main, [*flags, "--prompt", "x", "--top_p", "2"])


SEVERAL = """
import sys
import jax
from olmoe_jax import from_pretrained, generate
from olmoe_jax.data import load_tokenizer
from olmoe_jax.parallel import distributed
from olmoe_jax.parallel.sharding import make_mesh

def texts(path, mesh):
    model, tokenizer = from_pretrained(path, mesh), load_tokenizer(path)
    with jax.set_mesh(mesh):
        prompts, draws = ["a", "what is 3 + 4?", "xyz"], {"temperature": 1.0, "seed": 5}
        return generate(model, tokenizer, prompts, max_new_tokens=8, **draws)

with distributed.joined(sys.argv[1:]) as (path,):
    alone = texts(path, make_mesh(devices=jax.local_devices()[:1]))
    print(jax.process_count(), texts(path, make_mesh(data=2)) == alone)
"""


@pytest.mark.exhaustive
def test_several_processes_write_the_same(tiny_model, tmp_path):
    """Draws on the devices of two processes are those of one device.

    CI has draws on devices of one process (eight_devices/test_mesh_generation.py), and runs of two
    processes that decode greedily (training/test_training_decoding.py).
    """
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SEVERAL, str(tiny_model)]
    started = processes.start(command, tmp_path / "log", environment)
    assert started.wait(300) == [0, 0], started.output()
    assert [output.splitlines()[-1] for output in started.output()] == ["2 True"] * 2
