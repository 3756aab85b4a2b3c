"""Which jax `make install` installs, on machines that are made of a few files."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers import ROOT

from olmoe_jax.accelerator import ACCELERATORS, detect

NVIDIA_SMI = "#!/bin/sh\nprintf '%s\\n' '{0}' '{0}'\n"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Returns a function that puts nvidia-smi and files of /proc and /sys on a machine."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    def make(nvidia_smi: str | None = None, **files: str) -> Path:
        (tmp_path / "bin").mkdir()
        if nvidia_smi:
            program = tmp_path / "bin" / "nvidia-smi"
            program.write_text(NVIDIA_SMI.format(nvidia_smi))
            program.chmod(0o755)
        for name, text in files.items():
            file = tmp_path / name.replace("__", "/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("580.65.06, 9.0", "cuda13"),
        ("580.65.06, 7.0", "cuda12"),
        ("550.54.15, 9.0", "cuda12"),
        ("470.82.01, 8.0", "cpu"),
        ("No devices were found", "cpu"),
    ],
)
def test_a_gpu(machine, said, expected):
    assert detect(machine(said))[0] == expected


def test_an_old_driver_is_named(machine):
    assert detect(machine("470.82.01, 8.0"))[1].endswith("jax needs driver 525 or newer: update it")


def test_a_driver_without_its_program(machine):
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n"
    assert detect(machine(proc__driver__nvidia__version=text)) == (
        "cuda13",
        "an NVIDIA GPU with driver 580.65.06",
    )


@pytest.mark.parametrize(("device", "expected"), [("0x0063", "tpu"), ("0x0042", "cpu")])
def test_a_tpu_and_the_network_card_of_its_maker(machine, device, expected):
    pci = "sys__bus__pci__devices__0000:00:04.0__"
    files = {f"{pci}vendor": "0x1ae0\n", f"{pci}device": f"{device}\n"}
    assert detect(machine(**files))[0] == expected


def make_says(*arguments: str) -> str:
    command = ["make", "-n", "quickstart", "VENV=missing", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout


def test_what_make_installs():
    for name in ACCELERATORS:
        wanted = "jax" if name == "cpu" else f'"jax[{name}]"'
        assert f"-c constraints.txt -r requirements.txt {wanted}\n" in make_says(
            f"ACCELERATOR={name}"
        )
    assert "pip install" not in make_says("ACCELERATOR=cuda11")


def test_the_same_names_everywhere():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extras["optional-dependencies"] == {
        name: [] if name == "cpu" else [f"jax[{name}]"] for name in ACCELERATORS
    }
    for file in ("README.md", "docs/planning.md", "olmoe_jax/plan/__main__.py"):
        named = re.findall(r"(?:ACCELERATOR=|jax\[|\.\[)(\w+)", (ROOT / file).read_text())
        assert named
        assert {*named} <= {*ACCELERATORS}, file


def interpreters() -> list:
    """Returns the Pythons of this machine that the project supports, one a version."""
    found = {}
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for minor in (11, 12, 13):
        own = [shutil.which(f"python3.{minor}"), *versions.glob(f"3.{minor}.*/bin/python")]
        for python in filter(None, own):
            code = f"import sys; sys.exit(sys.version_info[:2] != (3, {minor}))"
            if not subprocess.run(
                [python, "-c", code], capture_output=True, check=False
            ).returncode:
                found[minor] = str(python)
    return [*found.values()]


EXTRAS = f"jax[{','.join(name for name in ACCELERATORS if name != 'cpu')}]"
"""All of them at once, which is harder than one."""


@pytest.mark.slow
def test_every_extra_resolves():
    """For all Pythons from 3.11 on, which need not be there. uv reads packages' metadata alone."""
    resolve = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-config"]
    every = ["--universal", "--python-version=3.11", "--only-binary=:all:"]
    wanted = ["--constraints=constraints.txt", "requirements.txt", "-"]
    result = subprocess.run(
        [*resolve, *every, *wanted],
        input=EXTRAS,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    for package in ("jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu"):
        assert f"\n{package}==" in result.stdout


@pytest.mark.exhaustive
@pytest.mark.parametrize("python", interpreters())
def test_pip_resolves_every_extra(python):
    """pip downloads gigabytes for that where the index has no metadata apart from packages."""
    dry = [python, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    wanted = ["-c", "constraints.txt", "-r", "requirements.txt", EXTRAS]
    subprocess.run([*dry, *wanted], cwd=ROOT, check=True)
