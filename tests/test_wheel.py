"""A wheel: what it installs, and its commands from an empty folder."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

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
def run(site, tmp_path):
    """run(*words): (exit code, stdout, stderr) of `olmoe-jax WORDS` in an empty folder."""

    def run(*words: str) -> tuple[int, str, str]:
        command = [sys.executable, "-P", site / "bin/olmoe-jax", *words]
        environment = os.environ | {"PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu"}
        result = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        return result.returncode, result.stdout, result.stderr

    return run


def test_nothing_of_a_common_name_is_installed(site):
    names = {path.name.partition("-")[0] for path in site.iterdir()}
    assert names == {"bin", "olmoe_jax"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(run, name):
    code, out, err = run(*name.split(), "--help")
    assert (code, err) == (0, "")
    assert name == "train" or out.startswith(f"usage: olmoe-jax {name} ")


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
