"""`python -m olmoe_jax.generate`, and the function of the same name."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT, assert_user_error, message_of, on_eight_devices, run_module
from training import processes


def main(arguments):
    """The command's, without importing the module under its name, which is the function's."""
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
        (["--model", "m", "--prompts", "nowhere.txt"], "nowhere.txt: No such file"),
        (["--model", "nowhere", "--prompt", "x"], "nowhere: no such directory"),
        (["--model", "m", "--prompt", "x", "--temprature", "1"], "--temprature"),
    ],
)
def test_mistakes(arguments, culprit):
    assert culprit in message_of(main, arguments)


@pytest.mark.slow
def test_the_command(tiny_model, tmp_path):
    command = ["olmoe_jax.generate", "--model", tiny_model, "--max_new_tokens", 8]
    code, alone, stderr = run_module(*command, "--prompt", "3 + 4 is")
    assert code == 0, stderr
    (tmp_path / "prompts").write_text("3 + 4 is\n\nwhat?\n")
    code, out, stderr = run_module(*command, "--prompts", tmp_path / "prompts")
    assert code == 0, stderr
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["prompt"] for row in rows] == ["3 + 4 is", "what?"]
    assert rows[0]["text"] + "\n" == alone
    code, out, _ = run_module("olmoe_jax.generate", "--help")
    assert code == 0
    assert "--adapter" in out
    wrong = run_module(*command, "--prompt", "x", "--adapter", tmp_path)
    assert_user_error(wrong, "adapter_config.json")
    assert_user_error(run_module(*command, "--prompt", "x", "--top_p", "2"), "top_p=2")


WORKER = ROOT / "tests" / "model" / "generation_mesh_worker.py"


@pytest.mark.slow
def test_sharded_is_single_device(tiny_model):
    found = on_eight_devices(WORKER, str(tiny_model))
    assert [*found] == ["greedy", "drawn", "as accelerators", "log_likelihoods"]
    assert all(all(same) for same in found.values()), found


@pytest.mark.slow
def test_several_processes_write_the_same(tiny_model, tmp_path):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(WORKER), str(tiny_model)]
    started = processes.start(command, tmp_path / "log", environment, devices=2)
    assert started.wait(300) == [0, 0], started.output()
    found = [json.loads(output.splitlines()[-1]) for output in started.output()]
    assert found == [{"drawn": [True]}] * 2
