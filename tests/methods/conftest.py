"""A pretrained base, data, and a way to stop a run, for the tests that train."""

import os
import signal

import pytest
from tiny import write_base
from training.tiny_run import make_files

from olmoe_jax.training.reporting import Reporter


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
