"""A wheel: what it installs, and its commands from an empty folder."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from eval.report.inputs import read_inputs
from olmoe_jax.commands import COMMANDS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Returns the directory where pip installed a wheel, without what it requires."""
    path = tmp_path_factory.mktemp("wheel")
    # A build leaves folders beside the sources.
    wanted = shutil.ignore_patterns(".*", "build", "runs", "tests", "benchmarks", "*.egg-info")
    shutil.copytree(ROOT, path / "source", ignore=wanted)
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
    subprocess.run([*install, "--target", path / "site", path / "source"], check=True)
    return path / "site"


@pytest.fixture
def python(site, tmp_path):
    """python(*words): (exit code, stdout, stderr) of `python WORDS` in an empty folder."""

    def run(*words: object) -> tuple[int, str, str]:
        command = [sys.executable, "-P", *map(str, words)]
        environment = os.environ | {"PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu"}
        result = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        return result.returncode, result.stdout, result.stderr

    return run


@pytest.fixture
def run(site, python):
    """run(*words): the result of `olmoe-jax WORDS` in an empty folder."""
    return lambda *words: python(site / "bin/olmoe-jax", *words)


def test_nothing_of_a_common_name_is_installed(site):
    names = {path.name.partition("-")[0] for path in site.iterdir()}
    assert names == {"bin", "olmoe_jax"}


ELSEWHERE = ("plan", "data", "convert to_hf", "convert merge_lora", "doctor", "quickstart")
"""Commands whose packages have another command in CI."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.exhaustive if name in ELSEWHERE else [])
        for name in COMMANDS
    ],
)
def test_every_command_explains_itself(run, name):
    code, out, err = run(*name.split(), "--help")
    assert (code, err) == (0, "")
    own = "lm-eval " if name == "lm_eval" else f"olmoe-jax {name} "
    assert name == "train" or out.startswith(f"usage: {own}")


def test_the_list_of_commands(run):
    code, out, err = run()
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 2 + len(COMMANDS)
    assert out == run("--help")[1] == run("convert")[1]
    assert run("evl") == (2, "", "error: evl: no such command; did you mean olmoe-jax eval?\n")


def test_the_projects_configs_are_there(run, tmp_path):
    code, _, err = run("train", "--config", "configs/denmixer_gsm.py")
    assert (code, "nearest there: densemixer_gsm.py" in err) == (2, True), err
    flags = ("--config", "configs/densemixer_gsm.py", "--config.model.path=none_here")
    code, _, err = run("train", *flags)
    assert (code, err.startswith("error: none_here: ")) == (2, True), err
    assert not [*tmp_path.iterdir()]


PLUGIN = """
from importlib.metadata import entry_points
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import model_registry
(entry,) = entry_points(group="lm_eval.models", name="olmoe_jax")
model_registry.register(entry.name, target=entry)
cli_evaluate()
"""
"""What lm_eval's releases after 0.4.13 do with an entry point."""


@pytest.fixture
def count(tiny_model, tmp_path):
    """Returns the arguments of lm_eval for a task of eight rows, without --output_path."""
    rows, tasks = tmp_path / "rows.jsonl", tmp_path / "tasks"
    rows.write_text("".join(json.dumps({"n": n, "next": n + 1}) + "\n" for n in range(8)))
    tasks.mkdir()
    (tasks / "count.yaml").write_text(
        f"task: count\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {rows}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{n}} '\n"
        "doc_to_choice: ['3', '5']\ndoc_to_target: '{{(next > 4)|int}}'\n"
        "metric_list: [{metric: acc}]\n"
    )
    command = ["--model", "olmoe_jax", "--model_args", f"pretrained={tiny_model}"]
    command += ["--tasks", "count", "--include_path", tasks, "--log_samples"]
    return [*command, "--use_cache", tmp_path / "cache"]


def test_lm_eval(site, run, count, tmp_path):
    """lm_eval's command line finds the model."""
    (package,) = importlib.metadata.distributions(name="olmoe_jax", path=[str(site)])
    (entry,) = package.entry_points.select(group="lm_eval.models")
    assert (entry.name, entry.value) == ("olmoe_jax", "olmoe_jax.lm_eval:OlmoeLM")
    code, _, err = run("lm_eval", *count, "--output_path", tmp_path / "out")
    assert code == 0, err
    (result,) = read_inputs([f"mine={tmp_path / 'out'}"]).results["lm_eval:count"].values()
    assert len(result.rows) == 8


@pytest.mark.exhaustive
def test_lm_eval_finds_the_plugin(python, run, count, tmp_path):
    """A second command answers from the cache of the first."""
    code, _, err = python("-c", PLUGIN, *count, "--output_path", tmp_path / "first")
    assert code == 0, err
    code, _, err = run("lm_eval", *count, "--output_path", tmp_path / "second")
    assert code == 0, err
    assert "log-likelihoods" not in err
    found = read_inputs([f"{name}={tmp_path / name}" for name in ("first", "second")])
    first, second = found.results["lm_eval:count"].values()
    assert len(first.rows) == 8
    assert (first.metrics, first.rows) == (second.metrics, second.rows)
