"""Fixtures of the tests that train; the conftest.py of lora and of esft import them."""

import os
import signal

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from lora.tiny_adapters import write_base
from training.tiny_run import make_files

from olmoe_jax.training.reporting import Reporter

_OPTIONS = {
    "jax_compilation_cache_dir": None,
    "jax_persistent_cache_min_compile_time_secs": 0.2,
}


@pytest.fixture(scope="session")
def compiled_programs(tmp_path_factory):
    """Shared by all runs of these tests."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled_adapters"


@pytest.fixture(scope="module", autouse=True)
def cheap_compilation(compiled_programs):
    """Compiling is nearly all that a tiny run costs: do it quickly, and once."""
    before = {name: getattr(jax.config, name) for name in _OPTIONS}
    wanted = _OPTIONS | {"jax_compilation_cache_dir": str(compiled_programs)}
    for options in (wanted, before):
        for name, value in options.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if options is wanted:
            yield


@pytest.fixture(scope="session")
def run_files(tmp_path_factory, tokenizer_dir):
    """Tokenizer and data of a tiny run; tests must not change them."""
    return make_files(tmp_path_factory.mktemp("run_files"), tokenizer_dir)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A pretrained base in float32."""
    return write_base(tmp_path_factory.mktemp("base") / "float32")


@pytest.fixture(scope="session")
def bfloat16_base(tmp_path_factory):
    """A pretrained base in bfloat16."""
    return write_base(tmp_path_factory.mktemp("base") / "bfloat16", "bfloat16")


@pytest.fixture
def sigterm_at(monkeypatch):
    """Sends this process SIGTERM, once, when a step is reported."""

    def apply(number):
        original, done = Reporter.step, []

        def step(self, line, scalars):
            original(self, line, scalars)
            if line["step"] == number and not done:
                done.append(number)
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(Reporter, "step", step)

    return apply
