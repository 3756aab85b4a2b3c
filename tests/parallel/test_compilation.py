"""Compiled programs stay on disk between the starts of a command."""

import os
import subprocess
import sys

import jax
import pytest
from helpers import ROOT

from olmoe_jax.parallel.compilation import _processor, keep_programs

PROGRAM = """
from olmoe_jax.parallel.compilation import keep_programs
keep_programs()
import jax
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
print(jax.jit(lambda x: x * 3 + 1)(2.0), events.count("/jax/compilation_cache/cache_hits"))
"""


def run(tmp_path, program=PROGRAM):
    """Returns what a program prints, its standard error, and the files of the cache."""
    environment = {name: value for name, value in os.environ.items() if name[:4] != "JAX_"}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "OLMOE_JAX_CACHE": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout, result.stderr, [*(tmp_path / "compiled").rglob("*-cache")]


@pytest.mark.slow
def test_second_start_compiles_nothing_and_damage_is_compiled_once(tmp_path):
    output, errors, files = run(tmp_path)
    assert (output, errors) == ("7.0 0\n", "")
    assert files
    assert run(tmp_path) == ("7.0 1\n", "", files)

    for file in files:
        file.write_bytes(file.read_bytes()[:-40])
    output, errors, _ = run(tmp_path)
    assert output == "7.0 0\n"
    assert errors.startswith("compiling again: jit__lambda")
    assert len(errors.splitlines()) == len(files)
    assert run(tmp_path) == ("7.0 1\n", "", files)
    # Where jax is imported already.
    assert run(tmp_path, "import jax" + PROGRAM) == ("7.0 1\n", "", files)


def test_cache_that_cannot_be_written_costs_a_warning(tmp_path):
    (tmp_path / "compiled").write_text("")
    output, errors, _ = run(tmp_path)
    assert output == "7.0 0\n"
    assert len(errors.splitlines()) <= 2


@pytest.mark.parametrize("value", ["/elsewhere", ""])
def test_the_users_directory_wins(monkeypatch, value):
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", value)
    keep_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == value


def test_processors_with_other_instructions_share_no_program(tmp_path):
    names = set()
    for clock, flags in [(1000, "avx2"), (2000, "avx2"), (1000, "avx2 avx512f")]:
        text = f"processor: 0\nmodel name: X\ncpu MHz: {clock}\nflags: {flags}\n\nprocessor: 1\n"
        (tmp_path / "cpuinfo").write_text(text)
        names.add(_processor(tmp_path / "cpuinfo"))
    assert len(names) == 2
    assert _processor(tmp_path / "missing") not in names
